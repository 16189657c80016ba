"""Merging into quantized weights and back, once and many times, with something to merge and with nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from peftcheck import quantizers, values
from peftcheck.budgets import quantized
from peftcheck.case import Case
from peftcheck.implementation import Op, Variant
from peftcheck.law import law
from peftcheck.laws.merge import merge_all
from peftcheck.laws.quantize import chosen, coarser, dense, judge, merged, readable, refusable, rule, within
from peftcheck.measurement import Measurement, compare, worst
from peftcheck.oracle import FORMULAS, Base, Site
from peftcheck.rounding import DTYPES, judged
from peftcheck.stage import Stage


def _comes_back(variant: Variant) -> bool:
    """Return whether a formula says what unmerging makes of requantized weights: a difference, or a matrix."""
    formula = FORMULAS[variant.formula]
    return formula.delta is not None or formula.turn is not None


@law(
    "quantize.roundtrip_budget",
    "abs(DQ(unmerged) - DQ(W)) <= b(T) + b(U) + roundings",
    (Op.MERGE, Op.UNMERGE),
    "unmerging requantizes once more: it does not restore the weights, and may not drift further than two steps",
    concerns=_comes_back,
)
def roundtrip_budget(stage: Stage) -> Measurement | None:
    """Merge, unmerge, and compare with the start."""
    return _cycled(stage, 1)


@law(
    "quantize.drift",
    "abs(DQ((unmerge merge)^k) - DQ(W)) <= k (b(T) + b(U)) + roundings",
    (Op.MERGE, Op.UNMERGE),
    "weight synchronisation to an inference server merges and unmerges at every step",
    concerns=_comes_back,
)
def drift(stage: Stage) -> Measurement | None:
    """Merge and unmerge several times, and compare with the start."""
    return _cycled(stage, stage.case.cycles)


def _cycled(stage: Stage, cycles: int) -> Measurement | None:
    if not readable(stage):
        return None
    found = _cycles(stage, cycles)
    if found is None:
        return None
    forms: dict[str, Base | None] = {}
    for name in stage.targeted:
        grids = [one[name] for one in found]
        there = merged(stage, name, grids)
        b = rule(stage, coarser(stage), grids)
        back = quantized.cycled(stage.machine, stage.formula, stage.sites(name), stage.base(name), b, cycles)
        changed = None if back is None or there is None else {key: back[key] for key in there}
        forms[name] = changed if changed is not None and within(stage, changed) else None
    return judge(stage, forms)


def _cycles(
    stage: Stage, cycles: int, sites: Mapping[str, Sequence[Site]] | None = None
) -> list[Mapping[str, Any]] | None:
    """Merge and unmerge several times; return what each requantization in turn has chosen.

    None where it has walked to where a safe merge is refused rightly.
    """
    found = []
    for _ in range(cycles):
        if refusable(stage, sites):
            return None
        merge_all(stage)
        found.append(chosen(stage))
        stage.attached.unmerge()
        found.append(chosen(stage))
    return found


def without_effect(case: Case) -> Case:
    """Return the case with adapters that change nothing."""
    return replace(case, profile="zero")


@law(
    "quantize.zero_delta",
    "an adapter that changes nothing leaves values bit-equal where the grid is a fixpoint, else within k (b(T) + b(U))",
    (Op.MERGE, Op.UNMERGE),
    "a grid whose requantization is not a fixpoint walks away by itself",
    structural=True,
    concerns=lambda variant: _comes_back(variant) and "magnitude" not in FORMULAS[variant.formula].hints.values(),
)
def zero_delta(stage: Stage) -> Measurement | None:
    """Write zeros, merge and unmerge several times, compare with the start."""
    if not readable(stage):
        return None
    quiet = without_effect(stage.case)
    sites = silenced(stage, quiet)
    if sites is None:
        return None
    quantizer, adapter_dtype = quantizers.load(stage.case.sweep.quantizer), DTYPES[stage.case.adapter_dtype]
    proved = {n: quantizer.proved(stage.attached.base_layer(n), adapter_dtype) for n in stage.targeted}
    grids = _cycles(stage, stage.case.cycles, sites)
    if grids is None:
        return None
    tensors = dense(stage)
    if isinstance(tensors, Measurement):
        return tensors
    found = []
    for name in stage.targeted:
        start, now = stage.dense[f"{name}.weight"], tensors[f"{name}.weight"]
        b = rule(stage, coarser(stage), [one[name] for one in grids])
        room = quantized.cycled(stage.machine, stage.formula, sites[name], stage.base(name), b, stage.case.cycles)
        if room is None:
            continue
        exact = proved[name] if stage.formula.delta is not None else torch.zeros_like(proved[name])
        budget = torch.where(
            exact, torch.zeros_like(room["weight"].value), judged(room["weight"], machine=stage.machine.base.store)
        )
        found.append(compare(f"{name}:weight", now.to(start.dtype), start, budget))
    return worst(found) if found else None


def silenced(stage: Stage, quiet: Case) -> dict | None:
    """Write values without effect into the adapters; return the sites, or None where the method has no such values."""
    with torch.no_grad():
        for index, adapter in enumerate(quiet.adapters):
            for (site, role), tensor in stage.attached.adapter_tensors(adapter.name).items():
                hint = stage.formula.hints.get(role, "factor")
                if hint in ("factor", "scale", "rotation") and tensor.is_floating_point():
                    tensor.copy_(values.adapter(quiet, index, site, role, tuple(tensor.shape), hint))
    after = {a.name: stage.attached.adapter_tensors(a.name) for a in quiet.adapters}
    sites = {
        name: tuple(stage.site_of(i, name, after[quiet.adapters[i].name]) for i in stage.adapters_on(name))
        for name in stage.targeted
    }
    for name, own in sites.items():
        base = stage.base(name)
        if any(
            not torch.equal(form.value, base[key].value)
            for key, form in stage.merge_of(own, base).items()
            if key in base
        ):
            return None
    return sites
