"""Budgets of adapters of several methods on one layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from peftcheck.budgets import additive, rotation
from peftcheck.oracle.form import Base, Formula, Machine, Site
from peftcheck.oracle.mixed import formula_of, merge, method_of
from peftcheck.oracle.rotation import OFT


def _sums(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound additions that are undone in whichever order: each stage is the largest that any order passes through."""
    ways = [_stages(m, order, base) for order in permutations(sites)]
    levels = [torch.stack([way[k]["weight"].ceiling() for way in ways]).amax(0) for k in range(len(sites) + 1)]
    error, u = torch.zeros_like(levels[0]), m.base.store.roundoff
    if all(stage["weight"].quantum is not None for way in ways for stage in way):
        return {"weight": error}
    for level in (*levels[1:], *reversed(levels[:-1])):
        error = error + u * (level + error)
    return {"weight": error}


def _stages(m: Machine, sites: Sequence[Site], base: Base) -> list[Base]:
    stages: list[Base] = [base]
    for site in sites:
        stages.append({**stages[-1], **merge(m, site, stages[-1])})
    return stages


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip of additions, in any order, or of additions and rotations undone in reverse order.

    E <- E + u (abs(T) + E) over what the additions store, as in `additive`; the stored deltas cancel. With a rotation
    among them, undoing adapter k leaves M_{k-1} off by what its own round trip costs, and by the D that the ones
    after it left in M_k: an addition carries D over as it is, with one rounding of it, (1 + u)^2; a rotation
    multiplies by abs(X_k), in a product of which each entry is off by gamma(n) and two roundings more.
    """
    if all(method_of(site) != "oft" for site in sites):
        return _sums(m, sites, base)
    stages = _stages(m, sites, base)
    u, behind = m.base.store.roundoff, torch.zeros_like(base["weight"].value)
    for site, before in reversed(list(zip(sites, stages[:-1], strict=True))):
        if method_of(site) != "oft":
            own = additive.roundtrip(m, formula_of(site), [site], before)["weight"]
            behind = own + behind * (1 + u) ** 2
            continue
        own = rotation.roundtrip(m, OFT, [site], before)["weight"]
        turn = OFT.turn(m, site)
        if turn is not None:
            carried = turn.rows("weight", behind) @ turn.inverse.ceiling()
            behind = turn.back("weight", carried * (1 + m.adapter.store.gamma(turn.n + 2) + 2 * u))
        behind = own + behind
    return {"weight": behind}
