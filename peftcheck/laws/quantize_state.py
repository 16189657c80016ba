"""What a merge into codes has to keep and announce; and that quantized layers run forward, backward and again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftcheck import quantizers
from peftcheck.budgets import quantized
from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.laws.merge import merge_all
from peftcheck.laws.quantize import chosen, coarser, judge, placed, readable, refusable, requantizes, rule, within
from peftcheck.measurement import NOTHING, Measurement, broken, compare, identical, worst
from peftcheck.oracle import FORMULAS, Base
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import precision
from peftcheck.stage import Stage


def facts(stage: Stage) -> dict[str, dict]:
    """Return what a merge has to keep, by layer."""
    quantizer = quantizers.load(stage.case.sweep.quantizer)
    return {spec.name: quantizer.facts(stage.attached.base_layer(spec.name)) for spec in stage.case.layers}


@law(
    "quantize.state_kept",
    "kind, block size, dtypes, flags and sharing of the quantized state are the same after merge and after unmerge",
    (Op.MERGE,),
    "an fp32 adapter turns a bfloat16 layer's state into float32; a scale that still hangs on the adapter's graph",
    structural=True,
)
def state_kept(stage: Stage) -> Measurement | None:
    """Compare every fact of the quantized layers before and after."""
    if not placed(stage) or refusable(stage):
        return None
    before, biases = facts(stage), _biases(stage)
    merge_all(stage)
    found = changed(before, facts(stage), biases, _biases(stage), "merge")
    if found.holds and stage.can(Op.UNMERGE):
        stage.attached.unmerge()
        found = changed(before, facts(stage), biases, _biases(stage), "unmerge")
    return found


def _biases(stage: Stage) -> dict[str, tuple]:
    held = {key: t for key, t in stage.attached.base_tensors().items() if key.endswith(".bias")}
    return {key: (t.dtype, tuple(t.shape), t.requires_grad) for key, t in held.items()}


def changed(before: dict, after: dict, biases: dict, biases_after: dict, what: str) -> Measurement:
    """Compare facts and biases before and after `what`."""
    for name, own in before.items():
        for fact, value in own.items():
            now = after[name].get(fact)
            if now != value:
                return broken(f"{name}:{fact}", "changed", f"{fact} of {name} is {now} after {what}, was {value}")
    if biases != biases_after:
        return broken(":bias", "changed", f"biases are {biases_after} after {what}, were {biases}")
    return NOTHING


@law(
    "quantize.warns",
    "every merge that requantizes says that it rounds",
    (Op.MERGE,),
    "bitsandbytes' LoRA warns, the newer backends requantize in silence",
    structural=True,
    concerns=requantizes,
)
def warns(stage: Stage) -> Measurement | None:
    """Merge, and look for a warning that speaks of rounding."""
    if not placed(stage) or refusable(stage):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge_all(stage)
    if any("round" in str(one.message) for one in caught):
        return NOTHING
    return broken(":warning", "silent", f"merging into {stage.case.sweep.quantizer} requantized without a warning")


def _runs(stage: Stage) -> bool:
    settings = quantizers.settings_of(stage.case)
    return all(quantizers.forwards(stage.case.sweep.quantizer, spec, settings) for spec in stage.case.layers)


@law(
    "quantize.backward",
    "after a forward in train mode every trainable tensor gets a finite gradient, and no code moves",
    (Op.FORWARD,),
    "an addition in place to the output of a custom autograd function; the defensive clone of 4-bit layers",
    structural=True,
)
def backward(stage: Stage) -> Measurement | None:
    """Run forward and backward in train mode with an input that wants a gradient.

    Once more without adapters: a layer that passes no gradient on by itself, layers before it learn from the adapter's
    share alone.
    """
    if not _runs(stage) or not placed(stage):
        return None
    stage.attached.train(True)
    inputs = [stage.inputs[spec.name].detach().clone().requires_grad_(True) for spec in stage.case.layers]
    outputs = stage.attached.forward(inputs)
    sane = stage.case.profile == "normal" and all(bool(torch.isfinite(output).all()) for output in outputs)
    # a loss whose gradient at the outputs is at most 2 / n: a larger one overflows half precision by itself
    largest = [1 + output.detach().float().abs().max() for output in outputs]
    loss = sum((y.float() / top).square().mean() for y, top in zip(outputs, largest, strict=True))
    if not loss.requires_grad:
        return broken(":input", "no gradient", "no output of an adapted layer has a gradient")
    loss.backward()
    found = []
    for adapter in stage.names[:1]:
        wanted = stage.attached.trainable(adapter)
        for (site, role), tensor in stage.attached.adapter_tensors(adapter).items():
            if (site, role) not in wanted:
                continue
            if tensor.grad is None:
                found.append(broken(f"{site}:{role}", "no gradient", f"{role} of '{adapter}' got no gradient"))
            elif not bool(torch.isfinite(tensor.grad).all()) and bool(torch.isfinite(tensor).all()) and sane:
                found.append(
                    broken(f"{site}:{role}", "non-finite", f"the gradient of {role} of '{adapter}' is not finite")
                )
    if any(x.grad is None for x in inputs):
        found.append(broken(":input", "no gradient", "the input of a layer got no gradient"))
    with stage.attached.disabled():
        alone = stage.attached.forward([x.detach().requires_grad_(True) for x in inputs])
    if not all(output.requires_grad for output in alone):
        found.append(broken(":input", "no gradient", "without its adapter a layer passes no gradient on to its input"))
    tensors = stage.attached.base_tensors()
    found += [
        identical(f":{key.rpartition('.')[2]}", tensors[key], t, "moved by a training step")
        for key, t in stage.start.items()
    ]
    return worst(found)


@law(
    "quantize.forward",
    "abs(adapted(x) - closed form(x), the quantized layer's own W x in it) <= running error bound",
    (Op.FORWARD,),
    "adapters that read the codes of a layer, or a weight that the layer's own forward has repacked",
    concerns=lambda variant: _follows(variant.formula),
)
def forward(stage: Stage) -> Measurement | None:
    """Compare each adapted layer with the closed form in which W x is what the quantized layer alone makes of it.

    How the quantized layer computes W x (activations in 8 bits, weights in half precision) is its own affair: it is
    off by some r, known from a run with adapters disabled, that the method passes on times its gain.
    """
    if not _runs(stage) or not readable(stage) or not _follows(stage.variant.formula):
        return None
    with torch.no_grad(), stage.attached.disabled():
        outputs = stage.attached.forward([stage.inputs[spec.name] for spec in stage.case.layers])
    alone = {spec.name: output.double() for spec, output in zip(stage.case.layers, outputs, strict=True)}
    found = []
    for name, seen in stage.records().items():
        gain = _gain(stage, name)
        if gain is None:
            continue
        m, x, spec, base = stage.machine, stage.activation(name, seen.x), stage.spec(name), stage.base(name)
        adapted, plain = stage.output(name, seen.x), layer_output(m.base, spec, base, x)
        if not stage.sound(adapted, plain):
            continue
        aside = gain * (alone[name] - plain.value)
        parts = [(stage.output(name, seen.x, (i,)).value - plain.value).abs() for i in stage.adapters_on(name)]
        # each part may be rounded to the base's dtype before it is added, and every partial sum after
        size = gain.abs() * alone[name].abs() + alone[name].abs() + sum(parts)
        room = adapted.bound + (len(parts) + 2) * (m.base.store.roundoff * size + m.base.store.eta)
        # a method may also multiply with the dense weight itself instead of asking the layer
        ways = [
            compare(f"{name}:output", seen.y, adapted.value + aside, room),
            compare(f"{name}:output", seen.y, adapted.value, room),
        ]
        found.append(min(ways, key=lambda m: (math.isnan(m.ratio), m.ratio)))
    return worst(found) if found else None


def _follows(formula: str) -> bool:
    """Return whether the method adds to W x, or (DoRA) scales it by rows too: then what W x is off by is followed."""
    return FORMULAS[formula].delta is not None or formula == "dora"


def _gain(stage: Stage, name: str) -> Tensor | None:
    """Return the factor of each output that the method multiplies W x with; None where there are several in a row."""
    if stage.formula.delta is not None:
        return torch.ones(stage.spec(name).n_out, dtype=torch.float64)
    sites = stage.sites(name)
    if len(sites) > 1:
        return None
    turned = stage.base(name)["weight"].value + FORMULAS["lora"].delta(stage.machine, sites[0])["weight"].value
    return torch.linalg.vector_norm(stage.merged(name)["weight"].value, dim=1) / torch.linalg.vector_norm(turned, dim=1)


@law(
    "quantize.repeats",
    "a second forward on the same input gives the same bits",
    (Op.FORWARD,),
    "DoRA put the int8 weight back without its scales: the second forward on a CPU crashed",
    structural=True,
)
def repeats(stage: Stage) -> Measurement | None:
    """Run the adapted model twice."""
    if not _runs(stage) or not readable(stage):
        return None
    inputs = [stage.inputs[spec.name] for spec in stage.case.layers]
    with torch.no_grad():
        first = [output.clone() for output in stage.attached.forward(inputs)]
        second = stage.attached.forward(inputs)
    names = [spec.name for spec in stage.case.layers]
    return worst(identical(f"{name}:output", b, a) for name, a, b in zip(names, first, second, strict=True))


@law(
    "quantize.after_forward",
    "a merge after a forward is within the budget of a merge before it",
    (Op.FORWARD, Op.MERGE),
    "a forward in eval mode repacks 4-bit weights on CPUs with AVX512-BF16; the merge reads them in another order",
)
def after_forward(stage: Stage) -> Measurement | None:
    """Run one plain forward, merge, and compare with the closed form on the weights as they were.

    Where the forward stores the block scales in bfloat16, as the repacked layout does, W may have moved by 2^-8 of it.
    """
    if not _runs(stage) or not readable(stage) or refusable(stage):
        return None
    with torch.no_grad():
        stage.attached.forward([stage.inputs[spec.name] for spec in stage.case.layers])
    merge_all(stage)
    grids = chosen(stage)
    return judge(stage, {name: expected_after_forward(stage, name, [grids[name]]) for name in stage.targeted})


def expected_after_forward(stage: Stage, name: str, chosen: Sequence[Any] = ()) -> Base | None:
    """Return the tensors that a merge after a forward changes, with their bounds; None where no formula says."""
    base = stage.base(name)
    if stage.case.sweep.quantizer.startswith("bitsandbytes.") and "int8" not in stage.case.sweep.quantizer:
        room = 2.02 * precision(torch.bfloat16).u * base["weight"].value.abs()
        base = {**base, "weight": base["weight"].widened(room)}
    if stage.formula.merge_many is not None and len(stage.sites(name)) > 1:
        return None
    made = quantized.merged(stage.machine, stage.formula, stage.sites(name), base, rule(stage, coarser(stage), chosen))
    return made if within(stage, made) else None
