"""Safe merges into codes: what the grid cannot hold is refused, and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peftcheck import quantizers
from peftcheck.budgets import quantized
from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.laws.quantize import chosen, coarser, dense, judge, placed, readable, rule, within
from peftcheck.laws.quantize_state import changed, facts
from peftcheck.laws.safe_merge import attempt
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.oracle import Base, Site
from peftcheck.rounding import precision
from peftcheck.stage import Stage


@dataclass(frozen=True)
class Poisoned:
    """One poisoned element: where it is, what is due of a safe merge, and the adapter's sites with it."""

    adapter: int
    site: str
    role: str
    verdict: str
    sites: dict[str, Site]


def administer(stage: Stage) -> Poisoned | None:
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
    at = np.unravel_index(poison.element % tensor.numel(), tuple(tensor.shape))
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
    return Poisoned(adapter, refusing or name, key[1], verdict, sites)


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
    poisoned = administer(stage) if readable(stage) else None
    if poisoned is None:
        return None
    name = stage.names[poisoned.adapter]
    error = attempt(stage, lambda: stage.attached.merge((name,), safe=True))
    where = f"{poisoned.site}:{poisoned.role}"
    what = f"{stage.case.poison.value} in {poisoned.role} of '{name}' at {poisoned.site}"
    if poisoned.verdict == "refuse":
        return NOTHING if error else _accepted(stage, where, what)
    if error is not None:
        return (
            broken(where, "refused", f"{what}: refused though the merge is finite: {error}")
            if poisoned.verdict == "accept"
            else None
        )
    if poisoned.verdict == "open":
        return None
    grids, dtype = chosen(stage), coarser(stage)
    forms = {
        site: quantized.merged(
            stage.machine, stage.formula, (one,), stage.base(site), rule(stage, dtype, [grids[site]])
        )
        for site, one in poisoned.sites.items()
    }
    return judge(stage, {site: made if within(stage, made) else None for site, made in forms.items()})


def _accepted(stage: Stage, where: str, what: str) -> Measurement | None:
    """Judge a merge that went through: a layer that took a wider dtype holds what the base's dtype could not.

    Then the state has changed, which `quantize.state_kept` judges, and nothing has overflowed. A tame element in an
    adapter that overflows by itself is an overflow too.
    """
    value = {"tame": "overflow"}.get(stage.case.poison.value, stage.case.poison.value)
    if value == "overflow":
        tensors = dense(stage)
        if isinstance(tensors, Measurement):
            return tensors
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            return None
    return broken(where, f"accepted {value}", f"{what}: safe_merge accepted it")


@law(
    "quantize.atomic",
    "after a refused merge every code, scale and bias of the refusing layer is bit-equal and it is not marked merged",
    (Op.SAFE_MERGE,),
    "weights that are written before the bias is checked; a weight deleted before it is replaced",
)
def atomic(stage: Stage) -> Measurement | None:
    """Provoke a refusal and compare the raw tensors of the refusing layer with their clones."""
    poisoned = administer(stage) if placed(stage) else None
    if poisoned is None or poisoned.verdict != "refuse":
        return None
    name = stage.names[poisoned.adapter]
    before = facts(stage)[poisoned.site]
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
    kept = changed({poisoned.site: before}, {poisoned.site: facts(stage)[poisoned.site]}, {}, {}, "a refused merge")
    return worst([kept, *found])
