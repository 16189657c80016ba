"""Requests for combinations that mean nothing: refused clearly, with nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftcheck import combination as combining
from peftcheck import refusal
from peftcheck.case import Case
from peftcheck.combination import INTO, Combination
from peftcheck.implementation import Claim, Op, Promise, Variant
from peftcheck.laws.combine_relations import combining_law, elementwise, read, values_of
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.stage import Stage


def _without_delta(variant: Variant, case: Case) -> bool:
    """Return whether the library declares to refuse the delta of some adapter of the case."""
    return any(variant.claim(Op.DELTA, case.layers[t], a) is Claim.REFUSES for a in case.adapters for t in a.targets)


@combining_law(
    "combine.refuses",
    "a request that means nothing is refused clearly, and leaves no adapter behind",
    (Op.COMBINE,),
    "a weight that is missing drops its adapter in silence; a half-made adapter keeps the name from the next attempt",
    structural=True,
    cases=lambda variant, case: case.setting("request") is not None or _without_delta(variant, case),
)
def refuses(stage: Stage) -> Measurement | None:
    """Ask for one thing that cannot be had, as the case says which."""
    asked, request = combining.requested(stage.case), stage.case.setting("request")
    if asked is not None and combining.needs_refused_delta(stage, asked):
        request = "no delta"
    if asked is None or request is None:
        return None
    call = impossible(stage, asked, request)
    if call is None:
        return None
    names, weights, kind, into, options = call
    before = {key: tensor.detach().clone() for key, tensor in stage.attached.base_tensors().items()}
    owned = stage.attached.adapter_tensors(into).keys()
    role = f"request:{request}"
    try:
        with torch.no_grad():
            stage.attached.combine(names, weights, kind, into, **options)
    except Exception as error:
        if not refusal.is_library(error, stage.implementation) and not isinstance(error, TypeError):
            raise
        if not refusal.is_refusal(error, stage.implementation):
            place = refusal.where(error, stage.implementation)
            left = ", and leaves a half-made adapter behind" if _half_made(stage, into, owned) else ""
            return broken(role, "crash", f"{place}: {error}{left}")
        if _half_made(stage, into, owned):
            return broken(role, "left behind", f"refused, but '{into}' is registered: {error}")
        now = stage.attached.base_tensors()
        return worst([identical(key, now[key], tensor) for key, tensor in before.items()])
    if request in ("driver", "no delta"):
        return NOTHING  # a way to compute that makes no difference; a delta after all, judged like any other
    if request == "unequal ranks" and combining.promise(stage, asked) is Promise.EXACT and _is_sum(stage, asked, into):
        return NOTHING  # more than was to be expected
    return broken(role, "accepted", f"combining with {request} was accepted in silence")


def _is_sum(stage: Stage, asked: Combination, name: str) -> bool:
    made = combining.snapshot(stage, name)
    for layer in combining.layers(stage, asked):
        got = read(stage, made, layer)
        due = values_of(combining.total(stage, asked, layer, plain=True))
        if not worst(elementwise(layer, got, due, combining.exact_bound(stage, asked, layer))).holds:
            return False
    return True


def _alike(stage: Stage, names: Sequence[str]) -> bool:
    """Return whether adapters have tensors of the same shapes where they sit on one layer: a gate has no rank."""
    shapes: dict[tuple[str, str], set[torch.Size]] = {}
    for name in names:
        for key, tensor in stage.start_adapters[name].items():
            shapes.setdefault(key, set()).add(tensor.shape)
    return all(len(found) == 1 for found in shapes.values())


def _half_made(stage: Stage, into: str, owned) -> bool:
    if owned:
        return False
    return into in stage.attached.adapters() or bool(stage.attached.adapter_tensors(into))


def impossible(stage: Stage, asked: Combination, request: str):
    """Return names, weights, kind, target and options of the request, or None where it would mean something."""
    names, weights, options = [stage.names[i] for i in asked.members], list(asked.weights), dict(asked.options)
    kind, into = asked.name, INTO
    if request == "unknown kind":
        if stage.variant.combinations.keys() == {"linear"}:
            return None  # only one way: there is nothing to name
        names, weights, kind = (names * 2)[:2], (weights * 2)[:2], "no such kind"
    elif request == "unknown adapter":
        names = [*names[:-1], "nobody"]
    elif request == "fewer weights":
        if len(names) < 2:
            return None
        weights = weights[:-1]
    elif request == "no adapter":
        names, weights = [], []
    elif request == "unequal ranks":
        if asked.kind.rank != "common" or _alike(stage, names):
            return None
    elif request == "driver":
        if asked.kind.rank != "chosen" or len(names) < 2 or torch.cuda.is_available():
            return None
        options["svd_driver"] = "gesvd"
    elif request == "taken name":
        if len(stage.names) < 2:
            return None
        into = stage.names[-1]
    elif request == "no delta":
        if len(names) < 2:
            return None  # of one adapter nothing needs its delta
    elif request == "no density":
        if not asked.kind.prunes or len(names) < 2:
            return None
        options.pop("density", None)
    return names, weights, kind, into, options
