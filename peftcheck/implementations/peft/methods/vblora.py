"""VB-LoRA in PEFT."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from peft import VBLoRAConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> VBLoRAConfig:
    return VBLoRAConfig(
        r=adapter.rank,
        num_vectors=adapter.option("vectors"),
        vector_length=adapter.option("length"),
        topk=adapter.option("topk"),
        target_modules=targets,
    )


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Choose the largest length up to the drawn one that divides every target's widths, as PEFT demands."""
    width = gcd(*(n for target in adapter.targets for n in (layers[target].n_in, layers[target].n_out)))
    drawn = dict(adapter.options)
    length = max(d for d in range(1, min(drawn["length"], width) + 1) if width % d == 0)
    return replace(adapter, options=tuple(sorted({**drawn, "length": length}.items())))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """VB-LoRA is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "vblora",
            "vblora",
            frozenset({"linear", "conv1d-transformers"}),
            options={"vectors": (4, 7, 30, 300), "length": (1, 2, 4, 8), "topk": (1, 2, 2, 3, 4)},
            fit=fit,
            claim=claim,
        ),
        _config,
        {"vblora_logits_A": "logits.A", "vblora_logits_B": "logits.B", "vblora_vector_bank": "bank"},
    ),
)
