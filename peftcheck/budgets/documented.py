"""Bounds for inexactness that a library announces: what exceeds budget + bound is a defect of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site
from peftcheck.rounding import Bounded

IA3_EPSILON = 1e-8


def ia3_epsilon(m: Machine, formula: Formula, sites: Sequence[Site], base: Base, cycles: int) -> dict[str, Tensor]:
    """Bound what dividing by s + 1e-8 instead of s adds to `cycles` round trips: about eps / abs(s + eps) abs(W) each.

    W' = W s / (s + eps), so W' - W = -eps / (s + eps) W. The divisor is rounded to the adapter's dtype, which costs
    v / (1 - v) < 2 v relatively; what the quotient adds to the round trip's own errors is of their second order and
    within the rest of the 2 v. Where the round trip's budget is zero, since s W is exact, the quotient by s + eps
    still rounds: another 2 u. Over several adapters and cycles the relative errors compound: prod(1 + r_k) - 1.
    """
    bounds: dict[str, Tensor] = {}
    ones = {name: Bounded(torch.ones_like(value.value)) for name, value in base.items()}
    rounding = 2 * m.adapter.store.roundoff + (2 * m.base.store.roundoff if m.exact else 0.0)
    for site in (*sites,) * cycles:
        for name, gain in formula.merge(m, site, ones).items():
            relative = IA3_EPSILON / (gain.value + IA3_EPSILON).abs() + rounding
            bounds[name] = (1 + bounds.get(name, torch.zeros_like(relative))) * (1 + relative) - 1
    return {name: bound * base[name].value.abs() for name, bound in bounds.items()}


BOUNDS: dict[str, Callable[..., dict[str, Tensor]]] = {"ia3.epsilon": ia3_epsilon}
