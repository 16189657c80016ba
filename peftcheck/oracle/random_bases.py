"""Trained scales around frozen random matrices: RandLoRA, PVeRA in evaluation, TinyLoRA."""

from __future__ import annotations

from dataclasses import replace

import torch

from peftcheck.case import EMBEDDINGS
from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Family, Machine, Site, unknown
from peftcheck.oracle.layers import oriented, scaled_lookup
from peftcheck.rounding import Bounded


def _transposed(factor: Bounded) -> Bounded:
    return factor.map(lambda t: t.transpose(0, 1))


def _bases(m: Machine, site: Site) -> tuple[Bounded, Bounded]:
    """Return RandLoRA's left and right factor, (out, N r) and (N r, in).

    With l the smaller and L the larger of the layer's two widths: the frozen A (r, l) stands in every base, scaled by
    the trained lambda (r, N) and gamma (N, l); the frozen B holds N r columns of length L. The paper leaves open which
    of B's independent random columns belongs to which base: column k N + n belongs to entry k of base n.
    """
    lambdas, gamma = site.tensors["lambda"], site.tensors["gamma"]
    r, n = lambdas.value.shape
    small, large = sorted((site.spec.n_in, site.spec.n_out))
    a = site.tensors["A"].map(lambda t: t[:r, :1, :small])
    b = site.tensors["B"].map(lambda t: t[:large, :n, :r].flatten(1))
    scaled = m.adapter.mul(m.adapter.mul(lambdas.map(lambda t: t.unsqueeze(2)), a), gamma.map(lambda t: t.unsqueeze(0)))
    rows = scaled.map(lambda t: t.flatten(0, 1))
    return (b, rows) if site.spec.n_in == small else (_transposed(rows), _transposed(b))


def randlora(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return (alpha / r) sum_n B_n diag(lambda_n) A diag(gamma_n)."""
    left, right = _bases(m, site)
    product = m.adapter.matmul(left, right)
    return {"weight": oriented(site.spec, m.adapter.scale(product, site.adapter.alpha / site.adapter.rank))}


def randlora_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return (alpha / r) times the left factor applied to the right one applied to x."""
    left, right = _bases(m, site)
    hidden = m.adapter.matmul(x, _transposed(right))
    return m.adapter.scale(m.adapter.matmul(hidden, _transposed(left)), site.adapter.alpha / site.adapter.rank)


def _means(site: Site) -> tuple[Bounded, Bounded, Bounded, Bounded]:
    """Return the parts of PVeRA that hold the mean of its distribution: A (r, in), B (out, r), d (r), b (out)."""
    spec, b = site.spec, site.tensors["b"]
    r = site.tensors["d"].value.numel() // 2
    d = site.tensors["d"].map(lambda t: t[:r])
    return (
        site.tensors["A"].map(lambda t: t[: t.shape[0] // 2, : spec.n_in][:r]),
        site.tensors["B"].map(lambda t: t[: spec.n_out, :r]),
        d,
        b,
    )


def pvera(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return diag(b) B diag(d) A of the means: in evaluation nothing is sampled."""
    a, b_matrix, d, b = _means(site)
    left = m.adapter.mul(b.map(lambda t: t.unsqueeze(1)), b_matrix)
    right = m.adapter.mul(d.map(lambda t: t.unsqueeze(1)), a)
    return {"weight": oriented(site.spec, m.adapter.matmul(left, right))}


def pvera_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return b * (B (d * (A x)))."""
    a, b_matrix, d, b = _means(site)
    hidden = m.adapter.mul(m.adapter.matmul(x, _transposed(a)), d)
    return m.adapter.mul(m.adapter.matmul(hidden, _transposed(b_matrix)), b)


def _mixed(m: Machine, site: Site) -> Bounded:
    """Return R = sum_i v_i P_i, (r, r), for the one trained vector that all tied layers share."""
    v = next(form for role, form in site.tensors.items() if role.startswith("v"))
    return m.adapter.bilinear(lambda s, p: torch.einsum("i,ijk->jk", s, p), v, site.tensors["P"], v.value.numel())


def _fits(site: Site) -> bool:
    """Return whether the frozen A and B have the widths of the layer's weight."""
    a, b, spec = site.tensors["A"].value, site.tensors["B"].value, site.spec
    wide, tall = (spec.n_out, spec.n_in) if spec.kind in EMBEDDINGS else (spec.n_in, spec.n_out)
    return a.shape[1] == wide and b.shape[0] == tall


def tinylora(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return B R A, with the frozen A (r, in) and B (out, r) of the base's singular vectors."""
    if not _fits(site):
        return {"weight": unknown(site.spec.weight_shape)}
    product = m.adapter.matmul(m.adapter.matmul(site.tensors["B"], _mixed(m, site)), site.tensors["A"])
    if site.spec.kind in EMBEDDINGS:  # the table (entries, dimension) is itself the matrix that was decomposed
        return {"weight": product}
    return {"weight": oriented(site.spec, product)}


def tinylora_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return B (R (A x)), or the looked-up row of B times R times A."""
    if not _fits(site):
        return unknown((*x.value.shape[:-1], site.spec.n_out))
    a, b, r = site.tensors["A"], site.tensors["B"], _mixed(m, site)
    if site.spec.kind in EMBEDDINGS:
        found = b.map(lambda t: t[x.value.long()])
        # what a library casts to the base's dtype before it multiplies, or multiplies first: the coarser bounds both
        ar = m.base if m.base.store.u > m.adapter.store.u else m.adapter
        found, r, a = (ar.rounded(form) for form in (found, r, a))
        y = ar.matmul(ar.matmul(found, r), a)
        return y if site.spec.scale == 1.0 else scaled_lookup(m.base, site.spec, y)
    hidden = m.adapter.matmul(m.adapter.matmul(x, _transposed(a)), _transposed(r))
    return m.adapter.matmul(hidden, _transposed(b))


FORMULAS = {
    "randlora": replace(
        additive(
            randlora,
            randlora_path,
            "Albert et al., RandLoRA, 2025, section 4: W + sum_n B_n Lambda_n A Gamma_n; scaled by alpha / r",
            hints={"A": "projection", "B": "projection"},
        ),
        family=Family.STORED,  # the change of a half-precision adapter stays in single precision
    ),
    "pvera": additive(
        pvera,
        pvera_path,
        "PVeRA, arXiv 2512.07703, 2025: VeRA (Kopiczko et al., 2023, eq. 2) on the mean half of A and d in evaluation",
        hints={"A": "projection", "B": "projection"},
    ),
    "tinylora": additive(
        tinylora,
        tinylora_path,
        "Learning to Reason in 13 Parameters (TinyLoRA), arXiv 2602.04118, 2026: W + B (sum_i v_i P_i) A",
        hints={"A": "projection", "B": "projection", "P": "projection"},
    ),
}
