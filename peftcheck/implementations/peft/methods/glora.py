"""GLoRA in PEFT, with each of the forms that its parts can take."""

from __future__ import annotations

from peft import GloraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method

ROLES = {
    f"glora_{part}.{attribute}": f"{part}.{role}"
    for part in "ABCDE"
    for attribute, role in {"Xd": "down", "Xu": "up", "X": "vector", "zeros": "zeros"}.items()
}


def _config(adapter: AdapterSpec, targets: list[str]) -> GloraConfig:
    return GloraConfig(
        r=adapter.rank,
        config_A_B=adapter.option("weight"),
        config_C=adapter.option("through"),
        config_D_E=adapter.option("bias"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """GLoRA reports no delta, combines no adapters and has no scale."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE) else Claim.YES


def _method(name: str, **options) -> Method:
    forms = {"through": ("lora", "vector", "none"), "bias": ("vector", "constant", "none"), **options}
    return Method(Variant(name, "glora", frozenset({"linear"}), options=forms, claim=claim), _config, ROLES)


METHODS = (
    _method("glora", weight=("lora",)),
    _method("glora.vector", weight=("vector", "constant")),
    _method("glora.bias", weight=("none",), bias=("vector", "constant")),
)
