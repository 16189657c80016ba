"""Uni-LoRA in PEFT."""

from __future__ import annotations

from peft import UniLoraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method

ROLES = {
    "unilora_theta_d": "theta",
    "unilora_indices_A": "entries.A",
    "unilora_indices_B": "entries.B",
    "unilora_scales_A": "scales.A",
    "unilora_scales_B": "scales.B",
}


def _config(adapter: AdapterSpec, targets: list[str]) -> UniLoraConfig:
    return UniLoraConfig(
        r=adapter.rank,
        theta_d_length=adapter.option("length"),
        proj_seed=adapter.option("seed"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """Uni-LoRA is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "unilora",
            "unilora",
            frozenset({"linear", "conv1d-transformers"}),
            options={"length": (1, 5, 16, 200), "seed": (0, 42)},
            claim=claim,
        ),
        _config,
        ROLES,
    ),
)
