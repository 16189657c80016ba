"""Deltas that are elementwise or Kronecker products of low-rank factors: LoHa and LoKr."""

from __future__ import annotations

import torch

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.oracle.additive import Delta, Path, additive
from peftcheck.oracle.form import Machine, Site
from peftcheck.oracle.layers import linear_map
from peftcheck.rounding import Arithmetic, Bounded


def path_of(delta: Delta) -> Path:
    """Return the path of a method that has no cheaper one than the layer itself, without bias, on its delta."""

    def path(m: Machine, site: Site, x: Bounded) -> Bounded:
        return linear_map(m.adapter, site.spec, delta(m, site)["weight"], x)

    return path


def _scale(adapter: AdapterSpec) -> float:
    return adapter.alpha / adapter.rank


def _weight_shape(spec: LayerSpec) -> tuple[int, ...]:
    return (spec.n_out, spec.n_in // spec.groups, *spec.kernel)


def _shaped(spec: LayerSpec, matrix: Bounded) -> Bounded:
    return matrix.map(lambda t: t.reshape(_weight_shape(spec)))


def unfolded(ar: Arithmetic, core: Bounded, a: Bounded, b: Bounded) -> Bounded:
    """Return the Tucker-2 product `sum_ij core[i, j, *k] a[i, p] b[j, q]` as (p, q, *k).

    core (r, r, *k), a (r, p), b (r, q). Either factor may be contracted first: the bound is that of the worse order,
    and nothing rounds only where neither order rounds.
    """
    kernel = core.value.shape[2:]
    flat, r = core.map(lambda t: t.flatten(2) if t.ndim > 2 else t.unsqueeze(2)), core.value.shape[0]
    by_b = ar.bilinear(lambda t, f: torch.einsum("ijk,jq->iqk", t, f), flat, b, r)
    first = ar.bilinear(lambda t, f: torch.einsum("iqk,ip->pqk", t, f), by_b, a, r)
    by_a = ar.bilinear(lambda t, f: torch.einsum("ijk,ip->pjk", t, f), flat, a, r)
    second = ar.bilinear(lambda t, f: torch.einsum("pjk,jq->pqk", t, f), by_a, b, r)
    if first.error is not None or second.error is not None:
        first = Bounded(first.value, torch.maximum(first.bound, second.bound))
    return first.map(lambda t: t.reshape(*t.shape[:2], *kernel))


def _hadamard_factor(m: Machine, site: Site, index: int) -> Bounded:
    a, b = site.tensors[f"w{index}.a"], site.tensors[f"w{index}.b"]
    if f"t{index}" in site.tensors:
        return unfolded(m.adapter, site.tensors[f"t{index}"], a, b)
    return m.adapter.matmul(a, b)


def loha(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return (alpha / r) (X1 Y1) * (X2 Y2), or the same of two Tucker-2 products for a convolution's kernel."""
    first, second = (_shaped(site.spec, _hadamard_factor(m, site, index)) for index in (1, 2))
    return {"weight": m.adapter.scale(m.adapter.mul(first, second), _scale(site.adapter))}


def _kronecker_factor(m: Machine, site: Site, index: int) -> Bounded:
    if f"w{index}" in site.tensors:
        return site.tensors[f"w{index}"]
    a, b = site.tensors[f"w{index}.a"], site.tensors[f"w{index}.b"]
    if f"t{index}" in site.tensors:
        return unfolded(m.adapter, site.tensors[f"t{index}"], a, b)
    return m.adapter.matmul(a, b)


def lokr(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return (alpha / r) C (x) D: entry (a b, c d) is C[a, c] D[b, d], at every position of a kernel.

    C (l, m) is full or a product of two factors; D (k, n, *kernel) is full, a product, or a Tucker-2 product. Where
    D comes as a matrix (k, n * kernel) it is the kernel unfolded over its inputs.
    """
    spec = site.spec
    out, width = _weight_shape(spec)[:2]
    c, d = _kronecker_factor(m, site, 1), _kronecker_factor(m, site, 2)
    rows, columns = c.value.shape
    c = c.map(lambda t: t.reshape(rows, 1, columns, 1, 1))
    d = d.map(lambda t: t.reshape(1, out // rows, 1, width // columns, -1))
    return {"weight": m.adapter.scale(_shaped(spec, m.adapter.mul(c, d)), _scale(site.adapter))}


FORMULAS = {
    "loha": additive(
        loha,
        path_of(loha),
        "Hyeon-Woo et al., FedPara, 2021, propositions 1 and 3, scaled by alpha / r as in Yeh et al., LyCORIS, 2023",
    ),
    "lokr": additive(
        lokr,
        path_of(lokr),
        "Yeh et al., LyCORIS, 2023, section 3.3.2: W + (alpha / r) C (x) (B A); Edalati et al., KronA, 2022",
    ),
}
