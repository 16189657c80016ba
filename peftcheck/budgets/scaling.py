"""Budgets of methods that merge by multiplying elementwise, (IA)^3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip: (2u + u^2) abs(W) + (eta / 2)(1 + 2u) / abs(s) + eta / 2 for one adapter.

    M = fl(s W) = s W (1 + d1) + e1, W' = fl(M / s) = (W (1 + d1) + e1 / s)(1 + d2) + e2. Without the eta terms a
    subnormal M would exceed the bound a thousand times. Over several adapters, in products T_k = s_k T_{k-1}:

        merging    E <- abs(s_k) E + u (abs(T_k) + abs(s_k) E) + eta,
        unmerging  E <- E / abs(s_k) + u (abs(T_{k-1}) + E / abs(s_k)) + eta.

    Powers of two scale exactly: the exact regime has budget zero (the library's divisor s + 1e-8 rounds to s
    below fp64). The factor s is what the closed form multiplies by, read off as T_k / T_{k-1} of a base of ones.
    """
    u = m.base.store.u + (m.base.store.a if m.base.store.u != m.base.store.a else 0.0)
    eta = m.base.store.eta
    budget = {}
    ones = {name: type(value)(torch.ones_like(value.value)) for name, value in base.items()}
    gains = [{name: value.value for name, value in formula.merge(m, site, ones).items()} for site in sites]
    stages: list[Base] = [base]
    for site in sites:
        stages.append({**stages[-1], **formula.merge(m, site, stages[-1])})
    for name in gains[0]:
        path = [stage[name] for stage in stages]
        if all(value.quantum is not None for value in path):
            budget[name] = torch.zeros_like(path[0].value)
            continue
        error = torch.zeros_like(path[0].value)
        for gain, value in zip(gains, path[1:], strict=True):
            error = gain[name].abs() * error
            error = error + u * (value.value.abs() + error) + eta
        for gain, value in zip(reversed(gains), reversed(path[:-1]), strict=True):
            error = error / gain[name].abs()
            error = error + u * (value.value.abs() + error) + eta
        budget[name] = error
    return budget
