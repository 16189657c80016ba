"""How laws of combinations compare: combined adapters with what is due, and with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor

from peftcheck import combination as combining
from peftcheck.budgets import combine as budgets
from peftcheck.case import Case
from peftcheck.combination import Change, Combination, Combined, Declined
from peftcheck.implementation import Claim, Op, Promise, Variant
from peftcheck.law import Measure, law
from peftcheck.measurement import Measurement, broken, compare
from peftcheck.oracle import FORMULAS
from peftcheck.oracle.combination import matrix
from peftcheck.oracle.form import Site
from peftcheck.oracle.lowrank import scale
from peftcheck.stage import Stage


def combines(variant: Variant) -> bool:
    """Return whether the variant combines adapters at all."""
    return bool(variant.combinations)


def sums(variant: Variant) -> bool:
    """Return whether a sum of the variant's changes is a change of the same kind: not of normalized ones (DoRA)."""
    kept = any(promise is not Promise.UNSPECIFIED for promise in variant.combinations.values())
    return combines(variant) and (kept or has_delta(variant))


def has_delta(variant: Variant) -> bool:
    """Return whether the variant combines what it adds to the weight, whatever the weight is."""
    return combines(variant) and FORMULAS[variant.formula].delta is not None


def comparable(variant: Variant, case: Case) -> bool:
    """Return whether what the case asks for has numbers to compare.

    Factors that are added must agree in rank. Where a method has no delta, what it changes is merged minus base: it
    must be one that merges.
    """
    asked = combining.requested(case)
    if asked is None:
        return False
    if FORMULAS[variant.formula].delta is None:
        places = [(case.layers[target], adapter) for adapter in case.adapters for target in adapter.targets]
        return all(variant.claim(Op.MERGE, *place) is Claim.YES for place in places)
    ranks = {combining.highest_rank(case.adapters[index]) for index in asked.members}
    return asked.kind.rank != "common" or len(ranks) == 1


def of_several(variant: Variant, case: Case) -> bool:
    """Return the same of cases with two members or more."""
    asked = combining.requested(case)
    return asked is not None and len(asked.members) > 1 and comparable(variant, case)


def combining_law(
    name: str,
    formula: str,
    needs: tuple[Op, ...],
    source: str,
    kinds=True,
    structural: bool = False,
    cases: Callable[[Variant, Case], bool] = comparable,
    concerns: Callable[[Variant], bool] = combines,
    exact: bool = True,
):
    """Register a law of combinations, with the variants, kinds and cases that it may say anything of.

    It says nothing where the library declares no delta and declines, and where there is no adapter to judge.
    """

    def able(variant: Variant, case: Case) -> bool:
        places = [(case.layers[target], adapter) for adapter in case.adapters for target in adapter.targets]
        return all(variant.claim(op, *place) is Claim.YES for op in needs for place in places) and cases(variant, case)

    def register(measure: Measure) -> Measure:
        @wraps(measure)
        def of_its_kinds(stage: Stage) -> Measurement | None:
            asked = combining.requested(stage.case)
            promise = None if asked is None else combining.promise(stage, asked)
            if promise is None or (callable(kinds) and not kinds(asked.name, promise)):
                return None
            try:
                return measure(stage)
            except Declined:
                return None

        law(name, formula, needs, source, structural, concerns, kinds, cases=able, exact=exact)(of_its_kinds)
        return measure

    return register


def asked_of(stage: Stage) -> Combination | None:
    """Return what the case asks for, where the variant has that kind and numbers mean anything.

    Kinds that add factors have none for unequal ranks: what they do then is the matter of `combine.refuses`.
    """
    if "asked" not in stage.remembered:
        asked = combining.requested(stage.case)
        known = asked is not None and combining.promise(stage, asked) is not None
        clear = known and comparable(stage.variant, stage.case) and combining.sound(stage, asked)
        stage.remembered["asked"] = asked if clear else None
    return stage.remembered["asked"]


def read(stage: Stage, found: Combined, layer: str) -> Change:
    """Return what a combined adapter adds to a layer; raises Declined where its factors do not make an adapter."""
    site = combining.combined(stage, found, layer)
    if site is None:
        raise Declined(f"no combined adapter on {layer}")
    if misfit(stage, site) is not None:
        raise Declined(f"factors on {layer} that do not fit")
    return combining.change(stage, combining.plain_machine(stage), site)


def read_all(stage: Stage, asked: Combination) -> dict[str, Change]:
    """Return what the library makes of a request, by layer."""
    return {layer: read(stage, combining.made(stage, asked), layer) for layer in combining.layers(stage, asked)}


def misfit(stage: Stage, site: Site) -> str | None:
    """Return why the factors of a low-rank adapter cannot be those of a layer, or None where they can."""
    if not {"A", "B"} <= site.tensors.keys():
        return None
    a, b = site.tensors["A"].value.shape, site.tensors["B"].value.shape
    source = stage.sites(site.spec.name)[0].tensors
    wanted_a, wanted_b = source["A"].value.shape, source["B"].value.shape
    if a[1:] != wanted_a[1:] or b[0] != wanted_b[0] or b[2:] != wanted_b[2:]:
        return f"A is {tuple(a)}, B {tuple(b)}, where sources have {tuple(wanted_a)} and {tuple(wanted_b)}"
    if a[0] != b[1] * site.spec.groups:
        return f"A has {a[0]} rows, B {b[1] * site.spec.groups} columns"
    return None


def normwise(role: str, found: Tensor, due: Tensor, bound: float) -> Measurement:
    """Return norm(found - due) / bound in Frobenius' norm."""
    if found.shape != due.shape:
        return broken(role, "shape", f"shape {tuple(found.shape)} where {tuple(due.shape)} is due")
    residual = float(torch.linalg.vector_norm(found - due))
    ratio = 0.0 if residual == 0 else residual / bound if bound else float("inf")
    size = float(torch.linalg.vector_norm(due))
    note = f"relative error {residual / size:.2g}" if size else f"norm {residual:.2g} where nothing is due"
    return Measurement(ratio, ratio, role, "numeric", residual, bound, (), note)


def elementwise(layer: str, found: Change, due: dict[str, Tensor], bound: dict[str, Tensor]) -> list[Measurement]:
    """Compare every tensor that is changed or ought to be; what is missing on either side counts as unchanged."""
    measured = []
    for name in sorted(due.keys() | found.keys(), reverse=True):  # the weight before the bias, whatever the hashes
        like = due[name] if name in due else found[name].value
        value = found[name].value if name in found else torch.zeros_like(like)
        allowed = bound.get(name, torch.zeros_like(like))
        one = compare(f"{layer}:{name}", value, due.get(name, torch.zeros_like(like)), allowed)
        if name not in found and not one.holds:
            one = replace(one, symptom="lost", note=f"the combined adapter leaves the {name} alone")
        measured.append(one)
    return measured


def values_of(change: Change) -> dict[str, Tensor]:
    """Return the values alone."""
    return {name: form.value for name, form in change.items()}


def agree(
    stage: Stage, asked: Combination, layer: str, one: Change, other: Change, factor: float = 1.0
) -> list[Measurement]:
    """Compare two combined adapters of which either is within rounding of `factor` times the other.

    Truncations of the same delta may differ where singular values tie: they are compared by their singular
    values, and elementwise only where nothing is cut off.
    """
    due = {name: factor * form.value for name, form in other.items()}
    allowed = allowance(stage, asked, layer, factor)
    if isinstance(allowed, dict):
        return elementwise(layer, one, due, allowed)
    bound, whole = allowed
    found, expected = one["weight"].value, due["weight"]
    measured = [normwise(f"{layer}:weight", _spectrum(found), _spectrum(expected), bound)]
    if whole:
        measured.append(normwise(f"{layer}:weight", found, expected, bound))
    return measured


def allowance(
    stage: Stage, asked: Combination, layer: str, factor: float = 1.0
) -> dict[str, Tensor] | tuple[float, bool]:
    """Return how far two such adapters may be apart: by element, or by norm and whether nothing is cut off."""
    if stage.formula.delta is None or asked.kind.rank == "sum":
        limit = combining.exact_bound(stage, asked, layer)
        return {name: (1 + factor) * value for name, value in limit.items()}
    sites, weights = combining.sources(stage, asked, layer)
    sites = [combining.ungrouped(site) for site in sites]
    if asked.kind.rank != "chosen":
        scales = [scale(site.adapter) for site in sites]
        rule = budgets.factorwise(stage.machine, stage.formula, scales, sites, weights, asked.density)
        return {name: (1 + factor) * value for name, value in rule.items()}
    known = asked.kind.prunes != "random" or asked.density >= 1
    target = combining.ideal(stage, asked, layer)["weight"] if known else combining.total(stage, asked, layer)["weight"]
    if not known:  # dropping rescales: no element grows beyond this
        target = replace(target, value=target.value / asked.density, error=None)
    target = replace(target, value=factor * target.value, error=target.bound * factor)
    return 2 * budgets.truncation(stage.machine, target, 0.0), known and combining.untruncated(stage, asked, target)


def _spectrum(delta: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix(delta))
