"""VeRA: vectors around random projections that all layers share."""

from __future__ import annotations

from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Machine, Site
from peftcheck.oracle.layers import oriented
from peftcheck.rounding import Bounded


def _factors(site: Site) -> tuple[Bounded, Bounded, Bounded, Bounded]:
    """Return A (r, in) and B (out, r), cut out of the shared projections, and the vectors d (r) and b (out)."""
    d, b = site.tensors["d"], site.tensors["b"]
    r, n_in, n_out = d.value.numel(), site.spec.n_in, site.spec.n_out
    a_cut = site.tensors["A"].map(lambda t: t[:r, :n_in])
    return a_cut, site.tensors["B"].map(lambda t: t[:n_out, :r]), d, b


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return diag(b) B diag(d) A in the layer's orientation."""
    a, b_matrix, d, b = _factors(site)
    left = m.adapter.mul(b.map(lambda t: t.unsqueeze(1)), b_matrix)
    right = m.adapter.mul(d.map(lambda t: t.unsqueeze(1)), a)
    return {"weight": oriented(site.spec, m.adapter.matmul(left, right))}


def path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return b * (B (d * (A x)))."""
    a, b_matrix, d, b = _factors(site)
    hidden = m.adapter.mul(m.adapter.matmul(x, a.map(lambda t: t.t())), d)
    return m.adapter.mul(m.adapter.matmul(hidden, b_matrix.map(lambda t: t.t())), b)


FORMULAS = {
    "vera": additive(
        delta,
        path,
        "Kopiczko et al., VeRA, 2023, eq. 2: W x + diag(b) B diag(d) A x",
        hints={"A": "projection", "B": "projection"},
    )
}
