"""Budget of the affine block map of Bat: W + W D + D, undone by (M - D)(I + D)^-1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site
from peftcheck.oracle.shards import bat_merge, bat_merged, shards_of, whole_of
from peftcheck.rounding import Bounded
from peftcheck.rounding_linalg import invert, working


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> dict[str, Tensor]:
    """Bound the round trip, block by block: abs(W) R + (abs(F) + abs(g)) abs(X) + abs(h), with X near (I + D)^-1.

    D is stored, the same at merge and at unmerge. With F what merging rounds, g what subtracting D does, h what the
    product with the computed inverse X' does, and N the matrix found when unmerging, abs(N - M) <= E:

        M = W (I + D) + D + F,    W' = (N - D + g) X' + h,
        W' - W = W ((I + D) X' - I) + (N - M + F + g) X' + h,
        E <- abs(W) R + (E + abs(F) + abs(g)) abs(X') + abs(h).

    The inverse is that of A' = fl(I + D), off by d <= u (1 + abs(D)) on the diagonal, so that
    R = abs(I + D) abs(X' - A'^-1) + d abs(A'^-1). Several adapters: from the last back to the first.
    """
    stages: list[Base] = [base]
    for site in sites:
        stages.append({**stages[-1], **bat_merge(m, site, stages[-1])})
    behind = torch.zeros_like(base["weight"].value)
    for site, before, after in zip(reversed(sites), reversed(stages[:-1]), reversed(stages[1:]), strict=True):
        behind = _back(m, site, before["weight"], after["weight"], behind)
    return {"weight": torch.nan_to_num(behind, nan=m.base.store.largest, posinf=m.base.store.largest)}


def _back(m: Machine, site: Site, before: Bounded, after: Bounded, behind: Tensor) -> Tensor:
    ar, d = working(m.adapter), site.tensors["D"]
    r = d.value.shape[-1]
    start, end, behind = (shards_of(t, r) for t in (before.ceiling(), after.ceiling(), behind))
    size = Bounded(d.value.abs())
    eye = torch.eye(r, dtype=torch.float64)
    shifted = ar.add(Bounded(eye.expand_as(d.value)), d)
    diagonal = torch.where(eye > 0, shifted.bound, torch.zeros_like(shifted.bound))
    inverse, fresh = invert(ar, Bounded(eye + d.value, diagonal))
    x = inverse.ceiling()
    residual = (eye + d.value).abs() @ fresh + diagonal @ (x + fresh)
    rounded = bat_merged(m, ar, size, Bounded(start)).bound
    difference = ar.add(Bounded(end + behind), size)
    product = ar.matmul(Bounded(difference.ceiling()), Bounded(x))
    for store in {m.adapter.store.dtype: m.adapter, m.base.store.dtype: m.base}.values():
        product = store.rounded(product) if store.store.dtype != ar.store.dtype else product
    return whole_of(start @ residual + (behind + rounded + difference.bound) @ x + product.bound)
