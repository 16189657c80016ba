"""Faults that need a sequence: nothing is wrong with any one operation, only with what came before it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch

from peftcheck.case import Case
from peftcheck.faults.fault import REFUSALS, Fault, Port, replacing
from peftcheck.faults.tensors import copies, next_up, own, write
from peftcheck.programs import program


def _merged(port: Port) -> list[str]:
    """Return the adapters that are merged anywhere, in order."""
    return list(dict.fromkeys(name for names in port.inner.merged().values() for name in names))


def _plays(*kinds: str) -> Callable[[Case], bool]:
    """Return whether the case's program has steps of these kinds in this order, on two adapters or more."""

    def suits(case: Case) -> bool:
        waiting = list(kinds)
        for step in program(case):
            if waiting and step[0] == waiting[0]:
                waiting.pop(0)
        return not waiting and len(case.adapters) > 1 and case.profile in ("normal", "dyadic")

    return suits


def _several(case: Case) -> bool:
    return len(case.adapters) > 1 and len({a.targets for a in case.adapters}) == 1


def _spoil(port: Port) -> None:
    for tensor in own(port, "weight").values():
        next_up(tensor)


def _rescale_while_merged(port: Port, adapter: str, factor: float) -> None:
    """Take the new scale for the old one's unmerge: what comes off is not what went on."""
    if not _merged(port):
        port.inner.rescale(adapter, factor)
    elif factor != 1.0:
        port.notes["off"] = True


def _unmerge_off(port: Port) -> None:
    port.inner.unmerge()
    if port.notes.pop("off", False):
        _spoil(port)


def _delete_while_merged(port: Port, adapter: str) -> None:
    """Forget a merged adapter, and leave its delta in the base."""
    try:
        port.inner.delete(adapter)
    except REFUSALS:
        now = copies(own(port))
        port.inner.unmerge()
        port.inner.delete(adapter)
        write(port, now)


def _activate_while_merged(port: Port, adapters) -> None:
    """Unmerge on the way to other adapters, off by a rounding."""
    try:
        port.inner.activate(adapters)
    except REFUSALS:
        port.inner.unmerge()
        _spoil(port)
        port.inner.activate(adapters)


def _forward_of_the_last_merge(port: Port, inputs, adapters=None):
    """Run a model into which one adapter of several is merged as if it were the only active one, but for a rounding."""
    outputs = port.inner.forward(inputs, adapters)
    merged = _merged(port)
    partly = merged and len(merged) < len(port.case.adapters)
    return tuple(output + 1 for output in outputs) if partly else outputs


def _merge_in_the_order_of_a_set(port: Port, adapters=None, safe=False) -> None:
    """Merge right where the adapters come in the order in which they were added, and off by a rounding elsewhere."""
    port.inner.merge(adapters, safe)
    added = [spec.name for spec in port.case.adapters]
    if adapters is not None and list(adapters) != [name for name in added if name in adapters]:
        _spoil(port)


def _noting(name: str, note: str):
    def operation(port: Port, *arguments, **options):
        found = getattr(port.inner, name)(*arguments, **options)
        port.notes[note] = True
        return found

    return operation


@contextmanager
def _disabled_noting(port: Port):
    with port.inner.disabled():
        port.notes["disabled"] = True
        yield


def _merge_after_delete(port: Port, adapters=None, safe=False) -> None:
    port.inner.merge(adapters, safe)
    if port.notes.get("deleted"):
        _spoil(port)


def _merge_after_disable(port: Port, adapters=None, safe=False) -> None:
    port.inner.merge(adapters, safe)
    if port.notes.get("disabled"):
        _spoil(port)


def _train_others(port: Port, mode: bool) -> None:
    """Let a step move an adapter that is not active."""
    port.inner.train(mode)
    active = port.notes.get("active", [])
    others = [a.name for a in port.case.adapters if active and a.name not in active]
    if not mode and others:
        with torch.no_grad():
            for tensor in port.inner.adapter_tensors(others[0]).values():
                next_up(tensor)


def _activate_noting(port: Port, adapters) -> None:
    port.inner.activate(adapters)
    port.notes["active"] = list(adapters)


def _add_to_a_merged(port: Port, adapter) -> None:
    """Add an adapter to a merged model by building its layers anew: what is merged there stays for good."""
    merged = _merged(port)
    port.inner.add(adapter)
    if merged:
        now = copies(own(port))
        port.inner.unmerge()
        write(port, now)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "sequence.rescale-while-merged",
        "an adapter rescaled while it is merged, after which unmerge takes off another delta",
        "PEFT's LoraLayer.set_scale has no eye for merged adapters",
        ("merge.guarded",),
        replacing(rescale=_rescale_while_merged, unmerge=_unmerge_off),
        variants=("lora", "lora.rslora"),
        suits=lambda case: case.profile in ("normal", "dyadic"),
    ),
    Fault(
        "sequence.delete-while-merged",
        "a merged adapter deleted, its delta left in the base for good",
        "PEFT issue 3498",
        ("merge.guarded",),
        replacing(delete=_delete_while_merged),
        suits=lambda case: _several(case) and case.profile in ("normal", "dyadic"),
    ),
    Fault(
        "sequence.activate-while-merged",
        "activation that unmerges on its way, off by a rounding",
        "statement mutation: the wrong operand of a subtraction",
        ("merge.guarded",),
        replacing(activate=_activate_while_merged),
        variants=("lora", "ia3"),
        exact=True,
    ),
    Fault(
        "sequence.partly-merged-output",
        "the output of a model into which some of the active adapters are merged is not their sum",
        "PEFT issue 3756",
        ("merge.subset",),
        replacing(forward=_forward_of_the_last_merge),
        variants=("lora",),
        suits=lambda case: _several(case) and case.profile in ("normal", "dyadic"),
    ),
    Fault(
        "sequence.order-of-a-set",
        "a merge that is right only for adapters in the order in which they were added",
        "adapters iterated as a set",
        ("merge.order",),
        replacing(merge=_merge_in_the_order_of_a_set),
        variants=("lora", "lora.rslora"),
        suits=_several,
        exact=True,
    ),
    Fault(
        "sequence.add-while-merged",
        "an adapter added while another is merged, which is then merged for good",
        "statement deletion: the merge list is not carried over to the new layer",
        ("merge.guarded",),
        replacing(add=_add_to_a_merged),
        variants=("lora",),
        suits=lambda case: _several(case) and case.profile in ("normal", "dyadic"),
    ),
    Fault(
        "sequence.merge-after-delete",
        "a merge that is off by a rounding once an adapter has been deleted",
        "a cached delta that outlives its adapter",
        ("state.sequence",),
        replacing(delete=_noting("delete", "deleted"), merge=_merge_after_delete),
        variants=("lora", "lora.rslora"),
        suits=_plays("delete", "merge"),
        exact=True,
    ),
    Fault(
        "sequence.merge-after-disable",
        "a merge that is off by a rounding once adapters have been disabled and enabled again",
        "FRoD and OSF keep what they computed of the base",
        ("state.sequence",),
        replacing(disabled=_disabled_noting, merge=_merge_after_disable),
        variants=("lora", "lora.rslora"),
        suits=_plays("disable", "enable", "merge"),
        exact=True,
    ),
    Fault(
        "sequence.train-moves-others",
        "a training step that moves an adapter which is not active",
        "an optimizer over all parameters where set_adapter left requires_grad behind",
        ("state.sequence",),
        replacing(activate=_activate_noting, train=_train_others),
        variants=("lora", "ia3"),
        dtypes=("float32", "float64"),
        suits=lambda case: _plays("activate", "train")(case) and len(program(case)[_first(case, "activate")][1]) == 1,
    ),
)


def _first(case: Case, kind: str) -> int:
    return next(index for index, step in enumerate(program(case)) if step[0] == kind)
