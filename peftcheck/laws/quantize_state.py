"""What a merge into codes has to keep, refuse and announce; and that gradients flow through quantized layers."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from peftcheck import quantizers
from peftcheck.budgets import quantized
from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.laws.merge import merge_all
from peftcheck.laws.quantize import coarser, judge, placed, readable, rule, within
from peftcheck.laws.safe_merge import attempt
from peftcheck.measurement import NOTHING, Measurement, broken, compare, identical, worst
from peftcheck.oracle import FORMULAS, Base, Site
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import precision
from peftcheck.stage import Stage


def _facts(stage: Stage) -> dict[str, dict]:
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
    if not placed(stage):
        return None
    before, biases = _facts(stage), _biases(stage)
    merge_all(stage)
    found = _changed(before, _facts(stage), biases, _biases(stage), "merge")
    if found.holds and stage.can(Op.UNMERGE):
        stage.attached.unmerge()
        found = _changed(before, _facts(stage), biases, _biases(stage), "unmerge")
    return found


def _biases(stage: Stage) -> dict[str, tuple]:
    held = {key: t for key, t in stage.attached.base_tensors().items() if key.endswith(".bias")}
    return {key: (t.dtype, tuple(t.shape), t.requires_grad) for key, t in held.items()}


def _changed(before: dict, after: dict, biases: dict, biases_after: dict, what: str) -> Measurement:
    for name, facts in before.items():
        for fact, value in facts.items():
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
)
def warns(stage: Stage) -> Measurement | None:
    """Merge, and look for a warning that speaks of rounding."""
    if not placed(stage):
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
    """Run forward and backward in train mode with an input that wants a gradient."""
    if not _runs(stage) or not placed(stage):
        return None
    stage.attached.train(True)
    inputs = [stage.inputs[spec.name].detach().clone().requires_grad_(True) for spec in stage.case.layers]
    outputs = stage.attached.forward(inputs)
    sum(output.float().square().sum() for output in outputs).backward()
    found = []
    for adapter in stage.names[:1]:
        wanted = stage.attached.trainable(adapter)
        for (site, role), tensor in stage.attached.adapter_tensors(adapter).items():
            if (site, role) not in wanted:
                continue
            if tensor.grad is None:
                found.append(broken(f"{site}:{role}", "no gradient", f"{role} of '{adapter}' got no gradient"))
            elif (
                not bool(torch.isfinite(tensor.grad).all())
                and bool(torch.isfinite(tensor).all())
                and stage.case.profile == "normal"
            ):
                found.append(
                    broken(f"{site}:{role}", "non-finite", f"the gradient of {role} of '{adapter}' is not finite")
                )
    if any(x.grad is None for x in inputs):
        found.append(broken(":input", "no gradient", "the input of a layer got no gradient"))
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
    if not _runs(stage) or not readable(stage):
        return None
    with torch.no_grad():
        stage.attached.forward([stage.inputs[spec.name] for spec in stage.case.layers])
    merge_all(stage)
    forms: dict[str, Base | None] = {}
    for name in stage.targeted:
        base = stage.base(name)
        if stage.case.sweep.quantizer.startswith("bitsandbytes.") and "int8" not in stage.case.sweep.quantizer:
            base = {
                **base,
                "weight": base["weight"].widened(2.02 * precision(torch.bfloat16).u * base["weight"].value.abs()),
            }
        if stage.formula.merge_many is not None and len(stage.sites(name)) > 1:
            continue
        made = quantized.merged(stage.machine, stage.formula, stage.sites(name), base, rule(stage, coarser(stage)))
        forms[name] = made if within(stage, made) else None
    return judge(stage, forms)


@dataclass(frozen=True)
class _Poisoned:
    adapter: int
    site: str
    role: str
    verdict: str
    sites: dict[str, Site]


def _administer(stage: Stage) -> _Poisoned | None:
    """Poison one element of one tensor; 'overflow' exceeds what the quantizer can hold, not only the base's dtype."""
    poison = stage.case.poison
    adapter = poison.adapter % len(stage.names)
    own = [name for name in stage.targeted if adapter in stage.adapters_on(name)]
    name = own[poison.target % len(own)]
    tensors = stage.attached.adapter_tensors(stage.names[adapter])
    keys = sorted(key for key, t in tensors.items() if key[0] == name and t.is_floating_point() and t.numel())
    if not keys:
        return None
    key = keys[poison.tensor % len(keys)]
    tensor, limit = tensors[key], _limit(stage)
    at = torch.unravel_index(torch.tensor(poison.element % tensor.numel()), tensor.shape)
    numbers = {"overflow": min(64 * limit, precision(tensor.dtype).largest * 0.9), "tame": 16.0}
    with torch.no_grad():
        tensor[tuple(at)] = numbers[poison.value] if poison.value in numbers else float(poison.value)
    after = {k: t.detach().clone() for k, t in stage.attached.adapter_tensors(stage.names[adapter]).items()}
    sites = {site: stage.site_of(adapter, site, after) for site in own}
    made = {site: stage.merge_of([one], stage.base(site)) for site, one in sites.items()}
    verdicts = {site: _verdict(limit, forms) for site, forms in made.items()}
    refusing = next((site for site, verdict in verdicts.items() if verdict == "refuse"), None)
    tame = poison.value == "tame" and all(v == "accept" for v in verdicts.values())
    verdict = "refuse" if refusing else "accept" if tame else "open"
    return _Poisoned(adapter, refusing or name, key[1], verdict, sites)


def _limit(stage: Stage) -> float:
    return min(stage.machine.base.store.largest, quantizers.DECLARED[stage.case.sweep.quantizer].largest)


def _verdict(limit: float, forms: Base) -> str:
    if any(not bool(torch.isfinite(f.value).all()) or bool((f.value.abs() > 2 * limit).any()) for f in forms.values()):
        return "refuse"
    return "accept" if all(bool((f.ceiling() < limit / 2).all()) for f in forms.values()) else "open"


@law(
    "quantize.rejects",
    "a safe merge that the grid cannot hold is refused, every finite one is accepted and within the budget",
    (Op.SAFE_MERGE,),
    "the finiteness check sits before the quantizer's own cast to half precision: int8 weights overflow unseen",
)
def rejects(stage: Stage) -> Measurement | None:
    """Poison one tensor, merge safely, and compare the decision with the oracle's."""
    poisoned = _administer(stage) if readable(stage) else None
    if poisoned is None:
        return None
    name = stage.names[poisoned.adapter]
    error = attempt(stage, lambda: stage.attached.merge((name,), safe=True))
    where = f"{poisoned.site}:{poisoned.role}"
    what = f"{stage.case.poison.value} in {poisoned.role} of '{name}' at {poisoned.site}"
    if poisoned.verdict == "refuse":
        return (
            NOTHING
            if error
            else broken(where, f"accepted {stage.case.poison.value}", f"{what}: safe_merge accepted it")
        )
    if error is not None:
        return (
            broken(where, "refused", f"{what}: refused though the merge is finite: {error}")
            if poisoned.verdict == "accept"
            else None
        )
    if poisoned.verdict == "open":
        return None
    forms = {
        site: quantized.merged(stage.machine, stage.formula, (one,), stage.base(site), rule(stage, coarser(stage)))
        for site, one in poisoned.sites.items()
    }
    return judge(stage, {site: made if within(stage, made) else None for site, made in forms.items()})


@law(
    "quantize.atomic",
    "after a refused merge every code, scale and bias of the refusing layer is bit-equal and it is not marked merged",
    (Op.SAFE_MERGE,),
    "weights that are written before the bias is checked; a weight deleted before it is replaced",
)
def atomic(stage: Stage) -> Measurement | None:
    """Provoke a refusal and compare the raw tensors of the refusing layer with their clones."""
    poisoned = _administer(stage) if placed(stage) else None
    if poisoned is None or poisoned.verdict != "refuse":
        return None
    name = stage.names[poisoned.adapter]
    facts = _facts(stage)[poisoned.site]
    if attempt(stage, lambda: stage.attached.merge((name,), safe=True)) is None:
        return NOTHING  # quantize.rejects judges that
    if name in stage.attached.merged().get(poisoned.site, ()):
        return broken(f"{poisoned.site}:module", "marked merged", f"{poisoned.site} is marked merged after a refusal")
    tensors: dict[str, Tensor] = stage.attached.base_tensors()
    found = [
        identical(f"{poisoned.site}:{key[len(poisoned.site) + 1 :]}", tensors[key], start, "written")
        for key, start in stage.start.items()
        if key.startswith(poisoned.site + ".")
    ]
    changed = _changed({poisoned.site: facts}, {poisoned.site: _facts(stage)[poisoned.site]}, {}, {}, "a refused merge")
    return worst([changed, *found])
