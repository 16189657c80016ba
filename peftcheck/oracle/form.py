"""What a closed form is made of: the site it stands on, the machine it runs on, and its two functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor

from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.rounding import Arithmetic, Bounded, precision


class Family(Enum):
    """How a method changes the base, which decides the derivation of its budgets."""

    ADDITIVE = "additive"
    NORMALIZED = "normalized"
    SCALING = "scaling"
    ROTATION = "rotation"
    SHARDS = "shards"
    STORED = "stored"
    SNAPSHOT = "snapshot"
    MIXED = "mixed"
    OPAQUE = "opaque"


@dataclass(frozen=True)
class Machine:
    """The arithmetic under test: the base's storage, the adapter's, and whether exactness is to be proved."""

    base: Arithmetic
    adapter: Arithmetic
    exact: bool

    @property
    def mixed(self) -> bool:
        """Whether the adapter is stored in another dtype than the base."""
        return self.base.store.dtype != self.adapter.store.dtype


def unlimited(m: Machine) -> Machine:
    """Return the same machine with an exponent range without end: its bounds say what rounding alone may cost."""
    stores = (replace(ar.store, largest=math.inf) for ar in (m.base, m.adapter))
    return Machine(*(Arithmetic(store) for store in stores), m.exact)


def machine(base_dtype, adapter_dtype, exact: bool) -> Machine:
    """Return the machine of two torch dtypes."""
    return Machine(Arithmetic(precision(base_dtype)), Arithmetic(precision(adapter_dtype)), exact)


@dataclass(frozen=True)
class Site:
    """One adapter on one layer: the pristine layer's spec, the adapter's options, its tensors by role."""

    spec: LayerSpec
    adapter: AdapterSpec
    tensors: Mapping[str, Bounded]


Base = Mapping[str, Bounded]
"""A layer's own tensors by name: 'weight' and, where it has one, 'bias'."""


def unknown(shape: tuple[int, ...]) -> Bounded:
    """Return what vouches for nothing: of tensors that do not fit the layer a closed form says nothing."""
    return Bounded(torch.zeros(shape, dtype=torch.float64), torch.full(shape, torch.inf, dtype=torch.float64))


@dataclass(frozen=True)
class Turn:
    """A multiplication of the weight by a square matrix, and the way back, as the machine carries them out.

    `matrix` T (n, n) and `inverse` X (n, n) as stored, with bounds from the exact T and T^-1; `residual` (n, n)
    bounds abs(T' X' - I) for the machine's own T' and X'. Each entry of a product sums at most `n` products, stored
    in `arithmetic`. `rows(name, tensor)` lays a tensor of the layer out as a matrix (any, n) that T multiplies from
    the right, `back(name, matrix)` undoes it; `names` are the tensors that are turned. `gain` (any, 1), where there
    is one, scales the rows after the product, and divides them on the way back.
    """

    matrix: Bounded
    inverse: Bounded
    residual: Tensor
    n: int
    arithmetic: Arithmetic
    rows: Callable[[str, Tensor], Tensor]
    back: Callable[[str, Tensor], Tensor]
    names: tuple[str, ...] = ("weight",)
    gain: Bounded | None = None


@dataclass(frozen=True)
class Formula:
    """A method's closed form.

    `merge(machine, site, base)` returns the tensors of the layer that the method replaces, merged. `forward(machine,
    sites, base, x)` returns the adapted layer's output for all active adapters. `delta(machine, site)`, where the
    method is additive, returns what is added to each tensor. `hints` tell the value generator what each role is
    (see `values.adapter`); `merge_many(machine, sites, base)` stands in for merging one after the other where a later
    adapter depends on more than what the earlier ones left (a norm of the unmerged weight). `dyadic` says that sums,
    products and powers of two suffice, so that the exact regime
    exists. `roundtrip(machine, formula, sites, base)` overrides the family's budget. `turn(machine, site)`, where the
    method multiplies the weight by a matrix, returns that matrix (None: it does not fit the layer, and nothing is
    merged). `steps(machine, site, base)` returns every stored stage of a merge that takes several additions.
    `told(case, adapter)` returns the adapter with what else of the case decides, among its options. `hears` are layers of a
    whole model by role: what each is given in the pristine model is a tensor of every site. `source`: paper and
    equation.
    """

    family: Family
    merge: Callable[[Machine, Site, Base], dict[str, Bounded]]
    forward: Callable[[Machine, Sequence[Site], Base, Bounded], Bounded]
    source: str
    delta: Callable[[Machine, Site], dict[str, Bounded]] | None = None
    hints: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    dyadic: bool = True
    merge_many: Callable[[Machine, Sequence[Site], Base], dict[str, Bounded]] | None = None
    roundtrip: Callable[[Machine, Formula, Sequence[Site], Base], dict[str, Tensor]] | None = None
    turn: Callable[[Machine, Site], Turn | None] | None = None
    steps: Callable[[Machine, Site, Base], Sequence[Base]] | None = None
    told: Callable[[Case, AdapterSpec], AdapterSpec] | None = None
    hears: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def unmerged(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return nothing: what depends on the input (or the token, or the task) is merged into no weight."""
    return {}
