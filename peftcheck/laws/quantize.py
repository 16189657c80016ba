"""Merging into quantized weights: no further off than the grid makes unavoidable.

The quantizer's own dequantization says what the weights are; budgets come from the grid's definition
(`budgets.grids`). Where dequantization itself does not follow the grid, `quantize.decoded` says so and the
other laws say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftcheck import quantizers
from peftcheck.budgets import quantized
from peftcheck.budgets.quantized import Rule
from peftcheck.implementation import Op, Variant
from peftcheck.law import law
from peftcheck.laws.merge import merge_all
from peftcheck.measurement import Measurement, broken, compare, identical, worst
from peftcheck.oracle import Base, Site
from peftcheck.rounding import judged, leaf, precision
from peftcheck.stage import Stage


def rule(stage: Stage, dtype: torch.dtype | None = None, chosen: Sequence[Any] = ()) -> Rule:
    """Return the budget b of the case's grid, for values that dequantization returns in `dtype`.

    `chosen`: what each requantization in turn has chosen, where the grid is searched for.
    """
    quantizer, settings = quantizers.load(stage.case.sweep.quantizer), quantizers.settings_of(stage.case)
    store = precision(dtype or next(t.dtype for key, t in stage.dense.items() if key.endswith(".weight")))
    left = iter(chosen)
    return lambda value, error: quantizer.budget(value, error, settings, store, next(left, None))


def chosen(stage: Stage) -> dict[str, Any]:
    """Return what the last requantization of each targeted layer has chosen of its grid; None where nothing was."""
    quantizer = quantizers.load(stage.case.sweep.quantizer)
    return {name: quantizer.chosen(stage.attached.base_layer(name)) for name in stage.targeted}


def coarser(stage: Stage) -> torch.dtype:
    """Return the dtype of coarser precision among those that the dense values have had and have now."""
    tensors = dense(stage)
    now = [] if isinstance(tensors, Measurement) else [t.dtype for key, t in tensors.items() if key.endswith(".weight")]
    return max(
        {*now, *(t.dtype for key, t in stage.dense.items() if key.endswith(".weight"))}, key=lambda d: precision(d).u
    )


def readable(stage: Stage) -> bool:
    """Return whether the library's own dequantization follows the grid, and every adapter is where it should be.

    Else only `quantize.decoded` and `quantize.attached` speak.
    """
    return placed(stage) and decoding(stage).holds


def placed(stage: Stage) -> bool:
    """Return whether every adapter has its tensors on every layer that it targets."""
    return all(stage.complete(name) for name in stage.targeted)


def dense(stage: Stage) -> dict[str, Tensor] | Measurement:
    """Return the dense values that are there now, or that a layer can no longer be read."""
    try:
        return stage.attached.base_values()
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
        return broken(
            ":weight", "unreadable", f"the quantizer can no longer read the layer: {type(error).__name__}: {error}"
        )


def within(stage: Stage, forms: Base) -> bool:
    """Return whether everything stays clear of overflow, in the base's dtype and inside the quantizer."""
    limit = quantizers.DECLARED[stage.case.sweep.quantizer].largest / 2
    return stage.sound(*forms.values()) and all(bool((form.ceiling() <= limit).all()) for form in forms.values())


def refusable(stage: Stage, sites: Mapping[str, Sequence[Site]] | None = None) -> bool:
    """Return whether the case merges safely what the quantizer cannot hold, from the values that are there now.

    A safe merge is then refused rightly: by the adapter that overflows, or by the next, which finds infinities where
    that one went unseen (`quantize.rejects` judges it). Laws that merely merge have nothing to say. `sites`: where
    the adapters hold other values than at the start.
    """
    if not stage.case.safe:
        return False
    tensors = dense(stage)
    if isinstance(tensors, Measurement):
        return False  # for the law to tell
    for name in stage.targeted:
        held = {key: tensors.get(f"{name}.{key}") for key in stage.base(name)}  # a merge may have dropped the bias
        now = {key: leaf(tensor, stage.machine.exact) for key, tensor in held.items() if tensor is not None}
        base = {**stage.base(name), **now}
        own = stage.sites(name) if sites is None else sites[name]
        made = (stage.merge_of(own[: count + 1], base) for count in range(len(own)))
        if not all(within(stage, forms) for forms in made):
            return True
    return False


def merged(stage: Stage, name: str, chosen: Sequence[Any] = ()) -> Base | None:
    """Return the merged tensors of a layer with what the grid may cost; None where something may overflow."""
    if stage.formula.merge_many is not None and len(stage.sites(name)) > 1:
        return None  # what a second such adapter makes of requantized weights no formula says
    forms = quantized.merged(
        stage.machine, stage.formula, stage.sites(name), stage.base(name), rule(stage, coarser(stage), chosen)
    )
    return forms if within(stage, forms) else None


def judge(stage: Stage, expected: dict[str, Base | None]) -> Measurement | None:
    """Compare the dense values that are there now with those expected."""
    tensors = dense(stage)
    if isinstance(tensors, Measurement):
        return tensors
    found = [
        compare(
            f"{name}:{tensor}", tensors[f"{name}.{tensor}"], form.value, judged(form, machine=stage.machine.base.store)
        )
        for name, forms in expected.items()
        for tensor, form in (forms or {}).items()
    ]
    return worst(found) if found else None


def decoding(stage: Stage) -> Measurement:
    """Compare the library's dequantization of what is stored now with the independent one."""
    quantizer = quantizers.load(stage.case.sweep.quantizer)
    found = []
    for spec in stage.case.layers:
        layer = stage.attached.base_layer(spec.name)
        form = quantizer.decoded(layer)
        with torch.no_grad():
            found.append(compare(f"{spec.name}:dequantized", quantizer.values(layer), form.value, judged(form)))
    return worst(found)


def requantizes(variant: Variant) -> bool:
    """Return whether the method changes weights: biases are not quantized."""
    return variant.formula != "bias"


@law(
    "quantize.decoded",
    "abs(the library's dequantization - code x scale) <= the roundings on the way",
    (),
    "bitsandbytes reads each row's scales from its own blocks on AVX512 CPUs: rows shorter than a block come out wrong",
    structural=True,
)
def decoded(stage: Stage) -> Measurement | None:
    """Decode codes and scales outside the library, and compare."""
    return decoding(stage)


@law(
    "quantize.attached",
    "every adapter has its tensors on every quantized layer that it targets, and exporting merges as many as merging",
    (Op.MERGE, Op.EXPORT),
    "a second adapter on a quantized layer wrapped the first one's wrapper instead of joining it",
    structural=True,
)
def attached(stage: Stage) -> Measurement | None:
    """Look for each adapter's tensors where it was asked to adapt; of several on a layer, export and merge all."""
    for name in stage.targeted:
        if not stage.complete(name):
            held = "; ".join(
                f"'{stage.names[i]}' {', '.join(sorted(stage.site(i, name).tensors)) or 'none'}"
                for i in stage.adapters_on(name)
            )
            return broken(
                f"{name}:adapter", "lost", f"an adapter on {name} lacks tensors that another has there: {held}"
            )
    several = [name for name in stage.targeted if len(stage.adapters_on(name)) > 1]
    return _exported(stage, several) if several else identical(":adapter", torch.zeros(()), torch.zeros(()))


def _exported(stage: Stage, names: list[str]) -> Measurement:
    """Compare bit for bit what exporting makes of layers with several adapters and what merging does."""
    stage.attached.merge(stage.names, safe=False)
    merged = dense(stage)
    stage.put_back()
    if isinstance(merged, Measurement):
        return merged
    model = stage.attached.merge_and_unload(safe=False, adapters=stage.names)
    quantizer = quantizers.load(stage.case.sweep.quantizer)
    for name in names:
        with torch.no_grad():
            left = quantizer.values(model.get_submodule(name))
        if not torch.equal(left.nan_to_num(), merged[f"{name}.weight"].nan_to_num()):  # what overflowed did so twice
            note = f"merge_and_unload() leaves other values on {name} than merging all {len(stage.names)} adapters"
            return broken(f"{name}:adapter", "lost", note)
    return identical(":adapter", torch.zeros(()), torch.zeros(()))


@law(
    "quantize.merge_budget",
    "abs(DQ(merged) - (DQ(W) + D)) <= b(T) + roundings of the merge",
    (Op.MERGE,),
    "a warning of 'rounding errors' is all that users get; this is what the grid makes unavoidable",
)
def merge_budget(stage: Stage) -> Measurement | None:
    """Merge all adapters and compare with the closed form, each merge requantized."""
    if not readable(stage) or refusable(stage):
        return None
    merge_all(stage)
    grids = chosen(stage)
    return judge(stage, {name: merged(stage, name, [grids[name]]) for name in stage.targeted})


@law(
    "quantize.effect",
    "where abs(D) exceeds what the grid can swallow, the merge moves the weights",
    (Op.MERGE,),
    "merging into optimum-quanto's tensors went through and changed nothing",
    concerns=requantizes,
)
def effect(stage: Stage) -> Measurement | None:
    """Merge, and look whether anything moved on a layer where the grid cannot have swallowed the change."""
    if not readable(stage) or refusable(stage):
        return None
    merge_all(stage)
    tensors = dense(stage)
    if isinstance(tensors, Measurement):
        return tensors
    found, grids = [], chosen(stage)
    for name in stage.targeted:
        forms = merged(stage, name, [grids[name]])
        if forms is None or "weight" not in forms:
            continue
        start, now = stage.dense[f"{name}.weight"], tensors[f"{name}.weight"]
        due = (forms["weight"].value - start.double()).abs() > forms["weight"].bound
        if not bool(due.any()):
            continue  # below the step: the grid may swallow all of it
        if now.shape == start.shape and bool((now == start).all()):
            share = 100 * float(due.double().mean())
            found.append(
                broken(f"{name}:weight", "discarded", f"no value changed, though {share:.0f} % of them had to")
            )
        else:
            found.append(identical(f"{name}:weight", torch.zeros(()), torch.zeros(())))
    return worst(found) if found else None
