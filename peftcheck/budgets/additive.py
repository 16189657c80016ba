"""Budgets of methods that merge by adding a delta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site
from peftcheck.rounding import Bounded


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip: u (abs(M) + abs(W)) for one adapter, and zero where nothing rounds.

    The stored delta d_k is the same tensor at merge and at unmerge, however it was rounded, so its own error
    cancels. With T_0 = W, T_k = T_{k-1} + d_k, each of the 2n additions and subtractions is stored once, with
    relative error u (half precision rounds to fp32 first: `Precision.roundoff`). A sum never underflows inexactly:

        E <- E + u (abs(T) + E),   over T = T_1 ... T_n, T_{n-1} ... T_0.

    abs(T_k) is bounded by the oracle's value plus its bound, since the library's d_k may differ from the oracle's.

    An adapter of another dtype: the unsafe merge adds the fp32 delta, the unmerge subtracts it rounded to the
    base's dtype. Subtracting d_k then first takes E <- E + u abs(d_k) + eta / 2, and the casts may underflow, which
    costs each sum another eta / 2.
    """
    u, eta = m.base.store.roundoff, m.base.store.eta if m.mixed else 0.0
    stages: list[Base] = [base]
    deltas: list[dict[str, Bounded]] = []
    for site in sites:
        deltas.append(formula.delta(m, site))
        stages.append({**base, **stages[-1], **formula.merge(m, site, stages[-1])})
    budget = {}
    for name in dict.fromkeys(name for change in deltas for name in change):
        path = [stage[name] for stage in stages]
        error = torch.zeros_like(path[0].value)
        if all(value.quantum is not None for value in path):
            budget[name] = error
            continue
        for value in path[1:]:
            error = error + (u * (value.ceiling() + error) + eta / 2)
        for value, change in zip(reversed(path[:-1]), reversed(deltas), strict=True):
            if m.mixed and name in change:
                error = error + (u * change[name].ceiling() + eta / 2)
            error = error + (u * (value.ceiling() + error) + eta / 2)
        budget[name] = error
    return budget
