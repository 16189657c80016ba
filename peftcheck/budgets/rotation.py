"""Budgets of methods that merge by multiplying with a matrix: OFT, BOFT, HRA, RoAd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site, Turn
from peftcheck.rounding import Bounded
from peftcheck.rounding_linalg import flushing_matmul


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip: abs(W) abs(T X - I) + abs(F) abs(X) + abs(G), with F and G the products' roundings.

    Let T' and X' be the matrices that the machine multiplies by; they are the same at every merge and unmerge, so
    that only their product counts, not how far T' is from the T of the paper. For adapters k = 1 ... K in order

        M_k = M_{k-1} T'_k + F_k,              abs(F_k) <= fl(M_{k-1} T'_k),
        N_{k-1} = N_k X'_k + G_k,  N_K = M_K,  abs(G_k) <= fl(N_k X'_k),

    with fl(.) the error of one product: gamma(n) abs(.) abs(.), stored in the arithmetic of the product, and once more
    in the base's where that differs. Then for the difference D_k >= abs(N_k - M_k), from D_K = 0 down:

        N_{k-1} - M_{k-1} = M_{k-1} (T' X' - I) + F_k X' + (N_k - M_k) X' + G_k,
        D_{k-1} = abs(M_{k-1}) R_k + (fl(M_{k-1} T'_k) + D_k) abs(X'_k) + fl((abs(M_k) + D_k) abs(X'_k)),

    and D_0 is the budget. R_k >= abs(T' X' - I) is the method's own: how orthogonal the computed matrix is where it
    is undone by its transpose, how well it is inverted where it is inverted. Normwise this is at most

        (2 u + 2 gamma(n) + r) kappa(T) norm(W)  to first order, r = norm(R) / kappa(T),

    of which r is 2 u and gamma(3 n) for an elimination. A gain s on the rows multiplies F and is divided out again:
    fl(1 / s) is off by u relatively, and one more rounding follows.
    """
    turns = [formula.turn(m, site) for site in sites]
    stages: list[Base] = [base]
    for site in sites:
        stages.append({**stages[-1], **formula.merge(m, site, stages[-1])})
    fitting = [(turn, *pair) for turn, *pair in zip(turns, stages[:-1], stages[1:], strict=True) if turn is not None]
    if not fitting:
        return {"weight": torch.zeros_like(base["weight"].value)}
    budget = {}
    for name in [name for name in fitting[0][0].names if name in base]:
        behind = torch.zeros_like(fitting[-1][0].rows(name, base[name].value))
        for turn, before, after in reversed(fitting):
            start, end = (turn.rows(name, stage[name].ceiling()) for stage in (before, after))
            # where an inverse has no bound at all (infinity, or infinity times zero), finite numbers bound themselves
            largest = m.base.store.largest
            behind = torch.nan_to_num(_back(m, turn, start, end, behind), nan=largest, posinf=largest)
        budget[name] = fitting[0][0].back(name, behind)
    return budget


def _back(m: Machine, turn: Turn, start: Tensor, end: Tensor, behind: Tensor) -> Tensor:
    """Return D_{k-1} from abs(M_{k-1}), abs(M_k) and D_k."""
    t, x = turn.matrix.ceiling(), turn.inverse.ceiling()
    lost = start @ turn.residual
    if turn.gain is None:
        fresh = _product(m, turn, start, t).bound
        return lost + (fresh + behind) @ x + _product(m, turn, end + behind, x).bound
    u, gain = turn.arithmetic.store.u, turn.gain.value.abs()
    undone = Bounded((1 + u) / gain)
    fresh = _product(m, turn, start, t, Bounded(gain)).bound
    lost = lost * (1 + u) + u * start
    return lost + ((fresh + behind) @ x) * undone.value + _product(m, turn, end + behind, x, undone).bound


def _product(m: Machine, turn: Turn, left: Tensor, right: Tensor, gain: Bounded | None = None) -> Bounded:
    """Return the product of two nonnegative matrices with the bound of its roundings."""
    ar = turn.arithmetic
    product = flushing_matmul(ar, Bounded(left), Bounded(right), turn.n)
    if gain is not None:
        product = ar.mul(product, gain)
    return product if ar.store.dtype == m.base.store.dtype else m.base.rounded(product)
