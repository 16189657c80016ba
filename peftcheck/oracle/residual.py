"""DEFT: the part of the weight in a subspace is taken out, another put in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import layer_output, oriented
from peftcheck.rounding import Arithmetic, Bounded, precision

_SINGLE = Arithmetic(precision(torch.float32))
"""The library announces that it computes the update in single precision, whatever the dtypes."""


def _transposed(form: Bounded) -> Bounded:
    return form.map(lambda t: t.transpose(0, 1))


def orthonormal(ar: Arithmetic, p: Bounded) -> Bounded:
    """Return the Q of P = Q R, (m, r), by Householder's reflections with their usual signs.

    Each of the r reflections errs by at most gamma(12 (m + 3)) of the norm of what it is applied to (Higham, 2nd ed.,
    lemmas 19.1-19.3, whose small constant is taken as 12), so that the computed Q is within sqrt(r) e of the Q of
    some P + E with norm(E) <= e norm(P), e = r gamma(12 (m + 3)). That one differs from the Q of P by at most
    sqrt(2) kappa(P) sqrt(r) e / (1 - kappa(P) sqrt(r) e) (section 19.9), all in Frobenius' norm. What P itself is off
    by adds to E.
    """
    m, r = p.value.shape
    q = torch.linalg.qr(p.value)[0]
    singular = torch.linalg.svdvals(p.value)
    off = float(torch.linalg.vector_norm(p.bound) / torch.linalg.vector_norm(p.value))
    e = r * ar.store.gamma(12 * (m + 3)) + off
    stretch = float(singular[0] / singular[-1]) * math.sqrt(r) * e if float(singular[-1]) > 0 else math.inf
    room = math.sqrt(2) * stretch / (1 - stretch) + math.sqrt(r) * e if stretch < 0.5 else math.inf
    return ar.rounded(Bounded(q, torch.full_like(q, room)))


def _projection(site: Site) -> tuple[Bounded, Bounded]:
    """Return Q (out, r) and right (out, r): the projector is Q right^T."""
    p = _SINGLE.rounded(site.tensors["P"])
    if site.adapter.option("decomposition") == "relu":
        return p, p.map(torch.relu)
    if p.value.shape[0] == 1:  # nothing to reflect
        one = Bounded(torch.ones_like(p.value))
        return one, one
    q = orthonormal(_SINGLE, p) if bool(torch.isfinite(p.ceiling()).all()) else _poisoned(p)
    return q, q


def _poisoned(p: Bounded) -> Bounded:
    """Return the basis of a matrix that is not finite, or not so in single precision.

    A column that is not finite makes its reflection NaN, and thereby all of Q; but the last column of a square matrix
    has no reflection, and what overflows in a cast only is left open.
    """
    rows, columns = p.value.shape
    reflected = p.value[:, : min(columns, rows - 1)]
    if bool(torch.isfinite(reflected).all()):
        return Bounded(torch.zeros_like(p.value), torch.full_like(p.value, torch.inf))
    return Bounded(torch.full_like(p.value, torch.nan))


def _injected(site: Site) -> Bounded | None:
    if "R" not in site.tensors:
        return None
    scale = site.adapter.alpha / min(site.adapter.rank, site.spec.n_out) if site.adapter.option("scaled") else 1.0
    return _SINGLE.scale(_SINGLE.rounded(site.tensors["R"]), scale)


def _change(m: Machine, site: Site, base: Base) -> Bounded:
    """Return Q (s R - right^T W), or -Q right^T W where nothing is put in, in the layer's orientation."""
    q, right = _projection(site)
    weight = _SINGLE.rounded(oriented(site.spec, base["weight"]))
    inside = _SINGLE.matmul(_transposed(right), weight)
    injected = _injected(site)
    inner = replace(inside, value=-inside.value) if injected is None else _SINGLE.sub(injected, inside)
    return m.base.rounded(oriented(site.spec, _SINGLE.matmul(q, inner)))


def merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return (I - Q right^T) W + s Q R."""
    return {"weight": m.base.add(base["weight"], _change(m, site, base))}


def merge_many(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    """Return W plus every adapter's change of W itself: what the forward of several adapters is, in any order."""
    weight = base["weight"]
    for site in sites:
        weight = m.base.add(weight, _change(m, site, base))
    return {"weight": weight}


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return y0 - sum Q right^T (y0 - b) + sum Q (s R x), with y0 = W x + b."""
    spec = sites[0].spec
    y = plain = _SINGLE.rounded(layer_output(m.base, spec, base, x))
    if "bias" in base:
        plain = _SINGLE.sub(plain, _SINGLE.rounded(base["bias"]))
    x = _SINGLE.rounded(x)
    for site in sites:
        q, right = _projection(site)
        y = _SINGLE.sub(y, _SINGLE.matmul(_SINGLE.matmul(plain, right), _transposed(q)))
        injected = _injected(site)
        if injected is not None:
            y = _SINGLE.add(y, _SINGLE.matmul(_SINGLE.matmul(x, _transposed(injected)), _transposed(q)))
    return m.base.rounded(y)


SOURCE = "PEFT's documentation of DeftConfig: W' = (I - P_proj) W + s Q R; Chen et al., PaRa, 2025: without Q R"

FORMULAS = {
    "deft": Formula(Family.STORED, merge, forward, SOURCE, merge_many=merge_many),
    "deft.qr": Formula(Family.STORED, merge, forward, SOURCE, merge_many=merge_many, dyadic=False),
}
