"""C3A in PEFT."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from peft import C3AConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> C3AConfig:
    return C3AConfig(block_size=adapter.rank, target_modules=targets)


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Take the largest block size up to the drawn one that divides every target's widths, as PEFT demands."""
    width = gcd(*(n for target in adapter.targets for n in (layers[target].n_in, layers[target].n_out)))
    return replace(adapter, rank=max(d for d in range(1, min(adapter.rank, width) + 1) if width % d == 0))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """C3A is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant("c3a", "c3a", frozenset({"linear"}), fit=fit, claim=claim),
        _config,
        {"c3a_kernel": "kernel"},
    ),
)
