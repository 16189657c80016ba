"""HRA: the weight is multiplied by a chain of Householder reflections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from peftcheck.case import CONVOLUTIONS
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, Turn
from peftcheck.oracle.layers import convolve, layer_output, linear_map, with_bias
from peftcheck.oracle.turning import flat, merge_by_turning, turned_width, unflat
from peftcheck.rounding import Arithmetic, Bounded


def _column(u: Bounded, index: int) -> Bounded:
    return u.map(lambda t: t[:, index : index + 1])


def normalised(ar: Arithmetic, v: Bounded) -> Bounded:
    """Return the columns of v (n, any) over their norms.

    However far the machine's v' is off, an entry of v' / norm(v') is at most 1 up to the roundings of n + 1 squares,
    the root and the quotient, each below u: where cancellation has left no other bound, abs(v) + 1 + (n + 8) u holds.
    """
    unit = ar.div(v, ar.norm(v, 0))
    worst = unit.value.abs() + 1 + (v.value.shape[0] + 8) * ar.store.u
    return Bounded(unit.value, torch.fmin(unit.bound, worst))


def reflections(ar: Arithmetic, u: Bounded, backwards: bool = False) -> Bounded:
    """Return H_1 H_2 ... H_r, or H_r ... H_1, with H_i = I - 2 u_i u_i^T for the normalised columns of u (n, r).

    An elementwise bound grows threefold with every reflection; but a reflection leaves norms alone. With P' = P + E
    the machine's product, P' H + f is off by E H + f, where f is what this step adds: the rounding, and u' - u. Row
    by row norm2(E H + f) <= norm2(E) + norm2(f), which bounds every element of the row: the smaller bound holds.
    """
    n, r = u.value.shape
    unit = normalised(ar, u)
    product, rows = Bounded(torch.eye(n, dtype=torch.float64)), torch.zeros(n, 1, dtype=torch.float64)
    for index in reversed(range(r)) if backwards else range(r):
        v = _column(unit, index)
        stepped = ar.sub(product, _reflected(ar, product, v))
        size = Bounded(product.ceiling())
        fresh = ar.add(size, _reflected(ar, size, replace(v, value=v.value.abs()))).bound
        rows = rows + torch.linalg.vector_norm(fresh, dim=1, keepdim=True)
        rows = torch.fmin(rows, torch.linalg.vector_norm(stepped.bound, dim=1, keepdim=True))
        product = replace(stepped, error=torch.fmin(stepped.bound, rows))
    return product


def _reflected(ar: Arithmetic, product: Bounded, v: Bounded) -> Bounded:
    return ar.matmul(ar.matmul(ar.scale(product, 2.0), v), v.map(torch.t))


def orthogonal_reflection(ar: Arithmetic, u: Bounded) -> Bounded:
    """Return I - 2 V V^T for V the columns of u orthonormalised by (modified) Gram-Schmidt."""
    n, r = u.value.shape
    basis: list[Bounded] = []
    for index in range(r):
        v = _column(u, index)
        for earlier in basis:
            v = ar.sub(v, ar.mul(ar.matmul(earlier.map(torch.t), v), earlier))
        basis.append(normalised(ar, v))
    columns = Bounded(torch.cat([v.value for v in basis], 1), torch.cat([v.bound for v in basis], 1))
    product = ar.matmul(ar.scale(columns, 2.0), columns.map(torch.t))
    return ar.sub(Bounded(torch.eye(n, dtype=torch.float64)), product)


def _matrix(m: Machine, site: Site, backwards: bool = False) -> Bounded | None:
    u = site.tensors["u"]
    if site.spec.groups != 1 or u.value.shape[0] != turned_width(site.spec):
        return None
    if site.adapter.option("gram_schmidt"):
        return orthogonal_reflection(m.adapter, u)
    return reflections(m.adapter, u, backwards)


def turn(m: Machine, site: Site) -> Turn | None:
    """Return the product of reflections; unmerging multiplies by the product in reverse, computed anew.

    T X = I exactly, so that with the bounds e and f of the two products as computed
    abs(T' X' - I) <= e abs(X) + abs(T) f + e f.
    """
    matrix, inverse = _matrix(m, site), _matrix(m, site, backwards=True)
    if matrix is None or inverse is None:
        return None
    e, f = matrix.bound, inverse.bound
    residual = e @ inverse.value.abs() + matrix.value.abs() @ f + e @ f
    n = matrix.value.shape[0]
    return Turn(matrix, inverse, residual, n, m.adapter, flat, unflat(site.spec.weight_shape))


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return (W T_1 T_2 ...) x + b, the matrices multiplied first, all of it in the adapter's arithmetic."""
    spec, ar = sites[0].spec, m.adapter
    matrices = [_matrix(m, site) for site in sites]
    if any(matrix is None for matrix in matrices):
        return layer_output(m.base, spec, base, x)
    total = matrices[0]
    for matrix in matrices[1:]:
        total = ar.matmul(total, matrix)
    weight = ar.matmul(base["weight"].map(lambda t: t.flatten(1)), total)
    weight = weight.map(lambda t: t.reshape(spec.weight_shape))
    y = convolve(ar, spec, weight, x) if spec.kind in CONVOLUTIONS else linear_map(ar, spec, weight, x)
    return m.base.rounded(with_bias(ar, spec, y, base.get("bias")))


HRA = Formula(
    Family.ROTATION,
    merge_by_turning(turn),
    forward,
    "Yuan et al., Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection, 2024, eq. 3",
    hints={"u": "projection"},
    dyadic=False,
    turn=turn,
)

FORMULAS = {"hra": HRA}
