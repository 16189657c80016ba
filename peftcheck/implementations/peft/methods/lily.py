"""Lily in PEFT."""

from __future__ import annotations

from peft import LilyConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method


def _config(adapter: AdapterSpec, targets: list[str]) -> LilyConfig:
    return LilyConfig(
        r=adapter.rank,
        scaling=adapter.alpha,
        num_B=adapter.option("experts"),
        stride_A=adapter.option("stride"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """Lily declares that it merges nothing: its weights depend on the input."""
    if op in MERGES:
        return Claim.REFUSES
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "lily",
            "lily",
            frozenset({"linear"}),
            options={"experts": (2, 3, 4), "stride": (1, 1, 2, 3)},
            claim=claim,
        ),
        _config,
        {"lily_A.weight": "A", "lily_B.weight": "B", "lily_router.weight": "router"},
    ),
)
