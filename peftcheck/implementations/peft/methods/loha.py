"""LoHa in PEFT."""

from __future__ import annotations

from peft import LoHaConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> LoHaConfig:
    return LoHaConfig(
        r=adapter.rank,
        alpha=adapter.alpha,
        use_effective_conv2d=adapter.option("effective"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """LyCORIS methods are neither combined nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "loha",
            "loha",
            frozenset({"linear", "conv1d", "conv2d"}),
            options={"effective": (False, True)},
            claim=claim,
        ),
        _config,
        {
            "hada_w1_a": "w1.a",
            "hada_w1_b": "w1.b",
            "hada_w2_a": "w2.a",
            "hada_w2_b": "w2.b",
            "hada_t1": "t1",
            "hada_t2": "t2",
        },
    ),
)
