"""BEFT in PEFT."""

from __future__ import annotations

from peft import BeftConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method


def _config(adapter: AdapterSpec, targets: list[str]) -> BeftConfig:
    return BeftConfig(target_modules=targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """BEFT merges into a bias, where there is one; it reports no delta and has no scale."""
    if op in (Op.DELTA, Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH):
        return Claim.ABSENT
    return Claim.REFUSES if op in MERGES and not spec.bias else Claim.YES


METHODS = (Method(Variant("beft", "bias", frozenset({"linear"}), claim=claim), _config, {"beft_bias": "bias"}),)
