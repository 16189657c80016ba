"""DeLoRA in PEFT."""

from __future__ import annotations

from peft import DeloraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method, keeping

ROLES = {"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda", "delora_w_norm": "norm"}


def _config(adapter: AdapterSpec, targets: list[str]) -> DeloraConfig:
    return DeloraConfig(r=adapter.rank, delora_lambda=adapter.alpha, target_modules=targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """DeLoRA combines no adapters, has no scale and mixes no batches."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(Variant("delora", "delora", frozenset({"linear"}), claim=claim, keeps=keeping("norm")), _config, ROLES),
)
