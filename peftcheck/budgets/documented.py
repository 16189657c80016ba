"""Bounds for inexactness that a library announces: what exceeds budget + bound is a defect of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site

IA3_EPSILON = 1e-8


def ia3_epsilon(m: Machine, formula: Formula, sites: Sequence[Site], base: Base, cycles: int) -> dict[str, Tensor]:
    """Bound what dividing by s + 1e-8 instead of s adds to `cycles` round trips: about eps / abs(s + eps) abs(W) each.

    W' = W s / (s + eps), so W' - W = -eps / (s + eps) W. Over several adapters and cycles the relative errors
    compound: prod(1 + r_k) - 1. Even where s itself is a power of two the divisor is not: rounding it, and the
    product and quotient with it, costs (1 + u)^3 - 1 < 4 u relatively for each adapter.
    """
    bounds: dict[str, Tensor] = {}
    ones = {name: type(value)(torch.ones_like(value.value)) for name, value in base.items()}
    u = max(m.adapter.store.u, m.base.store.u)
    for site in (*sites,) * cycles:
        for name, gain in formula.merge(m, site, ones).items():
            relative = IA3_EPSILON / (gain.value + IA3_EPSILON).abs() + 4 * u
            bounds[name] = (1 + bounds.get(name, torch.zeros_like(relative))) * (1 + relative) - 1
    return {name: bound * base[name].value.abs() for name, bound in bounds.items()}


BOUNDS: dict[str, Callable[..., dict[str, Tensor]]] = {"ia3.epsilon": ia3_epsilon}
