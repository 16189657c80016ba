"""What a checkpoint holds, and what comes back from it: values, outputs, merges, bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from peftcheck import checkpoint
from peftcheck.implementation import Attached, Op, Reloads, stored
from peftcheck.law import law
from peftcheck.laws.merge import merge_all
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.stage import Stage


@dataclass(frozen=True)
class Snapshot:
    """What an operation on checkpoints must leave alone: clones of tensors, flags, bookkeeping."""

    base: dict[str, Tensor]
    adapters: dict[str, dict[tuple[str, str], Tensor]]
    trained: dict[str, frozenset[tuple[str, str]]]
    merged: dict[str, tuple[str, ...]]


def snapshot(stage: Stage, attached: Attached, adapters: Sequence[str]) -> Snapshot:
    """Return the state of an attached model."""
    return Snapshot(
        {key: tensor.detach().clone() for key, tensor in attached.base_tensors().items()},
        {name: {key: t.detach().clone() for key, t in own_tensors(stage, attached, name).items()} for name in adapters},
        {name: attached.trainable(name) for name in adapters},
        attached.merged(),
    )


def own_tensors(stage: Stage, attached: Attached, name: str, of: str | None = None) -> dict[tuple[str, str], Tensor]:
    """Return the tensors of adapter `name` on the layers that `of` (else itself) targets.

    A tensor that several layers share may be within reach of others too.
    """
    adapter = next(one for one in stage.case.adapters if one.name == (of or name))
    sites = {stage.case.layers[target].name for target in adapter.targets}
    return {key: tensor for key, tensor in attached.adapter_tensors(name).items() if key[0] in sites}


def outputs(stage: Stage, attached: Attached) -> tuple[Tensor, ...] | None:
    """Return the model's outputs, or None where it cannot run or does not run alike twice: the matter of other laws."""
    if not stage.can(Op.FORWARD) or not stage.outputs_count:
        return None
    first, again = checkpoint.outputs(stage, attached), checkpoint.outputs(stage, attached)
    if first is None or again is None:
        return None
    return first if all(identical("", y, x).holds for x, y in zip(first, again, strict=True)) else None


def same_tensors(found: dict[tuple[str, str], Tensor], due: dict[tuple[str, str], Tensor], what: str) -> Measurement:
    """Return whether an adapter has the tensors that are due, bit for bit."""
    for site, role in sorted(due.keys() - found.keys()):
        return broken(f"{site}:{role}", f"lost {what}", f"{role} is gone, {what}")
    for site, role in sorted(found.keys() - due.keys()):
        return broken(f"{site}:{role}", f"added {what}", f"{role} was not there before, {what}")
    compared = [identical(f"{site}:{role}", found[site, role], tensor, what) for (site, role), tensor in due.items()]
    bad = worst(compared)
    return replace(bad, symptom=f"{bad.symptom} {what}") if bad.symptom in ("shape", "dtype") else bad


def same_outputs(stage: Stage, attached: Attached, due: Sequence[Tensor] | None, what: str) -> Measurement:
    """Return whether a model gives the outputs that are due, bit for bit; nothing where there are none."""
    if due is None:
        return NOTHING
    found = checkpoint.outputs(stage, attached)
    if found is None:
        return broken("model:output", f"crash {what}", f"the model cannot run, {what}")
    rows = zip(stage.case.layers, found, due, strict=True)
    return worst([identical(f"{spec.name}:output", y, expected, what) for spec, y, expected in rows])


def unchanged(now: Snapshot, before: Snapshot, what: str) -> Measurement:
    """Return whether nothing of a model changed."""
    for key in sorted(before.base.keys() - now.base.keys()):
        return broken(key, f"lost {what}", f"{key} is gone, {what}")
    found = [identical(key, now.base[key], tensor, f"changed {what}") for key, tensor in before.base.items()]
    found += [same_tensors(now.adapters[name], own, f"changed {what}") for name, own in before.adapters.items()]
    if now.trained != before.trained:
        found.append(broken("model:adapter", f"requires_grad {what}", f"other tensors are trained, {what}"))
    if now.merged != before.merged:
        found.append(
            broken("model:module", f"bookkeeping {what}", f"merged: {now.merged}, was {before.merged}, {what}")
        )
    return worst(found)


def _reloads(stage: Stage) -> bool:
    """Return whether the case can be loaded into a pristine model.

    Not where the library changes the base while attaching and the case has changed it after that: there is no base
    from which attaching would lead to this one.
    """
    known = isinstance(stage.implementation, Reloads)
    return known and not (stage.variant.rewrites_base and stage.case.profile == "cancelling")


def told_apart(stage: Stage, found: Measurement) -> Measurement:
    """Return the measurement, with a symptom of its own where a layer is called like one of several adapters.

    Libraries that pick an adapter's tensors by name take one for the other: one cause of many symptoms.
    """
    parts = {part for spec in stage.case.layers for part in spec.name.split(".")}
    if found.holds or len(stage.names) == 1 or parts.isdisjoint(stage.names):
        return found
    return replace(found, symptom=f"{found.symptom}, a layer called like an adapter")


@law(
    "state.save_load",
    "load(save(adapters)) is bit-equal: tensors, dtypes, shapes, outputs; saving and loading change nothing else",
    (Op.SAVE, Op.LOAD),
    "VeRA's second adapter, saved and loaded alone, came back with other projections than those it was trained with",
    structural=True,
    logic=True,
    on="methods",
)
def save_load(stage: Stage) -> Measurement | None:
    """Save all adapters; load all into a pristine model, the last one alone, and the first beside itself.

    Budget: 0. What a checkpoint does not hold must be made anew from options and base, bit for bit; the random state
    is another one, as in another process. Outputs follow from equal tensors by equal operations.
    """
    if not _reloads(stage):
        return None
    checkpoint.regenerate(stage)
    start = snapshot(stage, stage.attached, stage.names)
    folder = checkpoint.saved(stage, anew=True)
    found = [unchanged(snapshot(stage, stage.attached, stage.names), start, "by saving")]
    due = outputs(stage, stage.attached)
    found.append(_together(stage, start, due))
    if stage.can(Op.ADD):
        found.append(_beside(stage, folder, start, due))
    if len(stage.names) > 1:
        found.append(_alone(stage, stage.names[-1], start))
    return told_apart(stage, worst(found))


def _together(stage: Stage, start: Snapshot, due: Sequence[Tensor] | None) -> Measurement:
    """Load all adapters into a pristine model."""
    again = checkpoint.reloaded(stage, stage.names)
    now = snapshot(stage, again, stage.names)
    found = [same_tensors(now.adapters[name], start.adapters[name], "reloaded") for name in stage.names]
    found += [identical(key, now.base[key], tensor, "reloaded") for key, tensor in start.base.items()]
    return worst([*found, same_outputs(stage, again, due, "reloaded")])


def _beside(stage: Stage, folder: Path, start: Snapshot, due: Sequence[Tensor] | None) -> Measurement:
    """Load the first adapter into the live model, under a name of which its own is a prefix."""
    name = stage.names[0]
    other = next(new for new in (f"{name}0", f"{name}_2") if new not in stage.names)
    before = snapshot(stage, stage.attached, stage.names)
    stage.attached.load(stored(folder, name), other)
    loaded = own_tensors(stage, stage.attached, other, of=name)
    now = snapshot(stage, stage.attached, stage.names)
    return worst([
        same_tensors(loaded, start.adapters[name], "loaded under another name"),
        unchanged(now, before, "by loading another adapter"),
        same_outputs(stage, stage.attached, due, "changed by loading another adapter"),
    ])  # fmt: skip


def _alone(stage: Stage, name: str, start: Snapshot) -> Measurement:
    """Load one adapter into a pristine model that has no other."""
    alone = checkpoint.reloaded(stage, (name,))
    loaded = same_tensors(own_tensors(stage, alone, name), start.adapters[name], "reloaded alone")
    stage.attached.activate((name,))
    return worst([loaded, same_outputs(stage, alone, outputs(stage, stage.attached), "reloaded alone")])


@law(
    "state.save_merged",
    "save(merged model) writes the same tensors and options as save(unmerged model)",
    (Op.SAVE, Op.MERGE),
    "LN tuning merges by swapping base and adapter: what is saved while merged is the base, and the training is lost",
    structural=True,
    logic=True,
)
def save_merged(stage: Stage) -> Measurement | None:
    """Save, merge, save again, and compare the files bit for bit, read without the library.

    Budget: 0; a merge writes into the base, and a checkpoint holds none of it.
    """
    before = checkpoint.saved(stage)
    checkpoint.regenerate(stage)
    merge_all(stage)
    with tempfile.TemporaryDirectory(prefix="peftcheck-") as folder:
        stage.attached.save(Path(folder), stage.names)
        files = [_same_files(stored(Path(folder), name), stored(before, name)) for name in stage.names]
        return worst(files)


def _same_files(found: Path, due: Path) -> Measurement:
    now, before = checkpoint.tensors(found), checkpoint.tensors(due)
    if now.keys() != before.keys():
        return broken("model:checkpoint", "other tensors", f"merged {sorted(now)}, unmerged {sorted(before)}")
    if checkpoint.descriptions(found) != checkpoint.descriptions(due):
        return broken("model:options", "other options", "the configuration differs if it is saved while merged")
    return worst(
        [
            identical(f"checkpoint:{_tensor(key)}", now[key], tensor, "saved while merged")
            for key, tensor in before.items()
        ]
    )


def _tensor(key: str) -> str:
    """Return the part of a library's name that tells the kind of tensor, without layers."""
    parts = key.removesuffix(".weight").split(".")
    return parts[-1].partition(":")[2] or parts[-1]


@law(
    "state.reload_merge",
    "merge(load(save(adapters))) is bit-equal to merge(adapters)",
    (Op.SAVE, Op.LOAD, Op.MERGE),
    "a scale that is not saved, or that loading works out anew, shows only in what the adapter does",
    logic=True,
)
def reload_merge(stage: Stage) -> Measurement | None:
    """Merge the adapters, and those loaded from their checkpoint into a pristine model, in the same order.

    Budget: 0: the same operations on the same bits.
    """
    if not _reloads(stage):
        return None
    checkpoint.saved(stage)
    checkpoint.regenerate(stage)
    merge_all(stage)
    again = checkpoint.reloaded(stage, stage.names)
    merge_all(stage, again)
    now = again.base_tensors()
    found = [
        identical(f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", now[key], tensor, "merged after reloading")
        for key, tensor in stage.attached.base_tensors().items()
    ]
    return told_apart(stage, worst(found))


@law(
    "state.checkpoint_size",
    "bytes(values saved) <= bytes(trainable values) + bytes(declared tensors), each once",
    (Op.SAVE,),
    "RandLoRA with save_projection writes its shared projection once per layer: 42 GB for a 4-billion-parameter model",
    structural=True,
    logic=True,
    on="methods",
)
def checkpoint_size(stage: Stage) -> Measurement | None:
    """Weigh what was written for each adapter.

    Budget: the trainable tensors and the roles in `Variant.keeps`, each storage once however many layers share it; to
    this the container of safetensors is allowed: 8 bytes, and the JSON header of the names that are there, padded to 8.
    """
    folder = checkpoint.saved(stage)
    found = []
    for name in stage.names:
        weight, due = checkpoint.sizes(*checkpoint.folders(folder, name, stage.names)), checkpoint.declared(stage, name)
        spent = weight.values + weight.extra
        note = f"{spent} bytes of values where {due} are due (and {weight.container} of the container)"
        ratio = spent / due if due else float("inf") if spent else 0.0
        found.append(Measurement(ratio, ratio, "model:checkpoint", "too large", float(spent), float(due), note=note))
    return told_apart(stage, worst(found))
