"""An implementation of the port in plain torch, written for no other end: the worked example of plugging one in.

It wraps modules, as PEFT does, and shares no line with the oracle, so that either convicts the other. To plug in a
library of your own, follow the same four steps:

1. Name what the library offers: a `Variant` per method, with the closed form that it implements (`formula`), the layers
   that it accepts, and what it claims of each operation (`claims`): an operation that it refuses must be
   refused clearly, and is tested for that.
2. Write an `Attached` (`attached.py`): accessors that read storage as it is now, and operations that call the library.
3. Write an `Implementation`: name, version, where the library's source lies, and `attach`.
4. Run it: `peftcheck run peftcheck.implementations.reference:Reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import lcm
from pathlib import Path
from types import MappingProxyType

from torch import nn

from peftcheck import models
from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, AdapterSpec, Case, LayerSpec
from peftcheck.errors import UsageError
from peftcheck.implementation import Claim, Op, Promise, Variant
from peftcheck.implementations.reference.attached import Make, ReferenceAttached
from peftcheck.implementations.reference.bias import Offset
from peftcheck.implementations.reference.dora import Decomposed
from peftcheck.implementations.reference.ia3 import Gate
from peftcheck.implementations.reference.lora import LowRank
from peftcheck.rounding import DTYPES
from peftcheck.transformer_models import having

MERGES = frozenset({Op.MERGE, Op.SAFE_MERGE, Op.UNMERGE, Op.EXPORT})
_PLAIN = frozenset({"linear", "conv1d-transformers", *CONVOLUTIONS})


def _lora_claims(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """A full kernel is no grouped one, and a bias needs a bias to merge into."""
    if op in (*MERGES, Op.DELTA) and spec.groups > 1:
        return Claim.REFUSES
    if op in MERGES and adapter.option("bias") and not spec.bias:
        return Claim.REFUSES
    return Claim.YES


def _gate_claims(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """A gate has neither a delta of its own nor a scale beside its values, and gates do not add up."""
    return Claim.REFUSES if op in (Op.DELTA, Op.RESCALE, Op.COMBINE) else Claim.YES


def _dora_claims(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """What a DoRA changes depends on the weight: it has no delta, DoRAs do not add up, nor share a batch."""
    return Claim.REFUSES if op in (Op.DELTA, Op.COMBINE, Op.MIXED_BATCH) else Claim.YES


def _offset_claims(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """An offset needs a bias to merge into, and has neither a delta of the weight nor a scale."""
    if op in (Op.DELTA, Op.COMBINE, Op.RESCALE) or (op in MERGES and not spec.bias):
        return Claim.REFUSES
    return Claim.YES


def _ungrouped(layer: LayerSpec) -> LayerSpec:
    return replace(layer, groups=1)


def _whole_groups(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Round the rank up to a multiple of every target's groups; alpha / rank stays where exactness needs it."""
    groups = lcm(*(layers[target].groups for target in adapter.targets))
    rank = -(-adapter.rank // groups) * groups
    return replace(adapter, rank=rank, alpha=adapter.alpha * rank / adapter.rank if exact else adapter.alpha)


def _square_rank(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Do the same for alpha / sqrt(rank): in the exact regime alpha makes it a power of two."""
    fitted = _whole_groups(adapter, layers, False)
    return replace(fitted, alpha=fitted.rank**0.5) if exact else fitted


_DROPOUT = (0.0, 0.1, 0.5, 0.9)
_COMBINATIONS = {"cat": Promise.EXACT, "linear": Promise.EXACT, "svd": Promise.BEST_RANK}


def _lora(name: str, layers: frozenset[str], fit=_whole_groups, **options) -> Variant:
    return Variant(
        name,
        "lora",
        layers,
        options={**{key: (value,) for key, value in options.items()}, "dropout": _DROPOUT},
        fit=fit,
        claim=_lora_claims,
        combinations=_COMBINATIONS,
        source="Hu et al., 2021; rsLoRA: Kalajdzievski, 2023",
    )


def _ia3(name: str, layers: frozenset[str], feedforward: bool) -> Variant:
    return Variant(
        name,
        "ia3",
        layers,
        options={"feedforward": (feedforward,), "dropout": _DROPOUT},
        claim=_gate_claims,
        source="Liu et al., 2022, section 3.3",
    )


METHODS: dict[str, tuple[Variant, Make]] = {
    variant.name: (variant, make)
    for variant, make in (
        (_lora("lora", _PLAIN | set(EMBEDDINGS)), LowRank),
        (_lora("lora.rslora", _PLAIN | set(EMBEDDINGS), _square_rank, rslora=True), LowRank),
        (_lora("lora.bias", _PLAIN, bias=True), LowRank),
        (
            Variant(
                "lora.dora",
                "dora",
                _PLAIN | set(EMBEDDINGS),
                admit=_ungrouped,
                claim=_dora_claims,
                source="Liu et al., DoRA, 2024",
            ),
            Decomposed,
        ),
        (Variant("beft", "bias", _PLAIN, claim=_offset_claims, source="Ben Zaken et al., 2021"), Offset),
        (_ia3("ia3", _PLAIN | set(EMBEDDINGS), False), Gate),
        (_ia3("ia3.feedforward", _PLAIN, True), Gate),
    )
}


@cache
def _variants() -> Mapping[str, Variant]:
    return MappingProxyType(
        {
            name: replace(variant, layers=variant.layers | having(variant.layers))
            for name, (variant, _) in METHODS.items()
        }
    )


class Reference:
    """The reference implementation; loads as `peftcheck.implementations.reference:Reference`."""

    name = "reference"
    version = "1"
    folders = (Path(__file__).parent,)
    ledger = None

    def variants(self) -> Mapping[str, Variant]:
        return _variants()

    def attach(self, model: nn.Module, case: Case) -> ReferenceAttached:
        """Attach the case's adapters, all of them active, in order; raises UsageError for an unknown variant."""
        if case.sweep.variant not in METHODS:
            raise UsageError(f"reference has no variant '{case.sweep.variant}': choose from {', '.join(METHODS)}")
        _, make = METHODS[case.sweep.variant]
        names = [spec.name for spec in case.layers]
        others = [name for name in models.holders(model) if name not in names] if case.whole else []
        attached = ReferenceAttached(model, names, make, DTYPES[case.adapter_dtype], others)
        for adapter in case.adapters:
            attached.add(adapter)
        attached.activate([adapter.name for adapter in case.adapters])
        return attached

    def reload(self, model: nn.Module, case: Case, folders: Mapping[str, Path]) -> ReferenceAttached:
        """Attach saved adapters to a pristine model, all of them active, in order."""
        _, make = METHODS[case.sweep.variant]
        attached = ReferenceAttached(model, [spec.name for spec in case.layers], make, DTYPES[case.adapter_dtype])
        for name, folder in folders.items():
            attached.load(folder, name)
        attached.activate(tuple(folders))
        return attached
