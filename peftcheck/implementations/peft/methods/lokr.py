"""LoKr in PEFT."""

from __future__ import annotations

from peft import LoKrConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> LoKrConfig:
    return LoKrConfig(
        r=adapter.rank,
        alpha=adapter.alpha,
        use_effective_conv2d=adapter.option("effective"),
        decompose_both=adapter.option("both"),
        decompose_factor=adapter.option("factor"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """LyCORIS methods are neither combined nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "lokr",
            "lokr",
            frozenset({"linear", "conv1d", "conv2d"}),
            options={"effective": (False, True), "both": (False, True), "factor": (-1, 1, 2, 3)},
            claim=claim,
        ),
        _config,
        {
            "lokr_w1": "w1",
            "lokr_w1_a": "w1.a",
            "lokr_w1_b": "w1.b",
            "lokr_w2": "w2",
            "lokr_w2_a": "w2.a",
            "lokr_w2_b": "w2.b",
            "lokr_t2": "t2",
        },
    ),
)
