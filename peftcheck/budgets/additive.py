"""Budgets of methods that merge by adding a delta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip: u (abs(M) + abs(W)) for one adapter, and zero where nothing rounds.

    The stored delta d_k is the same tensor at merge and at unmerge, however it was rounded, so its own error
    cancels. With T_0 = W, T_k = T_{k-1} + d_k, each of the 2n additions and subtractions is stored once, with
    relative error u (u + a for half precision, whose kernels round to fp32 first) and absolute error eta/2:

        E <- E + u (abs(T) + E) + eta,   over T = T_1 ... T_n, T_{n-1} ... T_0.

    abs(T_k) is bounded by the oracle's value plus its bound, since the library's d_k may differ from the oracle's.
    An adapter of another dtype: the unsafe merge adds the fp32 delta, the unmerge subtracts it rounded to the
    base's dtype, so that abs(d_k) u + eta joins in once for each adapter (reaches 1.5 to 2.0 of the bound without).
    """
    u = m.base.store.u + (m.base.store.a if m.base.store.u != m.base.store.a else 0.0)
    eta = m.base.store.eta
    stages: list[Base] = [base]
    deltas: list[dict] = []
    for site in sites:
        deltas.append(formula.delta(m, site))
        stages.append({**base, **stages[-1], **formula.merge(m, site, stages[-1])})
    budget = {}
    for name in {name for change in deltas for name in change}:
        path = [stage[name] for stage in stages]
        if all(value.quantum is not None for value in path[1:]) and path[0].quantum is not None:
            budget[name] = torch.zeros_like(path[0].value)
            continue
        error = torch.zeros_like(path[0].value)
        for value in (*path[1:], *reversed(path[:-1])):
            error = error + u * (value.ceiling() + error) + eta
        if m.mixed:
            for change in deltas:
                if name in change:
                    error = error + u * change[name].ceiling() + eta
        budget[name] = error
    return budget
