"""What merges and unmerges make of quantized weights: closed forms, each followed by the error of its grid.

A rule (value, error) -> bound says what requantizing any T within `error` of `value` may cost (`grids`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site, Turn
from peftcheck.rounding import Bounded

Rule = Callable[[Tensor, Tensor], Tensor]


def cast(m: Machine, base: Bounded) -> Bounded:
    """Return the dense values as a library may first store them: in the base's dtype, at a cost known exactly."""
    moved = (base.value.to(m.base.store.dtype).double() - base.value).abs()
    return base.widened(moved) if bool((moved > 0).any()) else base


def merged(m: Machine, formula: Formula, sites: Sequence[Site], base: Base, rule: Rule) -> Base:
    """Return the tensors after the adapters have been merged in order, each merge requantized: T = DQ(W) + D, b(T).

    The bound of T (the roundings of the merge itself) carries on, and every requantization adds b at whatever T may
    be. Methods that multiply pass on what they received times their gain: running error analysis does it by itself.
    """
    now: Base = {**base, "weight": cast(m, base["weight"])}
    changed: Base = {}
    for site in sites:
        made = formula.merge(m, site, now)
        if "weight" in made:
            made = {**made, "weight": requantized(made["weight"], rule)}
        changed, now = {**changed, **made}, {**now, **made}
        now = {**now, "weight": cast(m, now["weight"])}
    return changed


def requantized(target: Bounded, rule: Rule) -> Bounded:
    """Return T with b(T) added to its bound."""
    return target.widened(rule(target.value, target.bound))


def unmerged(m: Machine, formula: Formula, sites: Sequence[Site], merged_base: Base, rule: Rule) -> Base | None:
    """Return the tensors after the adapters have been taken out again, last first: U = DQ(M) - D, b(U) each time.

    None for a method that does not come back by subtraction or by a matrix.
    """
    now: Base = {**merged_base, "weight": cast(m, merged_base["weight"])}
    for site in reversed(sites):
        back = _back(m, formula, site, now)
        if back is None:
            return None
        if "weight" in back:
            back = {**back, "weight": requantized(back["weight"], rule)}
        now = {**now, **back}
        now = {**now, "weight": cast(m, now["weight"])}
    return now


def _back(m: Machine, formula: Formula, site: Site, now: Base) -> Base | None:
    if formula.delta is not None:
        change = formula.delta(m, site)
        return {name: m.base.sub(now[name], m.base.rounded(form)) for name, form in change.items() if name in now}
    if formula.turn is not None:
        turn = formula.turn(m, site)
        return (
            {} if turn is None else {name: _turned_back(m, turn, name, now[name]) for name in turn.names if name in now}
        )
    return None


def _turned_back(m: Machine, turn: Turn, name: str, tensor: Bounded) -> Bounded:
    """Return a tensor times the inverse of the matrix that it was multiplied by, its rows divided by the gain."""
    rows = tensor.map(lambda t: turn.rows(name, t))
    undone = turn.arithmetic.bilinear(torch.matmul, rows, turn.inverse, turn.n)
    if turn.gain is not None:
        undone = turn.arithmetic.div(undone, turn.gain)
    return m.base.rounded(undone.map(lambda t: turn.back(name, t)))


def cycled(m: Machine, formula: Formula, sites: Sequence[Site], base: Base, rule: Rule, cycles: int) -> Base | None:
    """Return the tensors after `cycles` merges and unmerges, each from where the last one ended.

    An additive method goes back to W each time, so that the value of the k-th trip is W again and only the bound has
    grown: by b(T) + b(U) a trip, with T and U anywhere within it.
    """
    now: Base | None = base
    for _ in range(cycles):
        out = merged(m, formula, sites, now, rule)
        now = unmerged(m, formula, sites, {**now, **out}, rule)
        if now is None:
            return None
    return now
