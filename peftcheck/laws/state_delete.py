"""Deleting an adapter: the others keep everything, nothing of it stays, and its name is free again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftcheck import checkpoint
from peftcheck.implementation import Combines, Op
from peftcheck.law import law
from peftcheck.laws.state import outputs, own_tensors, same_outputs, same_tensors, snapshot, unchanged
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.oracle import Family
from peftcheck.stage import Stage

Tensors = dict[tuple[str, str], Tensor]


@law(
    "state.delete",
    "delete(a) leaves base, other adapters and their outputs bit-equal and nothing of a; add(a) works as the first time",
    (Op.DELETE,),
    "an adapter deleted by a name that is a prefix of another's; containers of the model that kept what its layers let go",
    structural=True,
    logic=True,
    on="methods",
)
def delete(stage: Stage) -> Measurement | None:
    """Delete one adapter, active or not as the case says; compare; then add it anew, with the values that it had.

    Budget: 0. Without the last adapter the outputs are those of the base in force.
    """
    checkpoint.regenerate(stage)
    victim = stage.names[stage.case.poison.adapter % len(stage.names)]
    others = tuple(name for name in stage.names if name != victim)
    kept = snapshot(stage, stage.attached, (victim,)).adapters[victim]
    if _compared(stage, victim) != stage.names:
        stage.attached.activate(_compared(stage, victim))
    first = outputs(stage, stage.attached)
    due = _without(stage, others)
    if others:
        stage.attached.activate(stage.names if stage.case.joint else others)
    before = snapshot(stage, stage.attached, others)
    owned = _storages(stage, victim, others)
    stage.attached.delete(victim)
    found = [
        unchanged(snapshot(stage, stage.attached, others), before, "by deleting another adapter"),
        _gone(stage, victim, owned),
    ]
    runs = same_outputs(stage, stage.attached, due, "after deleting an adapter" if others else "without adapters")
    if worst(found).holds and stage.can(Op.ADD):
        found.append(_anew(stage, victim, others, kept, first))
    return worst([*found, runs])


def _compared(stage: Stage, victim: str) -> tuple[str, ...]:
    """Return the adapters that run when what is added again is compared with what was deleted.

    Of several methods each adapts what the ones before it made of the layer. One that is added again comes last, which
    is another function of all of them: there it runs alone.
    """
    return (victim,) if stage.formula.family is Family.MIXED else stage.names


def _without(stage: Stage, others: Sequence[str]) -> tuple[Tensor, ...] | None:
    """Return the outputs that are due once the adapter is gone."""
    if others:
        stage.attached.activate(others)
        return outputs(stage, stage.attached)
    if not stage.can(Op.FORWARD) or not stage.outputs_count or stage.variant.rewrites_base:
        return None
    return tuple(stage.pristine_outputs[spec.name] for spec in stage.case.layers)


def _storages(stage: Stage, victim: str, others: Sequence[str]) -> set[int]:
    """Return where the adapter's own tensors lie: not what it shares with other adapters or the base."""
    listed = stage.attached.adapters() if isinstance(stage.attached, Combines) else ()
    others = {*others, *listed} - {victim}  # experts that a router leads to are adapters of their own
    shared = {t.data_ptr() for name in others for t in stage.attached.adapter_tensors(name).values()}
    shared |= {t.data_ptr() for t in stage.attached.base_tensors().values()}
    return {t.data_ptr() for t in stage.attached.adapter_tensors(victim).values() if t.numel()} - shared


def _gone(stage: Stage, victim: str, owned: set[int]) -> Measurement:
    """Return whether neither the port nor the model reaches anything of the adapter."""
    left = stage.attached.adapter_tensors(victim)
    for site, role in sorted(left):
        return broken(f"{site}:{role}", "left behind", f"{role} of '{victim}' is still there after deleting it")
    if stage.attached.sites(victim):
        return broken("model:module", "left behind", f"'{victim}' still adapts {stage.attached.sites(victim)}")
    listed = stage.attached.adapters() if isinstance(stage.attached, Combines) else ()
    if victim in listed or any(victim in merged for merged in stage.attached.merged().values()):
        return broken("model:bookkeeping", "left behind", f"'{victim}' is still listed after deleting it")
    for root in stage.attached.roots():
        if not isinstance(root, nn.Module):
            continue
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            if tensor.data_ptr() in owned:
                return broken(
                    "model:container", "left behind", f"the model still holds {name} after deleting '{victim}'"
                )
    return NOTHING


def _telling(stage: Stage, old: Tensor) -> bool:
    """Return whether a start of the library's cannot have these values by chance: a few small numbers it can."""
    return stage.case.profile not in ("dyadic", "onehot") or old.numel() >= 8


def _anew(
    stage: Stage, victim: str, others: Sequence[str], kept: Tensors, first: Sequence[Tensor] | None
) -> Measurement:
    """Add an adapter under the name again: nothing of the old one may come back, and it must work like the old one."""
    adapter = next(one for one in stage.case.adapters if one.name == victim)
    before = snapshot(stage, stage.attached, others)
    stage.attached.add(adapter)
    found = [unchanged(snapshot(stage, stage.attached, others), before, "by adding an adapter again")]
    new = own_tensors(stage, stage.attached, victim)
    forms = [{key: torch.zeros_like(tensor) for key, tensor in tensors.items()} for tensors in (new, kept)]
    found.append(same_tensors(*forms, "added again"))  # the same shapes and dtypes
    if not found[-1].holds:
        return worst(found)
    trained = checkpoint.trained(stage)
    for (site, role), old in kept.items():
        written = not identical("", stage.fresh[victim][site, role], old).holds  # by the harness, into the old one
        if role in trained and written and _telling(stage, old) and identical("", new[site, role], old).holds:
            found.append(broken(f"{site}:{role}", "stale", f"'{victim}', added again, has values of the deleted one"))
    if stage.variant.rewrites_base:
        return worst(found)
    with torch.no_grad():
        for key, old in kept.items():
            new[key].copy_(old)
    stage.attached.activate(_compared(stage, victim))
    runs = same_outputs(stage, stage.attached, first, "of an adapter added again")
    if not runs.holds:
        stage.attached.train(stage.case.train)
        if same_outputs(stage, stage.attached, first, "").holds:
            runs = replace(
                runs, symptom="added in training mode", note="the new adapter trains in a model that does not"
            )
    return worst([*found, runs])
