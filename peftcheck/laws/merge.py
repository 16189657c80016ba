"""Merging in numbers: the merged weights and outputs, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftcheck import models
from peftcheck.architecture import architecture, difference
from peftcheck.case import LayerSpec
from peftcheck.implementation import Attached, Inverts, Op, Variant
from peftcheck.law import law
from peftcheck.measurement import Measurement, broken, compare, identical, worst
from peftcheck.oracle import FORMULAS
from peftcheck.oracle.layers import layer_output
from peftcheck.recording import Record
from peftcheck.rounding import judged
from peftcheck.stage import Stage


def merge_all(stage: Stage, into: Attached | None = None) -> None:
    """Merge all adapters, in one call or one by one, safely or not, as the case says; of the stage's model, or another."""
    attached = into or stage.attached
    if stage.case.joint or len(stage.names) == 1:
        attached.merge(stage.names, safe=stage.case.safe)
        return
    for name in stage.names:
        attached.merge((name,), safe=stage.case.safe)


@law(
    "merge.forward",
    "abs(adapted(x) - merged(x)) <= bound of either computation, layer by layer on recorded inputs",
    (Op.FORWARD, Op.MERGE),
    "the promise of merging itself; library tests allow up to 0.3 here",
    on="both",
)
def forward(stage: Stage) -> Measurement | None:
    """Give each merged layer the input that it had in the adapted run."""
    if not stage.outputs_count:
        return None
    seen = stage.records()
    merge_all(stage)
    found = []
    for name, one in seen.items():
        adapted, merged = stage.output(name, one.x), stage.merged(name)
        after = layer_output(
            stage.machine.base, stage.spec(name), {**stage.base(name), **merged}, stage.activation(name, one.x)
        )
        if not stage.sound(adapted, after, *merged.values()):
            continue
        found.append(compare(f"{name}:output", stage.call(name, one.x), one.y, adapted.bound + after.bound))
    return worst(found) if found else None


@law(
    "merge.oracle",
    "abs(merged tensor - closed form) <= running error bound",
    (Op.MERGE,),
    "merge and forward can err alike: only a closed form from outside the library tells",
    on="both",
)
def oracle(stage: Stage) -> Measurement | None:
    """Compare every merged tensor with the closed form."""
    merge_all(stage)
    tensors = stage.attached.base_values()
    found = []
    for name in stage.targeted:
        for tensor, form in stage.merged(name).items():
            budget = judged(form, machine=stage.machine.base.store)
            found.append(compare(f"{name}:{tensor}", tensors[f"{name}.{tensor}"], form.value, budget))
    return worst(found) if found else None


@law(
    "merge.delta",
    "abs(reported delta - (merged - base)) <= bound of either",
    (Op.MERGE, Op.DELTA),
    "a reported delta feeds extraction and combination: it must be the one that merging applies",
    concerns=lambda variant: FORMULAS[variant.formula].delta is not None,
    on="both",
)
def delta(stage: Stage) -> Measurement | None:
    """Compare the delta that the library reports for the first adapter with what its merge changes."""
    adapter = stage.names[0]
    reported = {name: stage.attached.delta(name, adapter) for name in stage.targeted if 0 in stage.adapters_on(name)}
    stage.attached.merge((adapter,), safe=stage.case.safe)
    tensors = stage.attached.base_values()
    found = []
    for name, change in reported.items():
        own = stage.spec(name).weight_name
        form = stage.formula.delta(stage.machine, stage.site(0, name))[own]
        merged = stage.merged(name, (0,))[own]
        actual = tensors[f"{name}.{own}"].double() - stage.start[f"{name}.{own}"].double()
        # the fp64 subtraction here rounds too, which only an fp64 base can feel
        here = 2.0**-53 * actual.abs() if merged.error is not None else 0.0
        found.append(compare(f"{name}:delta", change, actual, form.bound + merged.bound + here))
    return worst(found) if found else None


def _inverts(variant: Variant) -> bool:
    return variant.inverts is not Inverts.NEVER


def _restored(stage: Stage, cycles: int) -> Measurement | None:
    tensors = stage.attached.base_values()
    exact = stage.variant.inverts is Inverts.EXACT
    found = []
    for name in stage.targeted:
        forms = stage.merged(name)
        budget, extra = stage.roundtrip(name, cycles=cycles), stage.documented(name, cycles=cycles)
        for tensor in forms:
            key, role = f"{name}.{tensor}", f"{name}:{tensor}"
            allowed = torch.zeros_like(budget[tensor]) if exact else budget[tensor]
            found.append(restored(role, tensors[key], stage.start[key], allowed, extra.get(tensor)))
    found = [one for one in found if one is not None]
    return worst(found) if found else None


def restored(
    role: str, now: Tensor, start: Tensor, allowed: Tensor, documented: Tensor | None = None
) -> Measurement | None:
    """Compare a tensor after a round trip with its start, where there is a way back to speak of; None where nowhere.

    A merge may be singular: of a divisor 1 + A that may have rounded to zero the bound is infinite, and no number, NaN
    included, is wrong there. A bound that is itself NaN is.
    """
    lost = torch.isinf(allowed).broadcast_to(start.shape)
    if lost.numel() and bool(lost.all()):
        return None
    if now.shape == start.shape:
        now, start = torch.where(lost, 0.0, now), torch.where(lost, 0.0, start)
    return compare(role, now, start, allowed, documented)


@law(
    "merge.roundtrip",
    "abs(unmerge(merge(W)) - W) <= bound of the family",
    (Op.MERGE, Op.UNMERGE),
    "(IA)^3 convolution unmerge multiplied the bias by the scale instead of dividing (PEFT 0.6.0 to 0.19.1)",
    concerns=_inverts,
    on="both",
)
def roundtrip(stage: Stage) -> Measurement | None:
    """Merge, unmerge, and compare every tensor with its pristine copy."""
    merge_all(stage)
    stage.attached.unmerge()
    return _restored(stage, 1)


@law(
    "merge.drift",
    "abs((unmerge merge)^k(W) - W) <= bounds of k round trips, each from where the last one ended",
    (Op.MERGE, Op.UNMERGE),
    "weight synchronisation to an inference server merges and unmerges at every step",
    concerns=_inverts,
    on="both",
)
def drift(stage: Stage) -> Measurement | None:
    """Merge and unmerge several times, where that may not end in an overflow."""
    if not stage.recovers(stage.case.cycles):
        return None
    for _ in range(stage.case.cycles):
        merge_all(stage)
        stage.attached.unmerge()
    return _restored(stage, stage.case.cycles)


@law(
    "merge.disable",
    "disabled(x) is the base's output: bit-equal unmerged, within the round trip's effect when merged",
    (Op.FORWARD, Op.DISABLED),
    "a forward with adapters disabled unmerges on the way, silently",
    concerns=lambda variant: not variant.rewrites_base,  # there the pristine output is no reference
    on="both",
)
def disable(stage: Stage) -> Measurement | None:
    """Run with adapters disabled, first as attached, then (where the library merges) merged."""
    found = []
    with stage.attached.disabled():
        seen = stage.run()
    for name, one in seen.items():
        plain = stage.pristine_outputs[name]
        if one.y.shape != plain.shape:
            return broken(f"{name}:output", "shape", f"{tuple(one.y.shape)} where {tuple(plain.shape)} is due")
        if not stage.variant.rewrites_base:
            lost = torch.isnan(plain) & torch.isnan(one.y)  # where the base itself gives no number
            y, due = one.y.masked_fill(lost, 0), plain.masked_fill(lost, 0)
            found.append(compare(f"{name}:output", y, due, torch.zeros((), dtype=torch.float64)))
    if stage.can(Op.MERGE, Op.UNMERGE) and stage.finite:
        merge_all(stage)
        with stage.attached.disabled():
            seen = stage.run()
        found += _disabled_while_merged(stage, seen)
    return worst(found) if found else None


def _disabled_while_merged(stage: Stage, seen: Mapping[str, Record]) -> list[Measurement]:
    """Judge outputs of a model that had to unmerge first: W' differs from W by the round trip at most.

    The output moves by that budget applied to abs(x), and both outputs are rounded: twice the layer's own bound.
    """
    found = []
    if not stage.outputs_count or stage.variant.inverts is Inverts.NEVER or stage.variant.rewrites_base:
        return found
    for name, one in seen.items():
        spec, base = stage.spec(name), stage.base(name)
        moved = {**base, **{tensor: base[tensor].widened(room) for tensor, room in _room(stage, spec).items()}}
        ideal = layer_output(stage.machine.base, spec, base, stage.activation(name, one.x))
        after = layer_output(stage.machine.base, spec, moved, stage.activation(name, one.x))
        # in a whole model the input itself has moved by what the layers before have
        plain = ideal.value if stage.case.whole else stage.pristine_outputs[name]
        if stage.sound(after):  # a round trip that may lead anywhere says nothing of the output
            found.append(compare(f"{name}:output", one.y, plain, ideal.bound + after.bound))
    return found


def _room(stage: Stage, spec: LayerSpec) -> dict[str, Tensor]:
    """Return how far a merge and unmerge may leave each tensor of a layer from where it was, where at all.

    A tied layer moves with the weight that it shares.
    """
    found: dict[str, Tensor] = {}
    for name in (one for one in stage.targeted if one in (spec.name, spec.tied)):
        budget, extra = stage.roundtrip(name), stage.documented(name)
        for tensor, room in budget.items():
            room = room + extra.get(tensor, 0.0)
            if (name == spec.name or tensor == "weight") and bool((room > 0).any()):
                found[tensor] = room
    return found


@law(
    "merge.export",
    "merge_and_unload() and unload() leave the base's architecture; the tensors are the merged ones, the base's",
    (Op.EXPORT,),
    "BEFT changed the architecture of a layer without bias; wrappers left hooks and attributes behind",
    on="both",
)
def export(stage: Stage) -> Measurement | None:
    """Export the merged model and compare types, attributes, hooks, keys, strides and numbers."""
    model = stage.attached.merge_and_unload(safe=stage.case.safe, adapters=stage.names)
    shape = difference(architecture(model), stage.architecture)
    if not shape.holds:
        return shape
    state = models.tensors(model)
    found = []
    for name in stage.targeted:
        for tensor, form in stage.merged(name).items():
            budget = judged(form, machine=stage.machine.base.store)
            found.append(compare(f"{name}:{tensor}", state[f"{name}.{tensor}"], form.value, budget))
    if stage.case.whole:
        changed = merged_keys(stage)
        kept = {**stage.start, **stage.saved()}
        found += [identical(key, state[key], tensor) for key, tensor in kept.items() if key not in changed]
    return worst([shape, *found])


def merged_keys(stage: Stage) -> set[str]:
    """Return the names of the base's tensors that merging all adapters changes, those that share them included."""
    changed = {f"{name}.{tensor}" for name in stage.targeted for tensor in stage.merged(name)}
    for spec in stage.case.layers:
        own, other = f"{spec.name}.weight", f"{spec.tied}.weight"
        if spec.tied and (own in changed or other in changed):
            changed |= {own, other}
    return changed


@law(
    "merge.unload",
    "unload() leaves the base bit for bit, types, attributes and hooks included",
    (Op.UNLOAD,),
    "an export without merge must be the base",
    structural=True,
    on="both",
)
def unload(stage: Stage) -> Measurement | None:
    """Remove the adapters without merging and compare everything with the base."""
    model = stage.attached.unload()
    shape = difference(architecture(model), stage.architecture)
    if not shape.holds:
        return shape
    state = models.tensors(model)
    kept = stage.start if stage.variant.rewrites_base else stage.pristine
    return worst([identical(key, state[key], tensor) for key, tensor in kept.items()])
