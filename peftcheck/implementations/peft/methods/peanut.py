"""PEANuT in PEFT."""

from __future__ import annotations

from peft import PeanutConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Inverts, Op, Variant
from peftcheck.implementations.peft.method import Method

ROLES = {
    "peanut_A.weight": "A",
    "peanut_B.weight": "B",
    **{f"peanut_encoders.{level}.weight": f"encoder.{level}" for level in range(3)},
    **{f"peanut_decoders.{level}.weight": f"decoder.{level}" for level in range(3)},
}


def _config(adapter: AdapterSpec, targets: list[str]) -> PeanutConfig:
    return PeanutConfig(
        r=adapter.rank,
        depth=adapter.option("depth"),
        act_fn=adapter.option("activation"),
        scaling=adapter.alpha,
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """PEANuT's change depends on the base; it is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "peanut",
            "peanut",
            frozenset({"linear"}),
            options={"depth": (0, 1, 2), "activation": ("relu", "relu", "tanh", "sigmoid", "silu")},
            claim=claim,
            inverts=Inverts.EXACT,
        ),
        _config,
        ROLES,
    ),
)
