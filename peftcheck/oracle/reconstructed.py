"""Methods that make the adapted weight, or its change, out of the base weight: FRoD, PEANuT, OSF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, unknown
from peftcheck.oracle.layers import layer_output, linear_map, oriented
from peftcheck.oracle.sparse import scattered
from peftcheck.rounding import Arithmetic, Bounded


def _rotation(m: Machine, site: Site) -> Bounded:
    """Return FRoD's S + diag(lambda), (in, in), in the base's dtype; no entry of S is on the diagonal."""
    n = site.spec.n_in
    diagonal = torch.arange(n)
    entries = torch.cat([site.tensors["entries"].value.long(), torch.stack([diagonal, diagonal])], 1)
    values, scales = (m.base.rounded(site.tensors[role]) for role in ("values", "lambda"))
    quantum = None if values.quantum is None or scales.quantum is None else min(values.quantum, scales.quantum)
    error = None if values.error is None and scales.error is None else torch.cat([values.bound, scales.bound])
    both = Bounded(torch.cat([values.value, scales.value]), error, quantum)
    return scattered(both, entries, (n, n))


def _fits(site: Site) -> bool:
    """Return whether the projections, which the layers of a category share, have the widths of this layer's weight."""
    n_in, n_out = site.spec.n_in, site.spec.n_out
    shapes = {role: tuple(form.value.shape) for role, form in site.tensors.items()}
    square = shapes["V"] == (n_in, n_in) and shapes["U"] == (n_out, n_in) and shapes["lambda"] == (n_in,)
    return square and shapes["entries"][1] == shapes["values"][0]


def frod_weight(m: Machine, site: Site) -> Bounded:
    """Return U (S + diag(lambda)) V^T, (out, in)."""
    if not _fits(site):
        return unknown((site.spec.n_out, site.spec.n_in))
    left = m.base.matmul(site.tensors["U"], _rotation(m, site))
    return m.base.matmul(left, site.tensors["V"].map(torch.t))


def frod_merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return the reconstructed weight, reached as W plus its difference from W."""
    return frod_merge_many(m, (site,), base)


def frod_merge_many(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    """Return W plus every adapter's difference from W."""
    weight = base["weight"]
    for site in sites:
        difference = m.base.sub(oriented(site.spec, frod_weight(m, site)), base["weight"])
        weight = m.base.add(weight, difference)
    return {"weight": weight}


def _frod_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return U ((S + diag(lambda)) (V^T x)), the two parts of the middle factor apart or together."""
    if not _fits(site):
        return unknown((*x.value.shape[:-1], site.spec.n_out))
    turned = m.base.matmul(x, site.tensors["V"])
    diagonal = m.base.rounded(site.tensors["lambda"])
    rotation = _rotation(m, site)
    n = site.spec.n_in
    off = rotation.map(lambda t: t * (1 - torch.eye(n, dtype=t.dtype)))
    parts = m.base.add(m.base.matmul(turned, off.map(torch.t)), m.base.mul(turned, diagonal))
    return m.base.matmul(parts, site.tensors["U"].map(torch.t))


def frod_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return the reconstructed layer's output; of several adapters, the plain one plus each one's difference."""
    bias = base.get("bias")
    if len(sites) == 1:
        y = _frod_path(m, sites[0], x)
        return y if bias is None else m.base.join(y, bias)
    y = layer_output(m.base, sites[0].spec, base, x)
    plain = y if bias is None else m.base.sub(y, bias)
    for site in sites:
        y = m.base.sub(m.base.add(y, _frod_path(m, site, x)), plain)
    return y


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (torch.relu, 1.0),
    "tanh": (torch.tanh, 1.0),
    "sigmoid": (torch.sigmoid, 0.25),
    "silu": (F.silu, 1.1),
}
"""Each with a bound on its derivative: silu's largest is 1.0998."""


def _activated(ar: Arithmetic, name: str, x: Bounded) -> Bounded:
    function, slope = ACTIVATIONS[name]
    if name == "relu":  # rounds nothing
        return Bounded(function(x.value), x.error, x.quantum)
    # silu is a product with a logistic function, itself a quotient: some ulps more than one of a single function
    return ar.apply(x, function, slope, ulps=8)


def peanut_delta(m: Machine, site: Site, base: Base) -> Bounded:
    """Return s (B decoder(encoder(act(A W))))^T in the adapter's dtype, (out, in).

    act(A W), then encoders with an activation each, decoders likewise, each plus what its encoder was given.
    """
    ar, name = m.adapter, site.adapter.option("activation")
    weight = ar.rounded(base["weight"]).map(torch.t)

    def apply(role: str, x: Bounded) -> Bounded:
        return ar.matmul(x, site.tensors[role].map(torch.t))

    hidden = _activated(ar, name, apply("A", weight))
    depth, kept = site.adapter.option("depth"), []
    for level in range(depth):
        kept.append(hidden)
        hidden = _activated(ar, name, apply(f"encoder.{level}", hidden))
    for level in range(depth):
        hidden = ar.add(_activated(ar, name, apply(f"decoder.{level}", hidden)), kept.pop())
    return ar.scale(apply("B", hidden), site.adapter.alpha).map(torch.t)


def peanut_merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return W + Delta(W)."""
    return peanut_merge_many(m, (site,), base)


def peanut_merge_many(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    """Return W plus every adapter's change of W itself."""
    weight = base["weight"]
    for site in sites:
        weight = m.base.add(weight, m.base.rounded(peanut_delta(m, site, base)))
    return {"weight": weight}


def peanut_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return W x + b plus every adapter's Delta(W) x."""
    y = layer_output(m.base, sites[0].spec, base, x)
    for site in sites:
        change = linear_map(m.adapter, site.spec, peanut_delta(m, site, base), m.adapter.rounded(x))
        y = m.base.add(y, m.base.rounded(change))
    return y


def _singular(site: Site, suffix: str) -> tuple[Bounded, Bounded, Bounded]:
    return tuple(site.tensors[f"{name}{suffix}"] for name in ("U", "S", "V"))


def osf(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return U diag(s) V of the trained part minus the same of its start."""

    def product(suffix: str) -> Bounded:
        u, s, v = _singular(site, suffix)
        return m.adapter.matmul(m.adapter.mul(u, s), v)

    return {"weight": m.adapter.sub(product(""), product(".start"))}


def osf_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return the difference's output: both parts as one product of twice the width, cast to the base's dtype."""
    parts = []
    for suffix in ("", ".start"):
        u, s, v = _singular(site, suffix)
        hidden = m.adapter.matmul(m.adapter.rounded(x), v.map(torch.t))
        parts.append((hidden, m.adapter.mul(u, s).map(torch.t)))
    (h1, u1), (h2, u2) = parts
    hidden = _joined(h1, replace(h2, value=-h2.value), -1)
    return m.base.rounded(m.adapter.matmul(hidden, _joined(u1, u2, 0)))


def _joined(a: Bounded, b: Bounded, dim: int) -> Bounded:
    quantum = None if a.quantum is None or b.quantum is None else min(a.quantum, b.quantum)
    error = None if a.error is None and b.error is None else torch.cat([a.bound, b.bound], dim)
    return Bounded(torch.cat([a.value, b.value], dim), error, quantum)


FORMULAS = {
    "frod": Formula(
        Family.SNAPSHOT,
        frod_merge,
        frod_forward,
        "FRoD, AAAI 40(31), 2026: W' = U (S + diag(lambda)) V^T, S sparse, V shared by the layers of a category",
        hints={"U": "projection", "V": "projection"},
        merge_many=frod_merge_many,
    ),
    "peanut": Formula(
        Family.SNAPSHOT,
        peanut_merge,
        peanut_forward,
        "PEANuT, arXiv 2410.01870, 2024: W + Delta(W), a small network applied to the frozen weight",
        merge_many=peanut_merge_many,
    ),
    "osf": additive(
        osf,
        osf_path,
        "Nayak et al., Sculpting Subspaces (OSF), 2025: the low singular directions of W are trained",
        hints={"U.start": "projection", "S.start": "projection", "V.start": "projection"},
    ),
}
