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
    wide = m.base.store.u != m.base.store.a
    u, eta = m.base.store.roundoff, m.base.store.eta if wide else 0.0
    stages: list[Base] = [base]
    for site in sites:
        for stage in formula.steps(m, site, stages[-1]) if formula.steps else (formula.merge(m, site, stages[-1]),):
            stages.append({**stages[-1], **stage})
    changed = [name for name in base if any(stage[name] is not base[name] for stage in stages)]
    budget = {}
    for name in changed:
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


def _change(before: Bounded, after: Bounded) -> Tensor:
    """Return a bound on abs(after - before) for what is stored."""
    return (after.value - before.value).abs() + before.bound + after.bound


def restored(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip of a method that keeps a copy of what it replaces: zero."""
    names = {name for site in sites for name in formula.merge(m, site, base)}
    return {name: torch.zeros_like(base[name].value) for name in names}
