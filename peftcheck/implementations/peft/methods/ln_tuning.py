"""LN tuning in PEFT: a trained copy of the layer, of whatever kind it is."""

from __future__ import annotations

from peft import LNTuningConfig

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Inverts, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> LNTuningConfig:
    return LNTuningConfig(target_modules=targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """A copied layer has no delta, is not combined, rescaled or mixed within a batch."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "ln_tuning",
            "ln_tuning",
            frozenset({"linear", "layernorm", "conv1d-transformers", "parameter", *CONVOLUTIONS, *EMBEDDINGS}),
            claim=claim,
            unasked=frozenset({"mha"}),
            inverts=Inverts.EXACT,
            most_adapters=1,  # PEFT declares that it runs and merges one at a time
        ),
        _config,
        {
            "ln_tuning_layers.weight": "weight",
            "ln_tuning_layers.bias": "bias",
            "ln_tuning_layers.embed_scale": "embed_scale",
        },
    ),
)
