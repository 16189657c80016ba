"""The port: how a library is plugged in.

An `Implementation` names its variants and attaches them to a model; the `Attached` that comes back is the only
way in which the harness touches the library. Its accessors read storage directly and never go through the
library's merge or delta code: the path under test must not be its own oracle.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.errors import UsageError
from peftcheck.recording import Record

GROUP = "peftcheck.implementations"
BASE = "__base__"  # in a mixed batch: a row that no adapter touches


class Op(Enum):
    """An operation of the port that a library may have, refuse or lack."""

    ATTACH = "attach"
    ADD = "add"
    FORWARD = "forward"
    MERGE = "merge"
    SAFE_MERGE = "safe_merge"
    UNMERGE = "unmerge"
    DISABLED = "disabled"
    DELTA = "delta"
    UNLOAD = "unload"
    EXPORT = "merge_and_unload"
    RESCALE = "rescale"
    DELETE = "delete"
    COMBINE = "combine"
    SAVE = "save"
    LOAD = "load"
    MIXED_BATCH = "mixed_batch"


class Claim(Enum):
    """What a library claims of an operation: it works, it refuses clearly, or there is no such entry point."""

    YES = "yes"
    REFUSES = "refuses"
    ABSENT = "absent"


class Inverts(Enum):
    """How far unmerge restores the base: bit for bit, up to rounding, or not at all."""

    EXACT = "exact"
    FLOAT = "float"
    NEVER = "never"


class Promise(Enum):
    """What a combination kind promises of the combined delta."""

    EXACT = "exact"
    BEST_RANK = "best rank"
    UNSPECIFIED = "unspecified"


class Absent(Exception):
    """The library has no such operation; raised by an `Attached` that is called for one all the same."""


def _everywhere(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    return Claim.YES


def _as_drawn(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    return adapter


def _all_as_drawn(adapters: tuple[AdapterSpec, ...], layers: tuple[LayerSpec, ...]) -> tuple[AdapterSpec, ...]:
    return adapters


def _layer_as_drawn(layer: LayerSpec) -> LayerSpec:
    return layer


def _trainables_only(adapter: AdapterSpec) -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True)
class Variant:
    """A method as the library offers it.

    `formula` names the closed form in `oracle.FORMULAS`. `layers` are the layer kinds that the library accepts;
    on any other kind attaching must be refused. `options` are the values that the generator may draw for each
    option, `constants` those that make the variant what it is. `fit` makes drawn options valid for the layers
    (in the exact regime: dyadic); `fit_all` sees to what the adapters of a case must have in common (a projection
    that they share). `admit` makes a drawn layer one that the library accepts, where it declares a
    limit (no groups, an even number of outputs). `claim` says per operation, layer and adapter what the library claims.
    `documented` names bounds in `budgets.DOCUMENTED` for inexactness that the library announces. `avoids` are
    value profiles without meaning for the method. `rewrites_base`: attaching changes the base by design.
    `options["dropout"]` holds probabilities, drawn apart from all else; `undropped` are layer kinds on which the library
    declares that it drops nothing. `starts` says why a fresh adapter changes the output, where the library documents
    that it does: always, or for the adapters that `starts_when` tells. `samples`: in training it draws at random besides.
    `dropped` are the roles whose part of the change dropout acts on, where that is not all of it.
    `quantizers`: on linear layers quantized by each of these the method merges (YES), or must refuse to (REFUSES).
    `package`: what the method imports besides the library's own requirements; where it is missing the cells are absent.
    `keeps`: the roles of what a checkpoint of the adapter holds besides its trainable tensors, once each (indices, a
    saved projection); frozen tensors of other roles are made anew on loading, from the options and the base.
    `batches`: the leading shapes of the inputs that a layer alone is given, where the method does not take any (empty: any).
    `by_name`: of a whole model it is asked for layers by their names alone, none of which another is tied to: the library
    has rules of its own for the rest.
    `within`: layer kinds, or parts, that the method adapts in the whole models among `layers`, and never alone.
    `like`: the variant whose code this one runs but for what is read of the options once: not every quick run asks both.
    """

    name: str
    formula: str
    layers: frozenset[str]
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    constants: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    fit: Callable[[AdapterSpec, tuple[LayerSpec, ...], bool], AdapterSpec] = _as_drawn
    fit_all: Callable[[tuple[AdapterSpec, ...], tuple[LayerSpec, ...]], tuple[AdapterSpec, ...]] = _all_as_drawn
    admit: Callable[[LayerSpec], LayerSpec] = _layer_as_drawn
    claim: Callable[[Op, LayerSpec, AdapterSpec], Claim] = _everywhere
    inverts: Inverts = Inverts.FLOAT
    documented: tuple[str, ...] = ()
    avoids: frozenset[str] = frozenset()
    bias: bool | None = None  # True: drawn with bias only; False: without only; None: both
    dtypes: frozenset[str] = frozenset({"float64", "float32", "bfloat16", "float16"})
    rewrites_base: bool = False
    unasked: frozenset[str] = frozenset()  # layer kinds that the library accepts and no closed form covers yet
    most_adapters: int = 3
    quantizers: Mapping[str, Claim] = field(default_factory=lambda: MappingProxyType({}))
    combinations: Mapping[str, Promise] = field(default_factory=lambda: MappingProxyType({}))
    package: str | None = None
    undropped: frozenset[str] = frozenset()
    starts: str = ""
    starts_when: Callable[[AdapterSpec], bool] | None = None
    samples: bool = False
    dropped: frozenset[str] = frozenset()
    keeps: Callable[[AdapterSpec], frozenset[str]] = _trainables_only
    batches: tuple[tuple[int, ...], ...] = ()
    by_name: bool = False
    within: frozenset[str] = frozenset()
    like: str = ""
    source: str = ""


@runtime_checkable
class Attached(Protocol):
    """A model with its adapters. Keys: a site is the pristine dotted name of an adapted layer."""

    def roots(self) -> Sequence[object]:
        """Return every object that carries state: model, wrapper networks, configurations."""

    def sites(self, adapter: str) -> tuple[str, ...]:
        """Return the pristine names of the layers that `adapter` adapts, as the library has it."""

    def layer(self, name: str) -> nn.Module:
        """Return the module that now stands where the pristine layer `name` stood."""

    def base_tensors(self) -> dict[str, Tensor]:
        """Return the base's tensors in force now, by pristine name ('a.b.weight'); raw codes if quantized."""

    def base_values(self) -> dict[str, Tensor]:
        """Return the same as dense values, through the quantizer's own dequantization."""

    def adapter_tensors(self, adapter: str) -> dict[tuple[str, str], Tensor]:
        """Return the adapter's tensors in force now by (site, role); frozen projections included.

        A layer that is no site, of which the adapter holds a trained copy instead, has the role 'saved.weight' for
        the copy's weight, and so on.
        Of an adapter that is not there (any more): none. Likewise `sites`.
        """

    def trainable(self, adapter: str) -> frozenset[tuple[str, str]]:
        """Return the keys of `adapter_tensors` that are trained."""

    def forward(self, inputs: Sequence[Tensor], adapters: Sequence[str] | None = None) -> Sequence[Tensor]:
        """Run the model; with `adapters`, a mixed batch: one adapter name (or BASE) per row."""

    def add(self, adapter: AdapterSpec) -> None: ...
    def activate(self, adapters: Sequence[str]) -> None: ...
    def merge(self, adapters: Sequence[str] | None = None, safe: bool = False) -> None: ...
    def unmerge(self) -> None: ...
    def merged(self) -> dict[str, tuple[str, ...]]:
        """Return the adapters merged into each site, in order, as the library's bookkeeping has it."""

    def disabled(self) -> AbstractContextManager[None]: ...
    def train(self, mode: bool) -> None: ...
    def rescale(self, adapter: str, factor: float) -> None: ...
    def delta(self, site: str, adapter: str) -> Tensor: ...
    def unload(self) -> nn.Module: ...
    def merge_and_unload(self, safe: bool = False, adapters: Sequence[str] | None = None) -> nn.Module: ...
    def combine(self, adapters: Sequence[str], weights: Sequence[float], kind: str, into: str, **options) -> None: ...
    def delete(self, adapter: str) -> None: ...
    def save(self, folder: Path, adapters: Sequence[str]) -> None: ...
    def load(self, folder: Path, adapter: str) -> None: ...


@runtime_checkable
class Combines(Protocol):
    """What an `Attached` has besides where its library combines adapters."""

    def adapters(self) -> tuple[str, ...]:
        """Return the names of all adapters, as the library's bookkeeping has them."""

    def described(self, site: str, adapter: str) -> AdapterSpec:
        """Return the options that an adapter declares on a layer: rank, alpha and what else decides its scale."""


@runtime_checkable
class Watches(Protocol):
    """What an `Attached` has besides where its library hands more than one tensor from layer to layer."""

    def watched(self, layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Record]:
        """Return input and output of each layer while `run` runs the model; several tensors stacked where there are.

        The first that comes in is what the plain layer takes, the first that comes out what the adapter makes of it.
        """


@runtime_checkable
class Quantized(Protocol):
    """What an `Attached` has besides where its library adapts quantized layers."""

    def base_layer(self, name: str) -> nn.Module:
        """Return the module that now holds the weight of the pristine layer `name`, out of every wrapper."""


@runtime_checkable
class Implementation(Protocol):
    """A library under test. It may also spell its operations for standalone scripts: see `spelling.Speller`.

    `folders` are where the library's own source lies (to tell its errors from the harness's); `ledger` is the
    file (or folder of files) of its known issues, or None.
    """

    name: str
    version: str
    folders: tuple[Path, ...]
    ledger: Path | None

    def variants(self) -> Mapping[str, Variant]:
        """Return every variant by name."""

    def attach(self, model: nn.Module, case: Case) -> Attached:
        """Attach the case's adapters to the model (which it may change), the first of them active."""


@runtime_checkable
class Reloads(Protocol):
    """What an `Implementation` has besides where its library saves and loads adapters."""

    def reload(self, model: nn.Module, case: Case, folders: Mapping[str, Path]) -> Attached:
        """Attach saved adapters, and nothing else, to a pristine model; all of them active, in the order given.

        `folders` maps names of adapters of the case to where `stored` finds what `Attached.save` wrote.
        """


def stored(folder: Path, adapter: str) -> Path:
    """Return where an adapter's files lie after `Attached.save(folder, ...)`: in a folder of its own, or in `folder`."""
    return folder / adapter if (folder / adapter).is_dir() else folder


def names() -> tuple[str, ...]:
    """Return the names of the installed implementations (entry points of the group)."""
    return tuple(sorted(entry.name for entry in entry_points(group=GROUP)))


def load(target: str) -> Implementation:
    """Load an implementation by entry-point name or as `package.module:attribute`.

    Raises UsageError when there is none of that name, or when the library it stands for is not installed.
    """
    try:
        if ":" in target:
            module, _, attribute = target.partition(":")
            made = getattr(importlib.import_module(module), attribute)
        else:
            found = [entry for entry in entry_points(group=GROUP) if entry.name == target]
            if not found:
                raise UsageError(
                    f"unknown implementation '{target}': choose from {', '.join(names())}, or give module:attribute"
                )
            made = found[0].load()
        return made() if callable(made) else made
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise UsageError(
            f"'{target}' needs the package '{missing}': pip install 'peftcheck[{target}]' or {missing}"
        ) from error
    except AttributeError as error:
        raise UsageError(f"cannot load '{target}': {error}") from error
