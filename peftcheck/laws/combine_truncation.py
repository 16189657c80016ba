"""Combinations that cut: truncated singular values, pruned elements, clamped factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck import combination as combining
from peftcheck import combination_diagnosis as diagnosis
from peftcheck.combination import Combination
from peftcheck.implementation import Op, Promise
from peftcheck.laws.combine_relations import (
    agree,
    asked_of,
    combining_law,
    has_delta,
    normwise,
    of_several,
    read,
    read_all,
)
from peftcheck.measurement import Measurement, compare, worst
from peftcheck.oracle.combination import DENSE, KINDS, Kind, drops, tail
from peftcheck.rounding import Bounded
from peftcheck.stage import Stage


@combining_law(
    "combine.best_rank",
    "norm(sum w_i D_i - D) <= Eckart-Young tail + gamma-like term",
    (Op.COMBINE,),
    "rank 4 of two rank-4 adapters is off by 0.32 at best: that is right, and 0.33 is not",
    kinds=lambda kind, promise: promise is Promise.BEST_RANK,
)
def best_rank(stage: Stage) -> Measurement | None:
    """Compare the error of a truncated combination with the least error of any matrix of that rank."""
    asked = asked_of(stage)
    if asked is None or combining.promise(stage, asked) is not Promise.BEST_RANK or "svd_clamp" in asked.options:
        return None
    found = []
    for layer, got in read_all(stage, asked).items():
        for key, target in combining.total(stage, asked, layer).items():
            value = got[key].value if key in got else torch.zeros_like(target.value)
            least = tail(target.value, combining.rank_of(stage, asked)) if key == "weight" else 0.0
            one = _beyond(
                normwise(f"{layer}:{key}", value, target.value, combining.truncated_bound(stage, asked, target)), least
            )
            if not one.holds:
                one = _cause(stage, asked, layer, one, value, target, least)
            found.append(one)
    return worst(found)


def _beyond(m: Measurement, least: float) -> Measurement:
    """Return the part of an error, and of its bound, beyond the least error that any matrix of the rank has."""
    if m.symptom != "numeric":
        return m
    residual, bound = max(0.0, m.residual - least), m.bound - least
    ratio = 0.0 if residual == 0 else residual / bound if bound else math.inf
    return replace(m, ratio=ratio, beyond=ratio, residual=residual, bound=bound)


def _cause(
    stage: Stage, asked: Combination, layer: str, one: Measurement, value: Tensor, target: Bounded, least: float
) -> Measurement:
    """Name the cause of a truncated combination that is worse than it must be."""
    if one.role.endswith(":bias"):
        return replace(one, symptom="lost", note="the combined adapter leaves the bias alone")
    if stage.machine.adapter.store.dtype == torch.float64:
        total = sum(abs(w) for w in asked.weights)
        changes = combining.changes(stage, asked, layer, plain=True)
        single = 2.0**-22 * total * max(float(torch.linalg.vector_norm(one["weight"].value)) for one in changes)
        if one.residual <= single:
            return replace(
                one,
                symptom="single precision",
                note=f"right to float32 only, where the adapters are float64; {one.note}",
            )
    key = one.role.partition(":")[2]
    whole = diagnosis.alone(value, target.value)
    scaled = whole if whole[0] == "scaled" and least <= one.bound else ("numeric", "")
    symptom, note = diagnosis.wrong_alone(stage, asked, layer, key) or scaled
    size = float(torch.linalg.vector_norm(target.value))
    optimum = f"the best of rank {combining.rank_of(stage, asked)} is off by {least / size:.2g}" if size else ""
    return diagnosis.repaired(stage, asked, replace(one, symptom=symptom), note, optimum)


@combining_law(
    "combine.definition",
    "abs(D - definition on full deltas) <= bound; a random drop keeps or drops each element, rescaled",
    (Op.COMBINE,),
    "TIES, DARE and magnitude pruning are defined on task vectors: of the factors they prune something else",
    kinds=lambda kind, promise: promise is Promise.UNSPECIFIED,
    concerns=has_delta,
)
def defined(stage: Stage) -> Measurement | None:
    """Compare with the paper's definition in fp64; what is truncated as well, by the least error of that rank."""
    asked = asked_of(stage)
    if asked is None or combining.promise(stage, asked) is not Promise.UNSPECIFIED or stage.formula.delta is None:
        return None
    if "svd_clamp" in asked.options:
        return None
    random = asked.kind.prunes == "random" and asked.density < 1
    layers = combining.layers(stage, asked)
    if random and asked.kind.rank == "chosen":  # what has been cut off is not known
        rank = combining.rank_of(stage, asked)
        layers = tuple(n for n in layers if rank >= min(_sides(stage, asked, n)))
        if not layers:
            return None
    found = []
    for layer in layers:
        value = read(stage, combining.made(stage, asked), layer)["weight"].value
        one = _dropped(stage, asked, layer, value) if random else _pruned(stage, asked, layer, value)
        if not one.holds and len(asked.members) == 1:
            note = "one adapter alone was scaled, neither pruned nor truncated"
            one = replace(one, symptom="one adapter", note=f"{note}; {one.note}")
        elif not one.holds and asked.kind.rank == "common" and one.symptom == "numeric":
            ways = diagnosis.unpruned_factors(stage, asked, layer)
            told = [f"the factors were {'pruned and combined' if asked.density < 1 else 'combined'}, not the deltas"]
            told += ["repair: " + ", ".join(way.words() for way in ways)] if ways else []
            one = replace(one, symptom="factors", note="; ".join([*told, one.note]), repairs=ways)
        found.append(one)
    return worst(found)


def _sides(stage: Stage, asked: Combination, layer: str) -> tuple[int, int]:
    target = combining.total(stage, asked, layer)["weight"].value
    return target.shape[0], target[0].numel()


def _pruned(stage: Stage, asked: Combination, layer: str, value: Tensor) -> Measurement:
    target = combining.ideal(stage, asked, layer)["weight"]
    role = f"{layer}:weight"
    if asked.kind.rank == "chosen":
        least = tail(target.value, combining.rank_of(stage, asked))
        one = _beyond(normwise(role, value, target.value, combining.truncated_bound(stage, asked, target)), least)
    else:
        bound = target.bound + combining.exact_bound(stage, asked, layer)["weight"]
        one = compare(role, value, target.value, bound)
        share = diagnosis.excess(value, target.value)
        one = (
            one
            if one.holds
            else replace(one, note=f"{share} of the combined delta is not in the definition; {one.note}")
        )
    if not one.holds and _in_single(stage, asked, layer, value, target):
        return replace(
            one, symptom="single precision", note=f"right to float32 only, where the adapters are float64; {one.note}"
        )
    return one


def _in_single(stage: Stage, asked: Combination, layer: str, value: Tensor, target: Bounded) -> bool:
    if stage.machine.adapter.store.dtype != torch.float64 or asked.kind.rank != "chosen":
        return False
    _, weights = combining.sources(stage, asked, layer)
    changes = [one["weight"].value for one in combining.changes(stage, asked, layer, plain=True)]
    size = sum(abs(w) * float(torch.linalg.vector_norm(c)) for w, c in zip(weights, changes, strict=True))
    least = tail(target.value, combining.rank_of(stage, asked)) if asked.kind.rank == "chosen" else 0.0
    doubt = float(torch.linalg.vector_norm(target.bound))
    return float(torch.linalg.vector_norm(value - target.value)) <= least + 2 * doubt + 2.0**-22 * size


def outcomes(stage: Stage, asked: Combination, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the 2^n weights that dropping may leave, each with its bound: an element may be that of any of them."""
    _, weights = combining.sources(stage, asked, layer)
    changes = [one["weight"] for one in combining.changes(stage, asked, layer)]
    method = asked.options.get("majority_sign_method", "total")
    total = combining.total(stage, asked, layer)["weight"]
    spread = replace(total, value=total.value.abs() / asked.density)
    room = (
        combining.truncated_bound(stage, asked.having(svd_rank=max(total.value.shape)), spread)
        if asked.kind.rank == "chosen"
        else 0.0
    )
    for _, candidate in drops(stage.machine.adapter, asked.kind, changes, weights, asked.density, method):
        yield candidate.value, candidate.bound + room


def _dropped(stage: Stage, asked: Combination, layer: str, value: Tensor) -> Measurement:
    """Compare every element with the nearest of the 2^n values that dropping can leave there."""
    _, weights = combining.sources(stage, asked, layer)
    changes = [one["weight"] for one in combining.changes(stage, asked, layer)]
    best = torch.full_like(value, math.inf)
    nearest, allowed = torch.zeros_like(value), torch.ones_like(value)
    for candidate, bound in outcomes(stage, asked, layer):
        ratio = (value - candidate).abs() / bound.clamp_min(torch.finfo(torch.float64).tiny)
        closer = ratio < best
        best = torch.where(closer, ratio, best)
        nearest = torch.where(closer, candidate, nearest)
        allowed = torch.where(closer, bound, allowed)
    one = compare(f"{layer}:weight", value, nearest, allowed)
    if not one.holds and stage.machine.adapter.store.dtype == torch.float64 and asked.kind.rank == "chosen":
        size = sum(abs(w) * c.value.abs() for w, c in zip(weights, changes, strict=True)) / asked.density
        if bool(((value - nearest).abs() <= allowed + 2.0**-22 * float(torch.linalg.vector_norm(size))).all()):
            return replace(
                one,
                symptom="single precision",
                note=f"right to float32 only, where the adapters are float64; {one.note}",
            )
    return one


@combining_law(
    "combine.expectation",
    "the share of elements that a random drop keeps is the density (Hoeffding, failing once in 1e9)",
    (Op.COMBINE,),
    "DARE's expectation is the dense sum only if what is kept is divided by the share that is kept",
    kinds=lambda kind, promise: KINDS[kind] == Kind("random", False, "chosen"),
    cases=lambda variant, case: len(case.adapters) > 1 and case.setting("density", 1.0) < 1,
    concerns=has_delta,
)
def expectation(stage: Stage) -> Measurement | None:
    """Drop from one adapter several times, with seeds that follow from the case, and compare the mean with the sum.

    Each element is w D b / p with b = 1 at probability p: the mean of n draws over N elements of sum w D b / (p w D)
    lies within sqrt(ln(2 / 1e-9) / (2 n N)) / p of 1.
    """
    asked = asked_of(stage)
    if asked is None or asked.density >= 1 or stage.formula.delta is None:
        return None
    first = asked.members[0]
    others = [i for i in range(len(stage.names)) if i != first]
    if not others:
        return None
    # two members, so that no shortcut for one applies; the second weighs nothing
    pair = asked.but(members=(first, others[0]), weights=(1.0, 0.0)).having(svd_clamp=None)
    layers = [
        n for n in combining.layers(stage, pair) if 0 < combining.rank_of(stage, pair) >= min(_sides(stage, pair, n))
    ]
    kept, count = 0.0, 0
    for draw in range(8):
        made = combining.made(stage, pair.but(seed=asked.seed + draw))
        for layer in layers:
            sites, _ = combining.sources(stage, pair, layer)
            if sites[0].adapter.name != stage.names[first]:
                continue
            due = combining.changes(stage, pair, layer, plain=True)[0]["weight"].value
            got = read(stage, made, layer)
            solid = due.abs() > 2.0**-4 * due.abs().max()  # clear of the noise of the SVD
            kept += float((got["weight"].value[solid] / due[solid]).sum())
            count += int(solid.sum())
    if not count:
        return None
    rounding = 2.0**-4 if stage.machine.adapter.store.u > 2.0**-20 else 2.0**-10
    bound = math.sqrt(math.log(2e9) / (2 * count)) / asked.density + rounding
    off = abs(kept / count - 1)
    return Measurement(
        off / bound, off / bound, "model:mean", "numeric", off, bound, (), f"mean {kept / count:.3g} of {count} draws"
    )


@combining_law(
    "combine.density_one",
    "a pruning kind at density 1 is its dense kind",
    (Op.COMBINE,),
    "pruning nothing must change nothing",
    kinds=lambda kind, promise: kind in DENSE,
)
def density_one(stage: Stage) -> Measurement | None:
    """Combine at density 1 and by the kind without pruning."""
    asked = asked_of(stage)
    if asked is None or asked.name not in DENSE or DENSE[asked.name] not in stage.variant.combinations:
        return None
    return _same(stage, *with_dense(asked))


def with_dense(asked: Combination) -> tuple[Combination, Combination]:
    """Return the combination at density 1, and by the kind without pruning."""
    asked = asked.dense().having(svd_clamp=None)
    other = asked.of(DENSE[asked.name])
    return asked, other.dense() if other.kind.prunes else other.having(density=None)


@combining_law(
    "combine.clamp",
    "svd_clamp 1 clamps nothing",
    (Op.COMBINE,),
    "the threshold is a quantile: at 1 all values are within it",
    kinds=lambda kind, promise: KINDS[kind].rank == "chosen",
    cases=of_several,
)
def clamp(stage: Stage) -> Measurement | None:
    """Combine with the threshold at the largest value, and without threshold."""
    asked = asked_of(stage)
    if asked is None or asked.kind.rank != "chosen" or len(asked.members) < 2:
        return None
    one = _same(stage, *clamped(asked))
    return (
        one
        if one.holds
        else replace(one, symptom="clamped", note=f"the threshold is not that of the magnitudes; {one.note}")
    )


def clamped(asked: Combination) -> tuple[Combination, Combination]:
    """Return the combination with the threshold at the largest value, and without one."""
    asked = asked.dense()
    return asked.having(svd_clamp=1.0), asked.having(svd_clamp=None)


def _same(stage: Stage, asked: Combination, other: Combination) -> Measurement:
    other_changes = read_all(stage, other)
    return worst(
        [
            one
            for layer, got in read_all(stage, asked).items()
            for one in agree(stage, other, layer, got, other_changes[layer])
        ]
    )
