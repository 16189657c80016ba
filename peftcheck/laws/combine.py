"""Weighted combinations: the sum that was asked for, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from peftcheck import combination as combining
from peftcheck import combination_diagnosis as diagnosis
from peftcheck.combination import Combination, Combined
from peftcheck.implementation import Op, Promise
from peftcheck.laws.combine_relations import (
    agree,
    asked_of,
    combining_law,
    elementwise,
    has_delta,
    normwise,
    of_several,
    read,
    read_all,
    sums,
    values_of,
)
from peftcheck.measurement import Measurement, worst
from peftcheck.oracle.combination import crossing
from peftcheck.rounding import Bounded
from peftcheck.stage import Stage


def _against_sum(stage: Stage, asked: Combination, made: Combined, part: Combination | None = None) -> Measurement:
    """Compare a combined adapter with sum w_i D_i on every layer: elementwise, or by norm where it came from an SVD.

    `part`: a first step whose truncated result, off by e, went into the second with weight 1. There e is one more doubt
    about the target: 2 e, and less than e for what grows with the target's norm.
    """
    found = []
    for layer in combining.layers(stage, asked):
        got = read(stage, made, layer)
        due = combining.total(stage, asked, layer, plain=True)
        if asked.kind.rank == "chosen" and stage.formula.delta is not None:
            target = combining.total(stage, asked, layer)
            limit = {key: room_of(stage, asked, layer, key, part) for key in target}
            measured = [
                normwise(
                    f"{layer}:{key}",
                    got[key].value if key in got else torch.zeros_like(due[key].value),
                    due[key].value,
                    room,
                )
                for key, room in limit.items()
            ]
        else:
            measured = elementwise(
                layer, got, values_of(due), combining.exact_bound(stage, asked, layer, 1 if part is None else 2)
            )
        one = worst(measured)
        found.append((one, layer, got))
    one, layer, got = max(found, key=lambda item: _rank(item[0]))
    return one if one.holds else diagnosis.explained(stage, asked, made, layer, got, one)


def room_of(stage: Stage, asked: Combination, layer: str, key: str, part: Combination | None = None) -> float:
    """Return by how much (Frobenius) a combination through an SVD may miss sum w_i D_i, made in one step or two."""
    room = combining.truncated_bound(stage, asked, combining.total(stage, asked, layer)[key])
    if part is None or layer not in combining.layers(stage, part):
        return room
    before = combining.total(stage, part, layer)
    return room + (3 * combining.truncated_bound(stage, part, before[key]) if key in before else 0.0)


def _rank(m: Measurement) -> float:
    return m.ratio if m.ratio == m.ratio else float("inf")


@combining_law(
    "combine.linear",
    "abs(D - sum w_i D_i) <= (1+v)^4-like bound of sum abs(w_i) s_i abs(B_i) abs(A_i)",
    (Op.COMBINE,),
    "combining A and B apart gives (A1-A2)(B1+B2) for weights [1, -1]: relative error about 1 (PEFT issue 3004)",
    kinds=lambda kind, promise: promise is Promise.EXACT,
)
def linear(stage: Stage) -> Measurement | None:
    """Combine by a kind that promises the exact sum, and compare every element."""
    asked = asked_of(stage)
    if asked is None or combining.promise(stage, asked) is not Promise.EXACT:
        return None
    return _against_sum(stage, asked, combining.made(stage, asked))


@combining_law(
    "combine.cross_term_free",
    "D = 0 where rows of one adapter's delta meet columns of another's (disjoint supports)",
    (Op.COMBINE,),
    "even weights [1, 1] put half of the energy into B_1 A_2 + B_2 A_1",
    kinds=lambda kind, promise: promise is not Promise.UNSPECIFIED,
    cases=lambda variant, case: case.profile == "probe" and of_several(variant, case),
    concerns=has_delta,
    exact=False,
)
def cross_term_free(stage: Stage) -> Measurement | None:
    """Combine probes whose true and cross terms lie in disjoint places, and measure what is where nothing may be."""
    asked = asked_of(stage)
    if asked is None or stage.case.profile != "probe" or combining.promise(stage, asked) is Promise.UNSPECIFIED:
        return None
    places = crossings(stage, asked)
    if not places:
        return None
    made, found = combining.made(stage, asked), []
    for layer, (where, target) in places.items():
        got = read(stage, made, layer)
        value = got["weight"].value
        crossed, size = torch.linalg.vector_norm(value[where]), torch.linalg.vector_norm(value)
        share = float(crossed / size) ** 2 if size else 0.0
        if asked.kind.rank == "chosen":
            one = normwise(
                f"{layer}:weight",
                value * where,
                torch.zeros_like(value),
                combining.truncated_bound(stage, asked, target),
            )
        else:
            bound = combining.exact_bound(stage, asked, layer)["weight"]
            one = worst(
                elementwise(layer, {"weight": replace(target, value=value * where, error=None)}, {}, {"weight": bound})
            )
        if not one.holds:
            note = f"{100 * share:.2g} % of the combined delta lies in B_a A_b + B_b A_a, which nobody asked for"
            stacked = asked.kind.rank == "sum" and stage.spec(layer).groups > 1
            one = replace(one, symptom="groups" if stacked else "cross terms", note=note)
        found.append(one)
    result = worst(found)
    return result if result.holds else diagnosis.repaired(stage, asked, replace(result, note=""), result.note)


def crossings(stage: Stage, asked: Combination) -> dict[str, tuple[Tensor, Bounded]]:
    """Return where a layer's true terms cannot be (a mask like its weight) and its true sum, where supports are disjoint."""
    places: dict[str, tuple[Tensor, Bounded]] = {}
    for layer in combining.layers(stage, asked):
        sites, _ = combining.sources(stage, asked, layer)
        distinct = dict(
            zip((site.adapter.name for site in sites), combining.changes(stage, asked, layer, plain=True), strict=True)
        )
        if stage.formula.delta is None or len(distinct) < 2:
            continue
        where = crossing([one["weight"].value for one in distinct.values()])
        target = combining.total(stage, asked, layer)["weight"]
        if where is None or (asked.kind.rank == "chosen" and not combining.untruncated(stage, asked, target)):
            continue
        places[layer] = (where, target)
    return places


@combining_law(
    "combine.single",
    "one adapter at weight w is w D",
    (Op.COMBINE,),
    "a single adapter at -1 came out as +1: the sign stood on both factors (PEFT 0.18.1)",
)
def single(stage: Stage) -> Measurement | None:
    """Combine the first adapter alone, nothing pruned."""
    asked = asked_of(stage)
    if asked is None:
        return None
    return _exactly(stage, alone(asked))


def alone(asked: Combination) -> Combination:
    """Return the first adapter alone at its weight, nothing pruned."""
    return asked.but(members=asked.members[:1], weights=asked.weights[:1]).dense().having(svd_rank=None, svd_clamp=None)


@combining_law(
    "combine.cancel",
    "an adapter at [w, -w] is zero",
    (Op.COMBINE,),
    "(A - A)(B + B) is zero by luck, (A + A)(B - B) is not asked for",
    concerns=sums,
)
def cancel(stage: Stage) -> Measurement | None:
    """Combine the first adapter twice, with opposite weights, nothing pruned."""
    asked = asked_of(stage)
    if asked is None:
        return None
    return _exactly(stage, cancelling(asked))


def cancelling(asked: Combination) -> Combination:
    """Return the first adapter twice, with opposite weights, nothing pruned."""
    first, weight = asked.members[0], asked.weights[0]
    return asked.but(members=(first, first), weights=(weight, -weight)).dense().having(svd_clamp=None)


def _exactly(stage: Stage, asked: Combination) -> Measurement | None:
    if not _meaningful(stage, asked):
        return None
    return _against_sum(stage, asked, combining.made(stage, asked))


def _meaningful(stage: Stage, asked: Combination) -> bool:
    """Return whether a sum of changes is an adapter of the same method: else only an adapter at weight 1 is."""
    if stage.formula.delta is not None or combining.promise(stage, asked) is not Promise.UNSPECIFIED:
        return True
    return asked.weights == (1.0,)


@combining_law(
    "combine.homogeneous",
    "weights c w give c times the combination, c = 4 or 1/4",
    (Op.COMBINE,),
    "a sign or a root taken of one weight only shows where all weights grow",
    concerns=sums,
)
def homogeneous(stage: Stage) -> Measurement | None:
    """Combine with the weights and with four times (or a quarter of) them: roots and scalings are exact then."""
    asked = asked_of(stage)
    if asked is None or not _meaningful(stage, asked):
        return None
    asked, other, factor = grown(stage, asked)
    if not combining.sound(stage, other):
        return None
    return _compared(stage, asked, other, factor)


def grown(stage: Stage, asked: Combination) -> tuple[Combination, Combination, float]:
    """Return the combination, the one with weights that are all larger or smaller by a factor, and the factor."""
    factor = 4.0 if stage.case.values % 2 else 0.25
    asked = asked.having(svd_clamp=None)
    return asked, asked.but(weights=tuple(factor * weight for weight in asked.weights)), factor


@combining_law(
    "combine.permutation",
    "the order of the adapters does not matter",
    (Op.COMBINE,),
    "the configuration is copied from the first adapter: its options must not reach the others",
    cases=of_several,
    concerns=sums,
)
def permutation(stage: Stage) -> Measurement | None:
    """Combine in order and in reverse; what drops at random does so at density 1."""
    asked = asked_of(stage)
    if asked is None or len(asked.members) < 2 or not _meaningful(stage, asked):
        return None
    return _compared(stage, *reversed_order(asked), 1.0)


def reversed_order(asked: Combination) -> tuple[Combination, Combination]:
    """Return the combination in order and in reverse, nothing dropped at random."""
    asked = (asked.dense() if asked.kind.prunes == "random" else asked).having(svd_clamp=None)
    return asked, asked.but(members=asked.members[::-1], weights=asked.weights[::-1])


def _compared(stage: Stage, asked: Combination, other: Combination, factor: float) -> Measurement:
    """Compare a combination with `factor` times another, both from the same start."""
    first, second = read_all(stage, asked), read_all(stage, other)
    made = combining.made(stage, other)
    found = []
    for layer, change in first.items():
        for one in agree(stage, asked, layer, second[layer], change, factor):
            if not one.holds and stage.formula.delta is None:
                tensor = one.role.partition(":")[2]
                lost = diagnosis.identity_lost(
                    stage, other, layer, tensor, second[layer][tensor].value, factor * change[tensor].value
                )
                short = diagnosis.stored_shorter(stage, made, layer)
                lost = lost or (("dtype", f"{short}; {one.note}") if short else None)
                one = replace(one, symptom=lost[0], note=lost[1]) if lost else one
            elif not one.holds and one.symptom == "numeric" and (short := diagnosis.stored_shorter(stage, made, layer)):
                one = replace(one, symptom="dtype", note=f"{short}; {one.note}")
            elif (
                not one.holds and one.symptom == "numeric" and stage.spec(layer).groups > 1 and asked.kind.rank == "sum"
            ):
                one = replace(one, symptom="groups")
            elif not one.holds and one.symptom == "numeric" and factor == 1.0 and asked.kind.rank != "chosen":
                tensor = one.role.partition(":")[2]
                if tensor in second[layer] and tensor in change:
                    symptom, note = diagnosis.alone(second[layer][tensor].value, change[tensor].value)
                    one = replace(one, symptom=symptom, note=note) if symptom == "scaled" else one
            found.append(one)
    return worst(found)


@combining_law(
    "combine.additive",
    "combining a combination with another adapter is combining all of them",
    (Op.COMBINE,),
    "adapters are combined step by step; what the first step stores must mean what it was",
    kinds=lambda kind, promise: promise is not Promise.UNSPECIFIED,
    cases=of_several,
)
def additive(stage: Stage) -> Measurement | None:
    """Combine all but the last adapter, then that combination with the last."""
    asked = asked_of(stage)
    if asked is None or len(asked.members) < 2 or combining.promise(stage, asked) is Promise.UNSPECIFIED:
        return None
    asked = asked.having(svd_clamp=None)
    part, rest = in_two_steps(asked)
    if asked.kind.rank == "chosen":
        for step in (part, asked):
            targets = [combining.total(stage, step, layer)["weight"] for layer in combining.layers(stage, step)]
            if not all(combining.untruncated(stage, step, target) for target in targets):
                return None
    first = combining.combine(stage, part, "part")
    last = stage.names[asked.members[-1]]
    name = combining.combine(stage, rest, "whole", (first, last))
    whole = combining.snapshot(stage, name)
    stage.put_back()  # a diagnosis combines anew
    return _against_sum(stage, asked, whole, part)


def in_two_steps(asked: Combination) -> tuple[Combination, Combination]:
    """Return the combination of all but the last, and that of its result with the last (whose members mean nothing)."""
    part = asked.but(members=asked.members[:-1], weights=asked.weights[:-1])
    return part, asked.but(members=(0, 0), weights=(1.0, asked.weights[-1]))
