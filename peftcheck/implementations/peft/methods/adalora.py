"""AdaLoRA in PEFT."""

from __future__ import annotations

from dataclasses import replace

from peft import AdaLoraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> AdaLoraConfig:
    return AdaLoraConfig(
        init_r=adapter.rank,
        target_r=max(1, adapter.rank // 2),
        lora_alpha=adapter.alpha,
        tinit=1,
        tfinal=1,
        total_step=10,
        inference_mode=bool(adapter.option("inference")),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """AdaLoRA refuses to be combined and has no mixed batches."""
    if op is Op.COMBINE:
        return Claim.REFUSES
    return Claim.ABSENT if op is Op.MIXED_BATCH else Claim.YES


def one_trainable(adapters: tuple[AdapterSpec, ...], layers: tuple[LayerSpec, ...]) -> tuple[AdapterSpec, ...]:
    """Put every adapter but the first in inference mode: only one may be trained."""
    first, *others = adapters
    rest = ({**dict(other.options), "inference": True} for other in others)
    return (
        first,
        *(replace(other, options=tuple(sorted(own.items()))) for other, own in zip(others, rest, strict=True)),
    )


METHODS = (
    Method(
        Variant(
            "adalora",
            "adalora",
            frozenset({"linear", "conv1d-transformers", "conv2d"}),
            fit_all=one_trainable,
            claim=claim,
        ),
        _config,
        {"lora_A": "Q", "lora_E": "E", "lora_B": "P"},
    ),
)
