"""A weighted combination on stage: what a case asks for, what the library makes of it, what it should be.

Deltas are computed from the stored tensors of source and combined adapters by the closed form of the method, with
the scale that follows from the options each adapter declares; the library's own delta code is never asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from peftcheck.budgets import combine as budgets
from peftcheck.case import CONVOLUTIONS, AdapterSpec, Case
from peftcheck.errors import UsageError
from peftcheck.implementation import Claim, Op, Promise
from peftcheck.oracle.combination import KINDS, Kind, definition, tail, weighted_sum
from peftcheck.oracle.form import Machine, Site, machine
from peftcheck.oracle.lowrank import scale
from peftcheck.refusal import is_library, is_refusal
from peftcheck.rounding import Bounded, leaf
from peftcheck.stage import Stage

INTO = "combined"
REQUESTS = (
    "unknown kind", "unknown adapter", "fewer weights", "no adapter",
    "unequal ranks", "driver",
    "taken name", "no density",
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
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
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
    torch.default_generator.manual_seed(asked.seed)  # the processor's alone: asking for every device costs more than combining
    try:
        with torch.no_grad():
            stage.attached.combine(names, asked.weights, asked.name, into, **asked.options)
    except Exception as error:
        refused = is_refusal(error, stage.implementation) and not stage.can(Op.DELTA)
        if refused or (needs_refused_delta(stage, asked) and is_library(error, stage.implementation)):
            raise Declined from error
        raise
    return into


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
    """Return a low-rank adapter of a grouped convolution as one of the full kernel: B written out block by block."""
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
    pairs = zip(asked.members, asked.weights, strict=True)
    kept = [(stage.site(index, layer), weight) for index, weight in pairs if index in stage.adapters_on(layer)]
    return [site for site, _ in kept], [weight for _, weight in kept]


def combined(stage: Stage, name: str, layer: str) -> Site | None:
    """Return the combined adapter on a layer, or None where the library has put none there."""
    tensors = {role: t for (site, role), t in stage.attached.adapter_tensors(name).items() if site == layer}
    if not tensors:
        return None
    own = {role: leaf(tensor, stage.machine.exact) for role, tensor in tensors.items()}
    return Site(stage.spec(layer), stage.attached.described(layer, name), own)


def outcome(stage: Stage, name: str, layer: str) -> Change | None:
    """Return what the combined adapter adds to the layer, or None where the library has put none there."""
    site = combined(stage, name, layer)
    return None if site is None else change(stage, plain_machine(stage), site)


def layers(stage: Stage, asked: Combination) -> tuple[str, ...]:
    """Return the layers that the combination concerns: those of any member."""
    return tuple(name for name in stage.targeted if sources(stage, asked, name)[0])


def total(stage: Stage, asked: Combination, layer: str, m: Machine | None = None) -> Change:
    """Return sum w_i D_i, with what its computation in the adapter's arithmetic may be off."""
    m = m or stage.machine
    sites, weights = sources(stage, asked, layer)
    changes = [change(stage, m, site) for site in sites]
    found: Change = {}
    for name in dict.fromkeys(name for one in changes for name in one):
        parts = [(one[name], weight) for one, weight in zip(changes, weights, strict=True) if name in one]
        found[name] = weighted_sum(m.adapter, [part for part, _ in parts], [weight for _, weight in parts])
    return found


def ideal(stage: Stage, asked: Combination, layer: str) -> Change:
    """Return what the kind's definition makes of the full deltas, before any truncation; nothing may be random."""
    sites, weights = sources(stage, asked, layer)
    changes = [change(stage, stage.machine, site) for site in sites]
    method = asked.options.get("majority_sign_method", "total")
    return {
        name: definition(stage.machine.adapter, asked.kind, [one[name] for one in changes], weights, asked.density, method)
        for name in changes[0]
    }


def exact_bound(stage: Stage, asked: Combination, layer: str, steps: int = 1) -> dict[str, torch.Tensor]:
    """Return the budget of an exact combination on a layer, taken in one step or two.

    Every term is rounded in each step: (1 + v)^8 - 1 < 2.1 ((1 + v)^4 - 1). A step of one adapter may put the weight
    on both sides: of one adapter all kinds are alike. A kind that adds may add the deltas themselves, each stored,
    weighted and added in the adapter's arithmetic: then a delta that underflows is off by eta times its weight.
    """
    sites, weights = sources(stage, asked, layer)
    if stage.formula.delta is None:
        return budgets.gates(stage.machine, stage.formula, sites, weights, stage.base(layer))
    scales = [scale(site.adapter) for site in sites]
    split = asked.kind.rank == "common" or len(asked.members) <= steps
    bound = budgets.exact(stage.machine, stage.formula, scales, [ungrouped(s) for s in sites], weights, split)
    if asked.kind.rank == "common":
        bound = {name: bound[name] + form.bound for name, form in total(stage, asked, layer).items()}
    return bound if steps == 1 else {name: 2.1 * value for name, value in bound.items()}


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
        sites, weights = sources(stage, asked, layer)
        reach = 0.0
        for site, weight in zip(sites, weights, strict=True):
            factor = max(1.0, *(float(form.value.abs().max()) for form in site.tensors.values() if form.value.numel()))
            gain = scale(site.adapter) if stage.formula.delta is not None else 1.0
            size = max(float(form.value.abs().max()) for form in change(stage, plain_machine(stage), site).values())
            reach += max(1.0, abs(weight)) * max(1.0, gain) * max(factor, size) * max(1.0, factor)
        if not reach / asked.density**2 <= largest:
            return False
    return True
