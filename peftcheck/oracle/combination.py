"""Weighted combinations of adapters, defined on full deltas: sums, trimming, sign election, random drops.

`Bounded` deltas go in and come out. Where a decision (which elements are among the largest, which sign prevails)
hangs on less than the bound of its operands, both answers are right, and the bound covers both.

Ilharco et al., Editing Models with Task Arithmetic, 2022, section 2: sum of w_i D_i. Yadav et al., TIES-Merging,
2023, algorithm 1: trim, elect, disjoint mean. Yu et al., Language Models are Super Mario (DARE), 2023, eq. 1-2:
drop with probability 1 - density, divide what is left by the density. The papers weigh nothing before the
election; weights multiply what the disjoint mean averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from peftcheck.rounding import Arithmetic, Bounded


@dataclass(frozen=True)
class Kind:
    """A way to combine.

    `prunes`: 'magnitude', 'random' or None; `elects`: a sign is elected per element, and those that agree are
    averaged; `rank` of the result: 'common' (that of all, which must agree), 'sum', or 'chosen'.
    """

    prunes: str | None
    elects: bool
    rank: str


KINDS: dict[str, Kind] = {
    "linear": Kind(None, False, "common"),
    "cat": Kind(None, False, "sum"),
    "svd": Kind(None, False, "chosen"),
    "ties": Kind("magnitude", True, "common"),
    "ties_svd": Kind("magnitude", True, "chosen"),
    "dare_linear": Kind("random", False, "common"),
    "dare_linear_svd": Kind("random", False, "chosen"),
    "dare_ties": Kind("random", True, "common"),
    "dare_ties_svd": Kind("random", True, "chosen"),
    "magnitude_prune": Kind("magnitude", False, "common"),
    "magnitude_prune_svd": Kind("magnitude", False, "chosen"),
}
DENSE = {  # what a pruning kind is at density 1, where nothing is pruned
    "magnitude_prune": "linear",
    "magnitude_prune_svd": "svd",
    "dare_linear": "linear",
    "dare_linear_svd": "svd",
    "dare_ties": "ties",
    "dare_ties_svd": "ties_svd",
}


def weighted_sum(ar: Arithmetic, deltas: Sequence[Bounded], weights: Sequence[float]) -> Bounded:
    """Return sum w_i D_i, one multiplication and one addition each, stored in between."""
    total: Bounded | None = None
    for delta, weight in zip(deltas, weights, strict=True):
        term = ar.scale(delta, weight)
        total = term if total is None else ar.add(total, term)
    if total is None:
        raise ValueError("nothing to combine")
    return total


def trimmed(delta: Bounded, density: float) -> Bounded:
    """Return the delta with all but the largest elements set to zero: density times their number, either way round.

    An element that certainly belongs to the largest keeps its bound, one that certainly does not becomes an exact
    zero; where magnitudes tie within their bounds the bound covers both.
    """
    if density >= 1:
        return delta
    count = delta.value.numel()
    few, many = math.floor(density * count), math.ceil(density * count)
    magnitude, error = delta.value.abs().flatten(), delta.bound.flatten()
    upper, lower = (magnitude + error).sort(descending=True).values, (magnitude - error).sort(descending=True).values
    kept = magnitude - error > upper[few] if few < count else torch.ones_like(magnitude, dtype=torch.bool)
    dropped = magnitude + error < lower[many - 1] if many else torch.ones_like(magnitude, dtype=torch.bool)
    kept &= torch.tensor(few > 0)
    shape = delta.value.shape
    kept, dropped = kept.reshape(shape), dropped.reshape(shape)
    value = torch.where(dropped, torch.zeros_like(delta.value), delta.value)
    either = ~kept & ~dropped
    return Bounded(value, torch.where(dropped, 0.0, delta.bound + either * delta.ceiling()))


def elected_mean(ar: Arithmetic, deltas: Sequence[Bounded], weights: Sequence[float], method: str) -> Bounded:
    """Return per element the mean of w_i D_i over the deltas whose sign is the elected one; zero where none is.

    `method`: 'total' elects the sign of the sum, 'frequency' that of the majority. Where the vote hangs on a
    rounding, or is drawn, any delta may be in the mean or not: the bound covers all of them.
    """
    signs = [torch.sign(delta.value) for delta in deltas]
    doubtful = [(delta.value.abs() <= delta.bound) & (delta.ceiling() > 0) for delta in deltas]
    if method == "frequency":
        votes = sum(signs)
        margin = sum(d.double() for d in doubtful)
    else:
        votes = sum(delta.value for delta in deltas)
        rounding = ar.store.gamma(len(deltas)) + len(deltas) * ar.store.u
        margin = sum(delta.bound + rounding * delta.ceiling() for delta in deltas)
    drawn = (votes.abs() <= margin) & (sum(s.abs() for s in signs) + sum(d.double() for d in doubtful) > 0)
    unsure = drawn | torch.stack(doubtful).any(0)
    sign = torch.where(votes >= 0, 1.0, -1.0)
    agree = [s == sign for s in signs]
    members = sum(a.double() for a in agree).clamp_min(1.0)
    chosen = [Bounded(d.value * a, d.bound * a) for d, a in zip(deltas, agree, strict=True)]
    mean = ar.div(weighted_sum(ar, chosen, weights), Bounded(members))
    reach = torch.stack([abs(w) * d.ceiling() for d, w in zip(deltas, weights, strict=True)]).amax(0)
    return Bounded(mean.value, mean.bound + unsure * (mean.value.abs() + reach * (1 + 4 * ar.store.u)))


def definition(
    ar: Arithmetic, kind: Kind, deltas: Sequence[Bounded], weights: Sequence[float], density: float, method: str
) -> Bounded:
    """Return what a kind that drops nothing at random makes of the deltas, before any truncation of the rank."""
    if kind.prunes == "magnitude":
        deltas = [trimmed(delta, density) for delta in deltas]
    if kind.elects:
        return elected_mean(ar, deltas, weights, method)
    return weighted_sum(ar, deltas, weights)


def drops(
    ar: Arithmetic, kind: Kind, deltas: Sequence[Bounded], weights: Sequence[float], density: float, method: str
) -> Iterator[tuple[tuple[bool, ...], Bounded]]:
    """Yield what each choice of kept deltas makes of every element: (which are kept, the result).

    A random drop decides element by element, so that each element of a right result is one of these 2^n.
    """
    rescaled = [ar.div(delta, Bounded(torch.tensor(density, dtype=torch.float64))) for delta in deltas]
    for kept in product((True, False), repeat=len(deltas)):
        left = [Bounded(d.value * k, d.bound * k) for d, k in zip(rescaled, kept, strict=True)]
        yield kept, elected_mean(ar, left, weights, method) if kind.elects else weighted_sum(ar, left, weights)


def tail(delta: Tensor, rank: int) -> float:
    """Return the distance (Frobenius) of a matrix or kernel to the nearest of `rank` (Eckart and Young, 1936)."""
    values = torch.linalg.svdvals(matrix(delta))
    return float(torch.linalg.vector_norm(values[rank:])) if rank < values.numel() else 0.0


def matrix(delta: Tensor) -> Tensor:
    """Return a weight as the matrix whose rank a low-rank adapter limits: kernels flattened behind the first axis."""
    return delta.reshape(delta.shape[0], -1)


def supports(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows and which columns of a weight (as a matrix) are not all zero."""
    nonzero = matrix(delta) != 0
    return nonzero.any(1), nonzero.any(0)


def crossing(deltas: Sequence[Tensor]) -> Tensor | None:
    """Return where rows of one delta meet columns of another, or None unless all of these are disjoint.

    With disjoint supports sum w_i D_i is zero there, whatever the weights: only B_i A_j with i != j reaches it.
    """
    spans = [supports(delta) for delta in deltas]
    for axis in (0, 1):
        if bool((sum(span[axis].int() for span in spans) > 1).any()):
            return None
    cross = torch.zeros_like(matrix(deltas[0]), dtype=torch.bool)
    for i, (rows, _) in enumerate(spans):
        for j, (_, columns) in enumerate(spans):
            if i != j:
                cross |= rows[:, None] & columns[None, :]
    return cross.reshape(deltas[0].shape)


def cross_share(pairs: Sequence[Sequence[Tensor]], combined: Tensor) -> float | None:
    """Return the share of the energy of `combined` in the products `pairs[i][j]` = B_i A_j with i != j.

    By least squares over all products; None where they do not determine the answer.
    """
    count = len(pairs)
    columns = torch.stack([pairs[i][j].flatten() for i in range(count) for j in range(count)], dim=1)
    size = float(torch.linalg.vector_norm(combined))
    if size == 0 or columns.shape[0] <= columns.shape[1] or int(torch.linalg.matrix_rank(columns)) < columns.shape[1]:
        return None
    fit = torch.linalg.lstsq(columns, combined.flatten()).solution
    apart = [i * count + j for i in range(count) for j in range(count) if i != j]
    return float(torch.linalg.vector_norm(columns[:, apart] @ fit[apart]) / size) ** 2
