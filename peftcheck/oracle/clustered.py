"""AdaMSS: rows of the weight grouped into subspaces, each with low-rank factors of its own."""

from __future__ import annotations

import torch

from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Machine, Site, unknown
from peftcheck.rounding import Arithmetic, Bounded


def _factors(site: Site) -> list[tuple[Bounded, Bounded]]:
    """Return B_k (rows of subspace k, r_k) and A_k (r_k, r) of every subspace."""
    count = sum(role.startswith("A.") for role in site.tensors)
    return [(site.tensors[f"B.{k}"], site.tensors[f"A.{k}"]) for k in range(count)]


def _placed(site: Site, dim: int, parts: list[Bounded]) -> Bounded:
    """Put what belongs to the rows of each subspace where those rows stand, zeros elsewhere."""
    rows = site.tensors["rows"].value.long()

    def place(tensors: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(tensors, dim)
        shape = list(joined.shape)
        shape[dim] = site.spec.n_out
        return torch.zeros(shape, dtype=torch.float64).index_copy(dim, rows, joined)

    return Bounded(place([part.value for part in parts]), place([part.bound for part in parts]))


def _fit(site: Site) -> bool:
    """Return whether the factors fit each other and the layer (else nothing can be said of them)."""
    rank, wide = site.tensors["basis"].value.shape
    inner = all(b.value.shape[1] == a.value.shape[0] and a.value.shape[1] == rank for b, a in _factors(site))
    return inner and wide == site.spec.n_in + site.spec.bias


def _change(ar: Arithmetic, site: Site) -> Bounded:
    """Return the change of [W b], (out, in [+ 1]): B_k A_k V in the rows of subspace k."""
    basis = site.tensors["basis"]
    if not _fit(site):
        return unknown((site.spec.n_out, site.spec.n_in + site.spec.bias))
    return _placed(site, 0, [ar.matmul(ar.matmul(b, a), basis) for b, a in _factors(site)])


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return the change of the weight and, where the layer has a bias, of the bias: the last column."""
    change = _change(m.adapter, site)
    if not site.spec.bias:
        return {"weight": change}
    return {"weight": change.map(lambda t: t[:, :-1]), "bias": change.map(lambda t: t[:, -1])}


def path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return B_k (A_k (V [x 1])) for every subspace; the factors are cast to the base's dtype first."""
    ar = m.base
    if not _fit(site):
        return unknown((*x.value.shape[:-1], site.spec.n_out))
    if site.spec.bias:
        ones = torch.ones(*x.value.shape[:-1], 1, dtype=torch.float64)
        x = Bounded(torch.cat([x.value, ones], -1), torch.cat([x.bound, 0 * ones], -1))
    projected = ar.matmul(x, ar.rounded(site.tensors["basis"]).map(torch.t))
    parts = [
        ar.matmul(ar.matmul(projected, ar.rounded(a).map(torch.t)), ar.rounded(b).map(torch.t))
        for b, a in _factors(site)
    ]
    return _placed(site, -1, parts)


FORMULAS = {
    "adamss": additive(
        delta,
        path,
        "Zheng et al., AdaMSS, 2025, eq. 8: the rows of subspace k change by B_k A_k V, V the leading right singular "
        "vectors of [W b]",
        hints={"basis": "projection"},
        dyadic=False,
    )
}
