"""A safe merge refuses what is not finite, writes nothing then, and otherwise merges as the unsafe one does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peftcheck import refusal
from peftcheck.case import Poison
from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.laws.merge import restored
from peftcheck.measurement import NOTHING, Measurement, broken, compare, identical, worst
from peftcheck.oracle import Base, Site, unlimited
from peftcheck.rounding import judged, precision
from peftcheck.stage import Stage

_ROOM = 0.5  # closer than this to the overflow threshold the oracle does not say whether a cast is finite


@dataclass(frozen=True)
class Poisoned:
    """Where the poison acts, and what the oracle says of the merge: 'refuse', 'accept', or 'open'.

    `site` is the first layer that has to refuse: a projection that layers share may be poisoned beyond what the layer
    at hand uses of it. Where none has to, it is the layer of the poisoned tensor.
    """

    adapter: int
    site: str
    role: str
    verdict: str
    forms: dict[str, Base]


def value_of(poison: Poison, stage: Stage, dtype: torch.dtype) -> float:
    """Return the number that the poison stands for in a tensor of `dtype`.

    'overflow' exceeds the base's range fourfold where the adapter can hold that (an overflow in the cast only);
    'tame' is large but harmless.
    """
    largest, own = stage.machine.base.store.largest, precision(dtype).largest
    if poison.value == "overflow":
        return min(4 * largest, own * 0.9)
    if poison.value == "tame":
        return min(largest, own) ** 0.25
    return float(poison.value)


def administer(stage: Stage) -> Poisoned | None:
    """Poison one element of one tensor of one adapter in place, and ask the oracle what the merge then is."""
    poison = stage.case.poison
    adapter = poison.adapter % len(stage.names)
    sites = [name for name in stage.targeted if adapter in stage.adapters_on(name)]
    if not sites:
        return None
    name = sites[poison.target % len(sites)]
    tensors = stage.attached.adapter_tensors(stage.names[adapter])
    keys = sorted(key for key, t in tensors.items() if key[0] == name and t.is_floating_point() and t.numel())
    if not keys:
        return None
    key = keys[poison.tensor % len(keys)]
    tensor = tensors[key]
    at = np.unravel_index(poison.element % tensor.numel(), tuple(tensor.shape))
    with torch.no_grad():
        tensor[tuple(at)] = value_of(poison, stage, tensor.dtype)
    if "poisoned" not in stage.remembered:  # the same in each law, which starts from the same tensors
        stage.remembered["poisoned"] = _judged(stage, adapter, name, key[1], sites)
    return stage.remembered["poisoned"]


def _judged(stage: Stage, adapter: int, name: str, role: str, sites: Sequence[str]) -> Poisoned:
    """Ask the oracle what the merge of the poisoned adapter has to be."""
    after = {k: t.detach().clone() for k, t in stage.attached.adapter_tensors(stage.names[adapter]).items()}
    # a projection that several sites share is poisoned at all of them
    poisoned = {site: [stage.site_of(adapter, site, after)] for site in sites}
    forms = {site: stage.merge_of(own, stage.base(site)) for site, own in poisoned.items()}
    refusing = [site for site, own in poisoned.items() if _must_refuse(stage, own, site)]
    verdict = "refuse" if refusing else _verdict(stage, forms)
    return Poisoned(adapter, refusing[0] if refusing else name, role, verdict, forms)


def _must_refuse(stage: Stage, sites: Sequence[Site], name: str) -> bool:
    """Return whether no correct merge of the sites is finite in the base's dtype, nor near the overflow threshold.

    A value that is not finite in fp64 is none anywhere. A large one overflows only if it is large beyond what
    rounding may do to it (a difference that cancels in bf16 may rightly come out as zero), which the bounds of a
    machine without overflow of its own tell.
    """
    threshold = stage.machine.base.store.largest / _ROOM
    for form in stage.merge_of(sites, stage.base(name), unlimited(stage.machine)).values():
        if not bool(torch.isfinite(form.value).all()):
            return True
        if bool((form.value.abs() - form.bound > threshold).any()):
            return True
    return False


def _verdict(stage: Stage, forms: dict[str, Base]) -> str:
    """Return 'accept' or 'open' for a merge that need not be refused."""
    largest = stage.machine.base.store.largest * _ROOM
    clear = all(bool((form.ceiling() < largest).all()) for base in forms.values() for form in base.values())
    # short of that, an intermediate may overflow in the library's arithmetic though not in fp64
    return "accept" if clear and stage.case.poison.value == "tame" else "open"


def _refused_in_order(stage: Stage, poisoned: Poisoned) -> bool:
    """Return whether merging all adapters in order is not finite either: another may scale the overflow back."""
    name = stage.names[poisoned.adapter]
    after = stage.attached.adapter_tensors(name)
    for site in poisoned.forms:
        order = stage.adapters_on(site)
        sites = [stage.site_of(i, site, after) if i == poisoned.adapter else stage.site(i, site) for i in order]
        if _must_refuse(stage, sites, site):
            return True
    return False


def attempt(stage: Stage, merge: Callable[[], None]) -> Exception | None:
    """Run a merge and return the library's refusal, or None; anything but a clear refusal goes on up."""
    try:
        merge()
    except Exception as error:
        if refusal.is_refusal(error, stage.implementation):
            return error
        raise
    return None


def merge_poisoned(stage: Stage, poisoned: Poisoned) -> Exception | None:
    """Merge the poisoned adapter alone, safely."""
    return attempt(stage, lambda: stage.attached.merge((stage.names[poisoned.adapter],), safe=True))


@law(
    "safe_merge.rejects",
    "a merge that is not finite in the base's dtype is refused, every other is accepted and right",
    (Op.SAFE_MERGE,),
    "the finiteness check sits before the cast: an fp32 adapter overflows a half-precision base unseen",
    on="both",
)
def rejects(stage: Stage) -> Measurement | None:
    """Poison one tensor and compare the library's decision with the oracle's."""
    poisoned = administer(stage)
    if poisoned is None:
        return None
    error = merge_poisoned(stage, poisoned)
    if poisoned.verdict == "refuse":
        return NOTHING if error else _accepted(stage, poisoned)
    if error is not None:
        note = f"{_what(stage, poisoned)}: refused though the merge is finite: {error}"
        return broken(f"{poisoned.site}:{poisoned.role}", "refused", note) if poisoned.verdict == "accept" else None
    if poisoned.verdict == "open":
        return None
    tensors = stage.attached.base_values()
    found = []
    for site, forms in poisoned.forms.items():
        for tensor, form in forms.items():
            budget = judged(form, machine=stage.machine.base.store)
            found.append(compare(f"{site}:{tensor}", tensors[f"{site}.{tensor}"], form.value, budget))
    return worst(found)


def _what(stage: Stage, poisoned: Poisoned) -> str:
    return f"{stage.case.poison.value} in {poisoned.role} of '{stage.names[poisoned.adapter]}' at {poisoned.site}"


def _accepted(stage: Stage, poisoned: Poisoned) -> Measurement:
    """Return the measurement of a merge that had to be refused and was not: every law on refusals is broken by it."""
    symptom = "accepted overflow" if stage.case.poison.value in ("overflow", "tame") else "accepted non-finite"
    return broken(f"{poisoned.site}:{poisoned.role}", symptom, f"{_what(stage, poisoned)}: safe_merge accepted it")


def _refused(stage: Stage) -> tuple[Poisoned, Exception | None] | None:
    poisoned = administer(stage)
    if poisoned is None or poisoned.verdict != "refuse":
        return None
    return poisoned, merge_poisoned(stage, poisoned)


@law(
    "safe_merge.atomic",
    "after a refusal every tensor of the refusing layer is bit-equal and it is not marked merged",
    (Op.SAFE_MERGE,),
    "a weight that is written before the bias is checked",
    on="both",
)
def atomic(stage: Stage) -> Measurement | None:
    """Provoke a refusal and compare the refusing layer, and the poisoned adapter, with their clones."""
    refused = _refused(stage)
    if refused is None:
        return None
    poisoned, error = refused
    if error is None:
        return _accepted(stage, poisoned)
    merged = stage.attached.merged().get(poisoned.site, ())
    if stage.names[poisoned.adapter] in merged:
        return broken(f"{poisoned.site}:module", "marked merged", f"{poisoned.site} is marked merged after a refusal")
    return worst(_unchanged(stage, lambda key: key.startswith(poisoned.site + ".")))


def _unchanged(stage: Stage, wanted: Callable[[str], bool]) -> list[Measurement]:
    tensors = stage.attached.base_tensors()
    return [
        identical(f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", tensors[key], start, "written")
        for key, start in stage.start.items()
        if wanted(key)
    ]


@law(
    "safe_merge.all_or_nothing",
    "after a refusal every tensor of the whole model is bit-equal and no layer is marked merged",
    (Op.SAFE_MERGE,),
    "layers before the poisoned one stay merged: the model is half one thing and half another",
    on="both",
)
def all_or_nothing(stage: Stage) -> Measurement | None:
    """Poison the last of the adapted layers and compare the whole model with its clones after the refusal."""
    poisoned = administer(stage)
    if poisoned is None or poisoned.verdict != "refuse":
        return None
    due = _refused_in_order(stage, poisoned)  # asked first: a merge may take the adapter's tensors away
    error = attempt(stage, lambda: stage.attached.merge(stage.names, safe=True))
    if error is None:
        return _accepted(stage, poisoned) if due else None
    changed = worst(_unchanged(stage, lambda key: True))
    marked = [name for name, adapters in stage.attached.merged().items() if adapters]
    if changed.holds and not marked:
        return changed
    note = f"'{poisoned.site}' refused; {changed.role} {changed.note}; marked merged: {', '.join(marked) or 'none'}"
    return broken(":model", "half merged", note)


@law(
    "safe_merge.names",
    "the error of a refused merge names the adapter",
    (Op.SAFE_MERGE,),
    "with ten adapters loaded, 'NaNs detected' helps nobody",
    structural=True,
    on="both",
)
def names(stage: Stage) -> Measurement | None:
    """Provoke a refusal and look for the adapter's name in the message."""
    refused = _refused(stage)
    if refused is None:
        return None
    poisoned, error = refused
    if error is None:
        return _accepted(stage, poisoned)
    name = stage.names[poisoned.adapter]
    if re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", str(error)):
        return NOTHING
    return broken(":message", "unnamed", f"the message does not name '{name}': {error}")


@law(
    "safe_merge.agrees",
    "safe and unsafe merges of finite values agree within one rounding of each, and so do their unmerges",
    (Op.MERGE, Op.SAFE_MERGE, Op.UNMERGE),
    "two code paths for one formula drift apart",
    on="both",
)
def agrees(stage: Stage) -> Measurement | None:
    """Merge safely and unsafely, unmerge both, and compare.

    Both paths compute the delta by the same code, so what differs is where it is rounded: each result is within
    its own bound of the closed form.
    """
    merged, undone = [], []
    for safe in (False, True):
        stage.attached.merge(stage.names, safe=safe)
        merged.append({k: t.detach().clone() for k, t in stage.attached.base_values().items()})
        stage.attached.unmerge()
        undone.append({k: t.detach().clone() for k, t in stage.attached.base_values().items()})
        stage.put_back()
    found = []
    for name in stage.targeted:
        budget, extra, forms = stage.roundtrip(name), stage.documented(name), stage.merged(name)
        if not stage.sound(*forms.values()):
            continue
        for tensor, form in forms.items():
            key, role = f"{name}.{tensor}", f"{name}:{tensor}"
            found.append(compare(role, merged[1][key], merged[0][key].double(), 2 * form.bound))
            if undone[0][key].shape != stage.start[key].shape:
                continue  # merge.roundtrip tells that; the budget is for a weight of the old shape
            both = 2 * budget[tensor]
            more = 2 * extra[tensor] if tensor in extra else None
            found.append(restored(role, undone[1][key], undone[0][key].double(), both, more))
    found = [one for one in found if one is not None]
    return worst(found) if found else None
