"""Budgets of methods that rescale the rows of W + D to a learned norm, DoRA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site
from peftcheck.oracle.normalized import replayed, round_trip


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip: 3u / (1 - u)^3 abs(M) / abs(g) + u abs(W) to first order, for one adapter.

    Unmerging divides by the very gain g that merging multiplied with (its norm is kept, and g = m / norm is computed
    alike both times), and subtracts the very delta D that was added: their own errors cancel. Four results are
    stored, with relative error u and absolute error eta each:

        S = W + D,   M = g S,   P = M / g = S,   W' = P - D = W,

        E <- E + u (abs(S) + E) + eta,            E <- abs(g) E + u (abs(M) + abs(g) E) + eta,
        E <- E / abs(g) + u (abs(S) + E / abs(g)) + eta,      E <- E + u (abs(W) + E) + eta.

    Since abs(S) = abs(M) / abs(g) the first three are the term in 3u. S, M and g are bounded by the oracle's value plus
    its bound (g from below where it divides), as the library's may differ from the oracle's. With an fp32 adapter on
    a half-precision base all four are computed in fp32, and M and W' are rounded once more to the base.

    Several adapters nest, and the error passes through each of them. Merging the k-th takes the k - 1 before it out
    and puts them back, from a weight that has moved by a round trip of k - 1 adapters: those add up.
    """
    start = base["weight"]
    moved = replayed(m, sites, start)
    return {"weight": moved.bound - start.bound + round_trip(m, sites, moved)}
