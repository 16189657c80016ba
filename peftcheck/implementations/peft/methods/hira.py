"""HiRA in PEFT: it keeps the weight that it replaces, and puts it back."""

from __future__ import annotations

from dataclasses import replace

from peft import HiraConfig

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Inverts, Op, Variant
from peftcheck.implementations.peft.method import Method

ROLES = {"hira_A": "A", "hira_B": "B", "hira_embedding_A": "A", "hira_embedding_B": "B"}


def _config(adapter: AdapterSpec, targets: list[str]) -> HiraConfig:
    return HiraConfig(r=adapter.rank, target_modules=targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """HiRA reports no additive delta, combines no adapters, has no scale and mixes no batches."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def ungrouped(layer: LayerSpec) -> LayerSpec:
    """HiRA declares that it adapts no grouped convolution."""
    return replace(layer, groups=1)


METHODS = (
    Method(
        Variant(
            "hira",
            "hira",
            frozenset({"linear", "conv1d-transformers", *CONVOLUTIONS, *EMBEDDINGS}),
            admit=ungrouped,
            claim=claim,
            inverts=Inverts.EXACT,
        ),
        _config,
        ROLES,
    ),
)
