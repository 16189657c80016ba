"""Budgets of methods that take away the very change that they added, in one or several additions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site
from peftcheck.rounding import Bounded


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip: u (abs(M) + abs(W)) for one addition, and zero where nothing rounds.

    Let T_0 = W, T_k = T_{k-1} + d_k be what is stored on the way, adapter by adapter, step by step. The d_k that is
    subtracted is the stored one, whatever it was computed from, so that its own error cancels. With roundoff u:

        E <- E + u (abs(T) + E) + eta / 2,   over T = T_1 ... T_n, T_{n-1} ... T_0.

    In half precision a library may add the d_k that it holds in single precision and subtract it rounded (or the other
    way round), whatever dtype the adapter is stored in: each subtraction first takes E <- E + u abs(d_k) + eta / 2.
    """
    together = _walk(m, _one_by_one(m, formula, sites, base))
    if formula.merge_many is None:
        return together
    # where a change depends on the weight that it meets, several at once and one by one store different stages
    apart = _walk(m, [base, *({**base, **formula.merge_many(m, sites[: n + 1], base)} for n in range(len(sites)))])
    return {name: torch.maximum(error, apart[name]) for name, error in together.items()}


def _walk(m: Machine, stages: Sequence[Base]) -> dict[str, Tensor]:
    """Return the error after walking the stages up and down again."""
    wide, base = m.base.store.u != m.base.store.a, stages[0]
    u, eta = m.base.store.roundoff, m.base.store.eta if wide else 0.0
    budget = {}
    for name in [name for name in base if any(stage[name] is not base[name] for stage in stages)]:
        path = [stage[name] for stage in stages]
        error = torch.zeros_like(path[0].value)
        if all(value.quantum is not None for value in path):
            budget[name] = error
            continue
        for value in path[1:]:
            error = error + (u * (value.ceiling() + error) + eta / 2)
        for before, after in reversed(list(pairwise(path))):
            if wide:
                error = error + (u * _change(before, after) + eta / 2)
            error = error + (u * (before.ceiling() + error) + eta / 2)
        budget[name] = error
    return budget


def _one_by_one(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> list[Base]:
    """Return what is stored on the way, the base first."""
    stages: list[Base] = [base]
    for site in sites:
        for stage in formula.steps(m, site, stages[-1]) if formula.steps else (formula.merge(m, site, stages[-1]),):
            stages.append({**stages[-1], **stage})
    return stages


def _change(before: Bounded, after: Bounded) -> Tensor:
    """Return a bound on abs(after - before) for what is stored."""
    return (after.value - before.value).abs() + before.bound + after.bound


def restored(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip of a method that keeps a copy of what it replaces: zero."""
    names = {name for site in sites for name in formula.merge(m, site, base)}
    return {name: torch.zeros_like(base[name].value) for name in names}
