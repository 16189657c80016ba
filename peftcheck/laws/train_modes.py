"""What differs from row to row and from mode to mode: dropout, and an adapter per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck import models
from peftcheck.case import EMBEDDINGS, LayerSpec
from peftcheck.implementation import BASE, Op
from peftcheck.law import law
from peftcheck.laws.merge import merge_all
from peftcheck.laws.plain import forward_holds, merge_holds, merged_as_due
from peftcheck.laws.train import drops
from peftcheck.measurement import NOTHING, Measurement, broken, compare, worst
from peftcheck.oracle.layers import layer_output
from peftcheck.recording import Record
from peftcheck.rounding import Bounded, judged
from peftcheck.stage import Stage

_CHANCE = 2.0**-40  # that working dropout is mistaken for none, per layer


@law(
    "train.dropout",
    "with dropout p > 0 outputs vary in training, are the closed form in evaluation, and so are weights merged in training",
    (Op.FORWARD,),
    "an (IA)^3 whose dropout option was never read; LoRA dropout left active by a merge in training mode",
    concerns=lambda variant: "dropout" in variant.options,
    logic=True,
    on="methods",
)
def dropout(stage: Stage) -> Measurement | None:
    """Run in training mode under several seeds, then in evaluation, then merge in training mode.

    Where p = 0, training mode computes the closed form. Else: a layer whose adapters move some output by more than
    fan-in times its bound has an element of its input (or a factor of its change) that alone moves it visibly. That one
    is dropped with probability p, so K outputs all agree with probability at most max(p, 1 - p)^(K - 1): K is chosen
    to make that less than 2^-40, and the drawing stops at the first output that differs.
    """
    if not stage.outputs_count:
        return None
    if not forward_holds(stage):
        return NOTHING
    probability, x = drops(stage), stage.inputs
    if stage.variant.samples and probability == 0:
        return None  # by design no output in training is the closed form
    if stage.case.whole:
        return _of_a_model(stage, probability)
    forms = {name: stage.output(name, x[name]) for name in stage.targeted}
    stage.attached.train(True)
    if probability == 0:
        return worst(_compared(stage, _run(stage), forms))
    pending = {name for name, form in forms.items() if _visible(stage, name, form)}
    if not pending:
        return None
    frozen = _frozen(stage, pending, probability)
    stage.attached.train(False)
    found = [frozen, *_compared(stage, _run(stage), forms)]
    if stage.can(Op.MERGE) and stage.finite and merge_holds(stage):
        stage.attached.train(True)
        merge_all(stage)
        found.append(merged_as_due(stage))
    return worst(found)


def _of_a_model(stage: Stage, probability: float) -> Measurement | None:
    """Do the same in a whole model, where a layer's output varies with what comes to it: of the first that is adapted.

    What an adapter makes of its input is there the difference between the first that comes out of a layer and the first
    that comes in (see `Watches`).
    """
    name = stage.targeted[0]
    if probability == 0:
        stage.attached.train(True)
        return worst(_judged(stage))
    seen = stage.records()[name]
    form = stage.output(name, seen.x)
    if seen.y.dim() == stage.pristine_outputs[name].dim():
        return None
    moved = (form.value[0] - seen.x[0].double()).abs() > 4 * stage.spec(name).fan_in * form.bound[0]
    if not stage.sound(form) or not bool(moved.any()):
        return None
    stage.attached.train(True)
    varies = _varying(lambda seed, layers: {name: _seeded_run(stage, seed)[name].y[0]}, {name}, probability)
    stage.attached.train(False)
    return worst([varies, *_judged(stage)])


def _judged(stage: Stage) -> list[Measurement]:
    """Compare the output of each adapted layer, on the input that it has as the model stands now."""
    seen = stage.run()
    forms = {name: stage.output(name, seen[name].x) for name in stage.targeted}
    return _compared(stage, {name: seen[name].y for name in forms}, forms)


def _seeded_run(stage: Stage, seed: int) -> dict[str, Record]:
    torch.default_generator.manual_seed((stage.case.values + seed) % 2**63)
    return stage.run()


def _run(stage: Stage) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = stage.attached.forward([stage.inputs[spec.name] for spec in stage.case.layers])
    return {spec.name: output for spec, output in zip(stage.case.layers, outputs, strict=True)}


def _compared(stage: Stage, outputs: Mapping[str, Tensor], forms: Mapping[str, Bounded]) -> list[Measurement]:
    return [
        compare(f"{name}:output", outputs[name], form.value, judged(form, machine=stage.machine.base.store))
        for name, form in forms.items()
        if stage.sound(form)
    ]


def _visible(stage: Stage, name: str, form: Bounded) -> bool:
    """Return whether what the adapters make of the input moves an output by much more than its bound.

    What they make of a zero input (a bias) is no matter of the input, and is not dropped with it.
    """
    spec, x = stage.spec(name), stage.activation(name, stage.inputs[name])
    moved = form.value - _undropped(stage, name, x)
    if spec.kind not in EMBEDDINGS:
        nothing = stage.activation(name, torch.zeros_like(stage.inputs[name]))
        constant = stage.formula.forward(stage.machine, stage.sites(name), stage.base(name), nothing).value
        moved = moved - (constant - _undropped(stage, name, nothing))
    return stage.sound(form) and bool((moved.abs() > 4 * spec.fan_in * form.bound).any())


def _undropped(stage: Stage, name: str, x: Bounded) -> Tensor:
    """Return the layer's output without the part of the change that dropout acts on."""
    base = stage.base(name)
    if not stage.variant.dropped:
        return layer_output(stage.machine.base, stage.spec(name), base, x).value
    without = [
        replace(
            site,
            tensors={
                role: replace(t, value=torch.zeros_like(t.value)) if role in stage.variant.dropped else t
                for role, t in site.tensors.items()
            },
        )
        for site in stage.sites(name)
    ]
    return stage.formula.forward(stage.machine, without, base, x).value


def _frozen(stage: Stage, pending: set[str], probability: float) -> Measurement:
    """Return a violation for the first layer whose outputs are the same under every seed."""
    return _varying(lambda seed, layers: _seeded(stage, seed, layers), pending, probability)


def _varying(draw: Callable[[int, set[str]], dict[str, Tensor]], pending: set[str], probability: float) -> Measurement:
    """Draw outputs of the layers that are still the same under every seed, until none is."""
    tries = 2 + math.ceil(math.log(_CHANCE) / math.log(max(probability, 1 - probability)))
    first = draw(0, pending)
    for seed in range(1, tries):
        now = draw(seed, pending)
        pending = {name for name in pending if torch.equal(now[name], first[name])}
        if not pending:
            return NOTHING
    return broken(
        f"{min(pending)}:output", "dropout idle", f"{tries} outputs in training are equal at dropout {probability}"
    )


def _seeded(stage: Stage, seed: int, layers: set[str]) -> dict[str, Tensor]:
    """Return the outputs of these layers alone: an idle dropout takes hundreds of runs to convict."""
    torch.default_generator.manual_seed((stage.case.values + seed) % 2**63)
    return {name: stage.call(name, stage.inputs[name]) for name in sorted(layers)}


@law(
    "train.mixed_batch",
    "abs(output of a row - closed form of the row's own adapter) <= running error bound; '__base__' rows are the base's",
    (Op.FORWARD, Op.MIXED_BATCH),
    "rows computed by the adapter of another row; names of adapters that a layer lacks",
    logic=True,
)
def mixed_batch(stage: Stage) -> Measurement | None:
    """Run a batch with an adapter per row, in an order that comes back to the first, and judge row by row.

    What an adapter adds to its rows is cast to the dtype of the output that it is put into: one rounding of the change.
    """
    if not stage.outputs_count or _experts(stage):
        return None
    if not forward_holds(stage):
        return NOTHING
    rows = mixed_rows(stage)
    inputs = mixed_inputs(stage, len(rows))
    with torch.no_grad():
        outputs = stage.attached.forward([inputs[spec.name] for spec in stage.case.layers], rows)
    found = []
    for spec, output in zip(stage.case.layers, outputs, strict=True):
        for adapter in dict.fromkeys(rows):
            own = [row for row, name in enumerate(rows) if name == adapter]
            form = of_rows(stage, spec, adapter, inputs[spec.name][own])
            if stage.sound(form):
                plain = of_rows(stage, spec, BASE, inputs[spec.name][own])
                change = (form.value - plain.value).abs() + form.bound
                cast = stage.machine.base.store.roundoff * change if stage.machine.mixed else 0.0
                budget = judged(form, machine=stage.machine.base.store) + cast
                role = f"{spec.name}:row of {'the base' if adapter == BASE else 'an adapter'}"
                found.append(compare(role, output[own], form.value, budget))
    return worst(found) if found else None


def _experts(stage: Stage) -> bool:
    """Return whether a layer's first dimension is one of experts rather than of rows."""
    return any(spec.kind == "parameter" and spec.depth for spec in stage.case.layers)


def mixed_rows(stage: Stage) -> tuple[str, ...]:
    """Return the adapter of each row: all of them, the base in between, and the first once more at the end."""
    return (*stage.names, BASE, stage.names[0])


def mixed_inputs(stage: Stage, rows: int) -> dict[str, Tensor]:
    """Return inputs of as many rows, whatever the batch of the case; the further dimensions stay."""
    return models.inputs(replace(stage.case, batch=(rows, *stage.case.batch[1:])))


def of_rows(stage: Stage, spec: LayerSpec, adapter: str, x: Tensor) -> Bounded:
    """Return the closed form of a layer for rows of one adapter, or of the base."""
    base, given = stage.base(spec.name), stage.activation(spec.name, x)
    index = stage.names.index(adapter) if adapter != BASE else None
    if index is None or index not in stage.adapters_on(spec.name):
        return layer_output(stage.machine.base, spec, base, given)
    return stage.formula.forward(stage.machine, stage.sites(spec.name, (index,)), base, given)
