"""What a combination leaves alone, what it leaves behind, and what can be done with it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from peftcheck import combination as combining
from peftcheck import refusal
from peftcheck.case import Case
from peftcheck.combination import Combination, Combined
from peftcheck.implementation import Op
from peftcheck.laws.combine_relations import (
    asked_of,
    combining_law,
    comparable,
    has_delta,
    misfit,
    read_all,
)
from peftcheck.measurement import NOTHING, Measurement, broken, compare, identical, worst
from peftcheck.oracle.form import Base, machine
from peftcheck.rounding import judged
from peftcheck.stage import Stage


@combining_law(
    "combine.sources_untouched",
    "tensors, gradients' flags and outputs of the source adapters are bit-equal after combining",
    (Op.COMBINE,),
    "a combination that scales a factor in place spoils the adapter that it came from",
    structural=True,
)
def sources_untouched(stage: Stage) -> Measurement | None:
    """Combine, and compare every adapter that was there before with its clone."""
    asked = asked_of(stage)
    if asked is None:
        return None
    before = {name: stage.attached.trainable(name) for name in stage.names}
    plain = stage.case.setting("merged") is None and stage.can(Op.FORWARD)
    outputs = _outputs(stage) if plain else None
    if not all(
        _as_at_the_start(stage, name) for name in stage.names
    ):  # a forward that writes is the matter of other laws
        stage.put_back()
        outputs = None
    plain = outputs is not None
    combining.combine(stage, asked)
    found = []
    for name in stage.names:
        now = stage.attached.adapter_tensors(name)
        for key, start in stage.start_adapters[name].items():
            label = f"{key[0]}:{key[1]} of the source"
            if key not in now:
                return broken(label, "lost", f"{label} is gone after combining")
            found.append(identical(label, now[key], start))
        if stage.attached.trainable(name) != before[name]:
            found.append(broken("model:source", "requires_grad", f"combining changed what is trained of '{name}'"))
    if plain:
        now = _outputs(stage)
        if now is None:
            return broken("model:output", "crash", "the model cannot run after combining")
        found += [
            identical(f"{s.name}:output", y, was) for s, y, was in zip(stage.case.layers, now, outputs, strict=True)
        ]
    return worst(found)


def _as_at_the_start(stage: Stage, adapter: str) -> bool:
    now = stage.attached.adapter_tensors(adapter)
    return all(key in now and torch.equal(now[key], start) for key, start in stage.start_adapters[adapter].items())


def _outputs(stage: Stage) -> tuple[torch.Tensor, ...] | None:
    """Return the model's outputs, or None where the library cannot run it: that is the matter of other laws."""
    try:
        with torch.no_grad():
            outputs = stage.attached.forward([stage.inputs[spec.name] for spec in stage.case.layers])
    except Exception as error:
        if not refusal.is_library(error, stage.implementation):
            raise
        return None
    return tuple(output.clone() for output in outputs)


@combining_law(
    "combine.base_untouched",
    "the base is bit-equal after combining, merged or not",
    (Op.COMBINE,),
    "the combined adapter is initialised like the first one: an initialisation that takes its part from the base writes there",
    structural=True,
)
def base_untouched(stage: Stage) -> Measurement | None:
    """Combine, also while another adapter is merged, and compare every base tensor with its clone."""
    asked = asked_of(stage)
    if asked is None:
        return None
    merged = stage.case.setting("merged")
    if merged is not None:
        stage.attached.merge((stage.names[merged],))
    before = {key: tensor.detach().clone() for key, tensor in stage.attached.base_tensors().items()}
    merged_before = stage.attached.merged()
    combining.combine(stage, asked)
    kept = {name: adapters for name, adapters in stage.attached.merged().items() if name in merged_before}
    if kept != merged_before:
        return broken("model:base", "unmerged", "the adapter that was merged into the base is merged no longer")
    now = stage.attached.base_tensors()
    return worst([identical(key, now[key], tensor) for key, tensor in before.items()])


@combining_law(
    "combine.rank",
    "the combined adapter has the rank that was asked for, on every layer that a source adapts",
    (Op.COMBINE,),
    "the one property that library tests assert; a declared rank that the tensors do not have cannot be reloaded",
    structural=True,
)
def rank(stage: Stage) -> Measurement | None:
    """Compare declared rank, factors and layers with what was asked for."""
    asked = asked_of(stage)
    if asked is None:
        return None
    made = combining.made(stage, asked)
    wanted, sites = set(combining.layers(stage, asked)), set(made.adapters)
    if sites != wanted:
        return broken("model:layers", "layers", f"combined on {sorted(sites)}, asked on {sorted(wanted)}")
    alone = " of one adapter" if len(asked.members) == 1 else ""
    for layer in sorted(wanted):
        declared = made.adapters[layer].rank
        due = fitting(stage, asked, layer, declared)
        if declared != due:
            return broken("model:rank", f"rank{alone}", f"rank {declared} where {due} was asked for")
        site = combining.combined(stage, made, layer)
        if site is None or not {"A", "B"} <= site.tensors.keys():
            continue
        wrong, rows = misfit(stage, site), site.tensors["A"].value.shape[0]
        if wrong is None and rows != declared:
            wrong = f"the factors have rank {rows}"
        if wrong is not None:
            return broken(f"{layer}:rank", "shape", f"{wrong}, declared is rank {declared}")
    return NOTHING


def fitting(stage: Stage, asked: Combination, layer: str, declared: int) -> int:
    """Return the declared rank if it is one that was asked for, else the one that was.

    Stacked factors may be as many as there are members on the layer, or as all members (zeros in between); of a
    small layer no more singular values need be kept than it has. Kinds that add factors leave the rank to the library.
    """
    due = combining.rank_of(stage, asked)
    if asked.kind.rank == "common":
        return declared
    if asked.kind.rank == "sum":
        here = sum(site.adapter.rank for site in combining.sources(stage, asked, layer)[0])
        return declared if declared == here else due
    weight = combining.total(stage, asked, layer)["weight"].value if stage.formula.delta is not None else None
    sides = due if weight is None else min(weight.shape[0], weight[0].numel())
    return declared if declared == min(due, sides) else due


@combining_law(
    "combine.reload",
    "saved and loaded, the combined adapter adds the same delta bit for bit",
    (Op.COMBINE, Op.SAVE, Op.LOAD),
    "the configuration that is saved must describe the tensors that are: rank, scale, options, dtype",
)
def reload(stage: Stage) -> Measurement | None:
    """Combine, save, load under another name, and compare what both add."""
    asked = asked_of(stage)
    if asked is None:
        return None
    read_all(stage, asked)
    name = combining.combine(stage, asked)
    with tempfile.TemporaryDirectory() as folder:
        stage.attached.save(Path(folder), (name,))
        stored = Path(folder) / name
        stage.attached.load(stored if stored.is_dir() else Path(folder), "reloaded")
    found, spoiled = [], []
    for layer in combining.layers(stage, asked):
        one, other = _own(stage, name, layer), _own(stage, "reloaded", layer)
        if one.keys() != other.keys():
            found.append(broken(f"{layer}:weight", "lost", f"saved {sorted(one)}, loaded {sorted(other)}"))
            continue
        measured = worst(
            [
                compare(f"{layer}:{role}", other[role], t, torch.zeros((), dtype=torch.float64))
                for role, t in one.items()
            ]
        )
        kinds = [_dtypes(tensors) for tensors in (one, other)]
        rounded = all(
            torch.equal(other[role], t.to(other[role].dtype)) for role, t in one.items() if other[role].shape == t.shape
        )
        if not measured.holds and kinds[0] != kinds[1] and rounded:
            measured = replace(
                measured, role=f"{layer}:weight", symptom="dtype", note=f"combined in {kinds[0]}, loaded in {kinds[1]}"
            )
        elif not measured.holds and measured.symptom == "numeric":
            spoiled.append(measured)
            continue
        found.append(measured)
    if spoiled and _survives_alone(stage, name):
        note = "saved without the other adapters in the model it comes back whole"
        spoiled = [
            replace(m, role=f"{m.role.partition(':')[0]}:weight", symptom="not saved", note=note) for m in spoiled
        ]
    return worst([*found, *spoiled])


def _own(stage: Stage, adapter: str, layer: str) -> dict[str, torch.Tensor]:
    return {role: t for (site, role), t in stage.attached.adapter_tensors(adapter).items() if site == layer}


def _survives_alone(stage: Stage, name: str) -> bool:
    """Return whether the combined adapter comes back from a file as it was once the others are deleted."""
    if not stage.can(Op.DELETE):
        return False
    for other in (*stage.names, "reloaded"):
        stage.attached.delete(other)
    with tempfile.TemporaryDirectory() as folder:
        stage.attached.save(Path(folder), (name,))
        stored = Path(folder) / name
        stage.attached.load(stored if stored.is_dir() else Path(folder), "again")
    one, other = stage.attached.adapter_tensors(name), stage.attached.adapter_tensors("again")
    # but for a rounding to another dtype, which is another matter
    return one.keys() == other.keys() and all(
        t.shape == other[key].shape and torch.equal(t.to(other[key].dtype), other[key]) for key, t in one.items()
    )


def _dtypes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))


@combining_law(
    "combine.merge",
    "merging the combined adapter gives base + its delta",
    (Op.COMBINE, Op.MERGE),
    "what is combined is meant to be merged: scale and orientation must survive",
    cases=lambda variant, case: case.setting("merged") is None and comparable(variant, case),
)
def merge(stage: Stage) -> Measurement | None:
    """Combine, activate the result alone, merge it, and compare with the closed form of its own tensors."""
    asked = asked_of(stage)
    if asked is None or stage.case.setting("merged") is not None:
        return None
    read_all(stage, asked)
    made = combining.made(stage, asked)
    forms = {layer: merged_form(stage, made, layer) for layer in combining.layers(stage, asked)}
    if not all(stage.sound(*forms_.values()) for forms_ in forms.values()):
        return None
    name = combining.combine(stage, asked)
    stage.attached.activate((name,))
    stage.attached.merge((name,), safe=stage.case.safe)
    tensors = stage.attached.base_values()
    return worst([
        compare(f"{layer}:{key}", tensors[f"{layer}.{key}"], form.value, judged(form, machine=stage.machine.base.store))
        for layer, layer_forms in forms.items()
        for key, form in layer_forms.items()
    ])  # fmt: skip


def merged_form(stage: Stage, made: Combined, layer: str) -> Base:
    """Return the closed form of the merge, in the dtype that the combined adapter is stored in."""
    stored = next(iter(made.tensors[layer].values())).dtype
    m = machine(stage.machine.base.store.dtype, stored, stage.machine.exact)
    return stage.formula.merge(m, combining.combined(stage, made, layer), stage.base(layer))


def _without_repeats(case: Case) -> bool:
    members = case.setting("members", ())
    return len(set(members)) == len(members)


@combining_law(
    "combine.activated",
    "activating the sources, each scaled by its weight, adds sum w_i D_i: the reference without cross terms",
    (Op.COMBINE, Op.MERGE, Op.RESCALE),
    "whoever needs the exact sum today can have it this way",
    concerns=has_delta,
    cases=lambda variant, case: _without_repeats(case) and comparable(variant, case),
)
def activated(stage: Stage) -> Measurement | None:
    """Scale every source by its weight, merge all of them, and compare with base + sum w_i D_i."""
    asked = asked_of(stage)
    if asked is None or stage.formula.delta is None or len(set(asked.members)) < len(asked.members):
        return None
    order, forms = activation(stage, asked)
    for index, weight in order:
        stage.attached.rescale(stage.names[index], weight)
    chosen = tuple(stage.names[index] for index, _ in order)
    stage.attached.activate(chosen)
    if not all(stage.sound(*forms_.values()) for forms_ in forms.values()):
        return None
    stage.attached.merge(chosen, safe=stage.case.safe)
    tensors = stage.attached.base_values()
    return worst([
        compare(f"{layer}:{key}", tensors[f"{layer}.{key}"], form.value, judged(form, machine=stage.machine.base.store))
        for layer, layer_forms in forms.items()
        for key, form in layer_forms.items()
    ])  # fmt: skip


def activation(stage: Stage, asked: Combination) -> tuple[list[tuple[int, float]], dict[str, Base]]:
    """Return members and weights in the order in which they are merged, and the closed form of that on each layer."""
    order = sorted(zip(asked.members, asked.weights, strict=True))
    forms = {}
    for layer in combining.layers(stage, asked):
        sites = [
            replace(site, adapter=replace(site.adapter, alpha=site.adapter.alpha * weight))
            for index, weight in order
            if index in stage.adapters_on(layer)
            for site in [stage.site(index, layer)]
        ]
        forms[layer] = stage.merge_of(sites, stage.base(layer))
    return order, forms
