"""Budgets of methods that merge by multiplying elementwise, (IA)^3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site
from peftcheck.rounding import Bounded


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip: (2u + u^2) abs(W) + (eta / 2)(1 + 2u) / abs(s) + eta / 2 for one adapter.

    M = fl(s W) = s W (1 + d1) + e1, W' = fl(M / s) = (W (1 + d1) + e1 / s)(1 + d2) + e2. Without the eta terms a
    subnormal M would exceed the bound a thousand times. Over several adapters, in products T_k = s_k T_{k-1}:

        merging    E <- abs(s_k) E + u (abs(T_k) + abs(s_k) E) + eta,
        unmerging  E <- E / abs(s_k) + u (abs(T_{k-1}) + E / abs(s_k)) + eta.

    Half precision rounds each to fp32 first (`Precision.roundoff`), where it may underflow too; that, and because
    half of fp64's eta is no fp64 number, is why eta stands there whole.

    A correctly rounded quotient of an exact product is exact: the exact regime has budget zero (the library's
    divisor s + 1e-8 rounds to s below fp64). The factor s is what the closed form multiplies by, read off as the
    merge of a base of ones.
    """
    u, eta = m.base.store.roundoff, m.base.store.eta
    ones = {name: Bounded(torch.ones_like(value.value)) for name, value in base.items()}
    gains = [{name: value.value.abs() for name, value in formula.merge(m, site, ones).items()} for site in sites]
    stages: list[Base] = [base]
    for site in sites:
        stages.append({**stages[-1], **formula.merge(m, site, stages[-1])})
    budget = {}
    for name in gains[0]:
        path = [stage[name] for stage in stages]
        if all(value.quantum is not None for value in path):
            budget[name] = torch.zeros_like(path[0].value)
            continue
        error = torch.zeros_like(path[0].value)
        for gain, value in zip(gains, path[1:], strict=True):
            error = gain[name] * error
            error = error + u * (value.ceiling() + error) + eta
        for gain, value in zip(reversed(gains), reversed(path[:-1]), strict=True):
            error = error / gain[name]
            error = error + u * (value.ceiling() + error) + eta
        budget[name] = error
    return budget
