"""LoRA in PEFT on bare parameters (`target_parameters`)."""

from __future__ import annotations

from dataclasses import replace

from peft import LoraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.lora import ROLES


def _config(adapter: AdapterSpec, targets: list[str]) -> LoraConfig:
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=[],
        target_parameters=[f"{target}.weight" for target in targets],
        use_rslora=bool(adapter.option("rslora")),
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """A wrapped parameter knows no mixed batches."""
    return Claim.REFUSES if op is Op.MIXED_BATCH else Claim.YES


def same_targets(adapters: tuple[AdapterSpec, ...], layers: tuple[LayerSpec, ...]) -> tuple[AdapterSpec, ...]:
    """Give every adapter the first one's targets: "all adapters must target the same set of parameters"."""
    return tuple(replace(adapter, targets=adapters[0].targets) for adapter in adapters)


METHODS = (
    Method(
        Variant(
            "lora.parameter",
            "lora.parameter",
            frozenset({"parameter"}),
            options={"rslora": (False, True)},
            fit_all=same_targets,
            claim=claim,
            # any module with a weight holds a parameter; its module is then told to use another one
            unasked=frozenset({"linear", "conv1d-transformers", "conv1d", "embedding", "embedding.scaled"}),
        ),
        _config,
        ROLES,
    ),
)
