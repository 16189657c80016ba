"""A weighted combination on stage: what a case asks for, what the library makes of it, what it should be.

Deltas are computed from the stored tensors of source and combined adapters by the closed form of the method, with
the scale that follows from the options each adapter declares; the library's own delta code is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from peftcheck.budgets import combine as budgets
from peftcheck.case import CONVOLUTIONS, AdapterSpec, Case
from peftcheck.errors import UsageError
from peftcheck.implementation import Claim, Op, Promise
from peftcheck.oracle.combination import KINDS, Kind, definition, tail, weighted_sum
from peftcheck.oracle.form import Machine, Site, machine
from peftcheck.oracle.lowrank import scale
from peftcheck.oracle.lowrank_variants import written_out
from peftcheck.refusal import is_library, is_refusal
from peftcheck.rounding import Bounded, leaf
from peftcheck.stage import Stage

INTO = "combined"
REQUESTS = (
    "unknown kind",
    "unknown adapter",
    "fewer weights",
    "no adapter",
    "unequal ranks",
    "driver",
    "taken name",
    "no density",
)
"""Requests that mean nothing, as `combine.refuses` puts them."""
OPTIONS = ("svd_rank", "svd_clamp", "svd_full_matrices", "density", "majority_sign_method")


class Declined(Exception):
    """Say that there is no combined adapter to judge.

    The library has clearly refused to combine what it declares to have no delta; or what it has made is no adapter,
    which `combine.rank` reports.
    """


@dataclass(frozen=True)
class Combination:
    """What is asked for: `members` index the case's adapters (repeats allowed), one weight each."""

    name: str
    kind: Kind
    members: tuple[int, ...]
    weights: tuple[float, ...]
    options: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )  # compared all the same
    seed: int = 0

    def but(self, **changes: Any) -> Combination:
        """Return the combination with other members, weights or seed."""
        return replace(self, **changes)

    def having(self, **options: Any) -> Combination:
        """Return the combination with other options; None leaves one out."""
        kept = {key: value for key, value in {**self.options, **options}.items() if value is not None}
        return replace(self, options=MappingProxyType(kept))

    def of(self, name: str, **options: Any) -> Combination:
        """Return the same adapters and weights by another kind."""
        return replace(self, name=name, kind=KINDS[name]).having(**options)

    def dense(self) -> Combination:
        """Return the combination at density 1, where nothing is pruned."""
        return self.having(density=1.0) if self.kind.prunes else self

    @property
    def density(self) -> float:
        """The share of elements that pruning keeps; 1 where the kind does not prune."""
        return float(self.options.get("density", 1.0)) if self.kind.prunes else 1.0


@dataclass(frozen=True)
class Combined:
    """What the library has made of a request: by layer, the options it declares and clones of the tensors, by role."""

    adapters: Mapping[str, AdapterSpec]
    tensors: Mapping[str, Mapping[str, Tensor]]


def _once(work: Callable) -> Callable:
    """Do `work` once for each case and arguments: what follows from the case alone is asked for by many laws.

    Nothing may be written into what it returns.
    """

    @wraps(work)
    def remembered(stage: Stage, *args: Any) -> Any:
        key = (work.__name__, *args)
        if key not in stage.remembered:
            stage.remembered[key] = work(stage, *args)
        return stage.remembered[key]

    return remembered


def requested(case: Case) -> Combination | None:
    """Return what the case asks for, or None where it asks for no combination."""
    name = case.setting("kind")
    if name is None:
        return None
    if name not in KINDS:
        raise UsageError(f"unknown combination kind '{name}': choose from {', '.join(KINDS)}")
    options = {key: case.setting(key) for key in OPTIONS if case.setting(key) is not None}
    members = case.setting("members", tuple(range(len(case.adapters))))
    return Combination(
        name, KINDS[name], members, case.setting("weights"), MappingProxyType(options), case.setting("seed", 0)
    )


def promise(stage: Stage, asked: Combination) -> Promise | None:
    """Return what the variant promises of the kind, or None where it has no such kind."""
    return stage.variant.combinations.get(asked.name)


def combine(stage: Stage, asked: Combination, into: str = INTO, sources: Sequence[str] | None = None) -> str:
    """Let the library combine; the adapter that the case wants merged is merged at the time. Return the new name."""
    merged = stage.case.setting("merged")
    if merged is not None and not any(stage.attached.merged().values()):
        stage.attached.merge((stage.names[merged],))
    names = [stage.names[index] for index in asked.members] if sources is None else list(sources)
    torch.default_generator.manual_seed(
        asked.seed
    )  # the processor's alone: asking for every device costs more than combining
    try:
        with torch.no_grad():
            stage.attached.combine(names, asked.weights, asked.name, into, **asked.options)
    except Exception as error:
        refused = is_refusal(error, stage.implementation) and not stage.can(Op.DELTA)
        if refused or (needs_refused_delta(stage, asked) and is_library(error, stage.implementation)):
            raise Declined from error
        raise
    return into


def made(stage: Stage, asked: Combination) -> Combined:
    """Return what the library makes of a request from the start of a law, to which the stage is put back.

    Once for each case, with the error that it raises if it does: most laws look at the same combined adapter.
    """
    found = _attempt(stage, asked)
    if isinstance(found, Exception):
        raise found
    return found


@_once
def _attempt(stage: Stage, asked: Combination) -> Combined | Exception:
    try:
        return snapshot(stage, combine(stage, asked))
    except Exception as error:  # raised by `made`, for each law that asks
        return error
    finally:
        stage.put_back()


def snapshot(stage: Stage, name: str) -> Combined:
    """Return the combined adapter as it stands."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for (layer, role), tensor in stage.attached.adapter_tensors(name).items():
        tensors.setdefault(layer, {})[role] = tensor.detach().clone()
    adapters = {layer: stage.attached.described(layer, name) for layer in stage.attached.sites(name)}
    return Combined(adapters, tensors)


def needs_refused_delta(stage: Stage, asked: Combination) -> bool:
    """Return whether the kind is made of deltas that the library declares to refuse: then so must be the combination."""
    return asked.kind.rank == "chosen" and stage.claims(Op.DELTA) is Claim.REFUSES


def plain_machine(stage: Stage) -> Machine:
    """Return fp64 arithmetic: for values, where what the library's dtypes cost is bounded elsewhere."""
    return machine(torch.float64, torch.float64, stage.machine.exact)


Change = dict[str, Bounded]
"""What an adapter adds to each tensor of a layer."""


def change(stage: Stage, m: Machine, site: Site) -> Change:
    """Return what an adapter adds to the layer's tensors: its delta, or merged minus base where it is not additive."""
    if stage.formula.delta is not None:
        return stage.formula.delta(m, ungrouped(site))
    base = {name: leaf(form.value) for name, form in stage.base(site.spec.name).items()}
    return {name: m.base.sub(form, base[name]) for name, form in stage.formula.merge(m, site, base).items()}


def ungrouped(site: Site) -> Site:
    """Return a low-rank adapter of blocks as one without: a grouped convolution's B, or a packed factor, written out."""
    if site.adapter.option("blocks") is not None:
        return written_out(site)
    b = site.tensors.get("B")
    if site.spec.kind not in CONVOLUTIONS or site.spec.groups == 1 or b is None or "A" not in site.tensors:
        return site
    rank, out = site.tensors["A"].value.shape[0], b.value.shape[0]
    if b.value.shape[1] * site.spec.groups != rank:
        return site

    def spread(narrow: torch.Tensor) -> torch.Tensor:
        blocks = narrow.flatten(1).chunk(site.spec.groups)
        return torch.block_diag(*blocks).reshape(out, rank, *narrow.shape[2:])

    spec = replace(site.spec, groups=1)
    return replace(site, spec=spec, tensors={**site.tensors, "B": b.map(spread)})


def sources(stage: Stage, asked: Combination, layer: str) -> tuple[list[Site], list[float]]:
    """Return the sites of those members that adapt the layer, with their weights."""
    kept = _members(stage, asked, layer)
    return [stage.site(index, layer) for index, _ in kept], [weight for _, weight in kept]


def _members(stage: Stage, asked: Combination, layer: str) -> list[tuple[int, float]]:
    pairs = zip(asked.members, asked.weights, strict=True)
    return [(index, weight) for index, weight in pairs if index in stage.adapters_on(layer)]


def changes(stage: Stage, asked: Combination, layer: str, plain: bool = False) -> list[Change]:
    """Return what each of `sources` adds to the layer, in the adapter's arithmetic or in plain fp64."""
    return [_change_of(stage, index, layer, plain) for index, _ in _members(stage, asked, layer)]


@_once
def _change_of(stage: Stage, index: int, layer: str, plain: bool) -> Change:
    return change(stage, plain_machine(stage) if plain else stage.machine, stage.site(index, layer))


def combined(stage: Stage, found: Combined, layer: str) -> Site | None:
    """Return the combined adapter on a layer, or None where the library has put none there."""
    if layer not in found.tensors:
        return None
    own = {role: leaf(tensor, stage.machine.exact) for role, tensor in found.tensors[layer].items()}
    return Site(stage.spec(layer), found.adapters[layer], own)


def outcome(stage: Stage, found: Combined, layer: str) -> Change | None:
    """Return what the combined adapter adds to the layer, or None where the library has put none there."""
    site = combined(stage, found, layer)
    return None if site is None else change(stage, plain_machine(stage), site)


def layers(stage: Stage, asked: Combination) -> tuple[str, ...]:
    """Return the layers that the combination concerns: those of any member."""
    return tuple(name for name in stage.targeted if sources(stage, asked, name)[0])


def total(stage: Stage, asked: Combination, layer: str, plain: bool = False) -> Change:
    """Return sum w_i D_i, with what its computation in the adapter's arithmetic (or in plain fp64) may be off."""
    return _total(stage, asked.members, asked.weights, layer, plain)


@_once
def _total(stage: Stage, members: tuple[int, ...], weights: tuple[float, ...], layer: str, plain: bool) -> Change:
    m = plain_machine(stage) if plain else stage.machine
    pairs = [pair for pair in zip(members, weights, strict=True) if pair[0] in stage.adapters_on(layer)]
    found, parts = {}, [(_change_of(stage, index, layer, plain), weight) for index, weight in pairs]
    for name in dict.fromkeys(name for one, _ in parts for name in one):
        own = [(one[name], weight) for one, weight in parts if name in one]
        found[name] = weighted_sum(m.adapter, [part for part, _ in own], [weight for _, weight in own])
    return found


@_once
def ideal(stage: Stage, asked: Combination, layer: str) -> Change:
    """Return what the kind's definition makes of the full deltas, before any truncation; nothing may be random."""
    _, weights = sources(stage, asked, layer)
    parts = changes(stage, asked, layer)
    method = asked.options.get("majority_sign_method", "total")
    return {
        name: definition(
            stage.machine.adapter, asked.kind, [one[name] for one in parts], weights, asked.density, method
        )
        for name in parts[0]
    }


def exact_bound(stage: Stage, asked: Combination, layer: str, steps: int = 1) -> dict[str, Tensor]:
    """Return the budget of an exact combination on a layer, taken in one step or two.

    Every term is rounded in each step: (1 + v)^8 - 1 < 2.1 ((1 + v)^4 - 1). A step of one adapter may put the weight
    on both sides: of one adapter all kinds are alike. A kind that adds may add the deltas themselves, each stored,
    weighted and added in the adapter's arithmetic: then a delta that underflows is off by eta times its weight.
    """
    split = asked.kind.rank == "common" or len(asked.members) <= steps
    bound = _exact_bound(stage, asked.members, asked.weights, layer, split)
    if stage.formula.delta is None:
        return bound
    if asked.kind.rank == "common":
        bound = {name: bound[name] + form.bound for name, form in total(stage, asked, layer).items()}
    return bound if steps == 1 else {name: 2.1 * value for name, value in bound.items()}


@_once
def _exact_bound(
    stage: Stage, members: tuple[int, ...], weights: tuple[float, ...], layer: str, split: bool
) -> dict[str, Tensor]:
    own = [(stage.site(i, layer), w) for i, w in zip(members, weights, strict=True) if i in stage.adapters_on(layer)]
    sites, weights = [site for site, _ in own], [weight for _, weight in own]
    if stage.formula.delta is None:
        return budgets.gates(stage.machine, stage.formula, sites, weights, stage.base(layer))
    scales = [scale(site.adapter) for site in sites]
    return budgets.exact(stage.machine, stage.formula, scales, [ungrouped(s) for s in sites], weights, split)


def highest_rank(adapter: AdapterSpec) -> int:
    """Return the largest rank that an adapter has on any layer."""
    return max(adapter.rank, *(adapter.at(target).rank for target in adapter.targets))


def rank_of(stage: Stage, asked: Combination) -> int:
    """Return the rank that the combined adapter has been asked to have."""
    ranks = [highest_rank(stage.case.adapters[index]) for index in asked.members]
    if asked.kind.rank == "sum":
        return sum(ranks)
    return asked.options.get("svd_rank") or max(ranks) if asked.kind.rank == "chosen" else ranks[0]


def truncated_bound(stage: Stage, asked: Combination, target: Bounded) -> float:
    """Return the budget (Frobenius) of a truncated combination of the given definition."""
    return budgets.truncation(stage.machine, target, tail(target.value, rank_of(stage, asked)))


def untruncated(stage: Stage, asked: Combination, target: Bounded) -> bool:
    """Return whether the rank asked for holds the whole of the target, up to rounding."""
    discarded = tail(target.value, rank_of(stage, asked))
    return discarded <= budgets.truncation(stage.machine, target, 0.0)


def sound(stage: Stage, asked: Combination) -> bool:
    """Return whether every weighted factor and delta stays clear of overflow, so that numbers mean anything."""
    largest = min(stage.machine.adapter.store.largest, stage.machine.base.store.largest) / 16
    for layer in layers(stage, asked):
        reach = sum(
            max(1.0, abs(weight)) * _reach(stage, index, layer) for index, weight in _members(stage, asked, layer)
        )
        if not reach / asked.density**2 <= largest:
            return False
    return True


@_once
def _reach(stage: Stage, index: int, layer: str) -> float:
    site = stage.site(index, layer)
    factor = max(1.0, *(float(form.value.abs().max()) for form in site.tensors.values() if form.value.numel()))
    gain = scale(site.adapter) if stage.formula.delta is not None else 1.0
    size = max(float(form.value.abs().max()) for form in _change_of(stage, index, layer, True).values())
    return max(1.0, gain) * max(factor, size) * factor
