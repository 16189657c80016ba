"""DoRA: a learned magnitude times the direction of the low-rank update, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, LayerSpec
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import channels, layer_output, oriented, rows
from peftcheck.oracle.lowrank import path, product
from peftcheck.rounding import Arithmetic, Bounded


def _inputs(spec: LayerSpec) -> tuple[int, ...]:
    """Return the dimensions of the stored weight over which one output sums."""
    if spec.kind == "conv1d-transformers" or spec.kind in EMBEDDINGS:
        return (0,)
    return tuple(range(1, 2 + len(spec.kernel)))


def _dense(spec: LayerSpec, weight: Bounded) -> Bounded:
    """Return a grouped kernel as the one that sees every input, with zeros for those of other groups."""
    if spec.groups == 1:
        return weight
    n_in, n_out = spec.n_in // spec.groups, spec.n_out // spec.groups

    def spread(t: Tensor) -> Tensor:
        dense = t.new_zeros(spec.n_out, spec.n_in, *spec.kernel)
        for group in range(spec.groups):
            own = slice(group * n_out, (group + 1) * n_out)
            dense[own, group * n_in : (group + 1) * n_in] = t[own]
        return dense

    return weight.map(spread)


def gain(m: Machine, site: Site, weight: Bounded) -> Bounded:
    """Return m / norm(W + D) in the shape that multiplies the stored weight; the norm is over an output's inputs."""
    direction = m.adapter.add(_dense(site.spec, weight), oriented(site.spec, product(m, site)))
    magnitude = rows(site.spec, site.tensors["magnitude"].map(lambda t: t.flatten()))
    return m.adapter.div(magnitude, m.adapter.norm(direction, _inputs(site.spec)))


def _step(m: Machine, site: Site, start: Bounded, weight: Bounded) -> tuple[Bounded, Bounded, Bounded]:
    """Return gain, W + D and their product, stored, where `weight` holds what earlier adapters made of `start`."""
    scale = gain(m, site, start)
    moved = m.adapter.add(weight, oriented(site.spec, product(m, site)))
    merged = m.adapter.mul(scale, moved)
    return scale, moved, m.base.rounded(merged) if m.mixed else merged


def round_trip(m: Machine, sites: Sequence[Site], start: Bounded) -> Tensor:
    """Bound how far merging the sites' adapters into `start` in one go and taking them out again moves it.

    The proof is in `budgets.normalized`.
    """
    error, weight, steps = torch.zeros_like(start.value), start, []
    for site in sites:
        scale, moved, merged = _step(m, site, start, weight)
        steps.append((scale, moved, weight))
        error = _stored(m.adapter, moved, error)
        error = _both(m, merged, scale.ceiling() * error)
        weight = merged
    for scale, moved, before in reversed(steps):
        error = _stored(m.adapter, moved, error / (scale.value.abs() - scale.bound).clamp_min(0.0))
        error = _both(m, before, error)
    return torch.nan_to_num(error, nan=torch.inf)


def _stored(ar: Arithmetic, result: Bounded, error: Tensor) -> Tensor:
    return error + ar.store.roundoff * (result.ceiling() + error) + ar.store.eta


def _both(m: Machine, result: Bounded, error: Tensor) -> Tensor:
    """Round as the adapter's arithmetic does, and again to the base's storage where that is another."""
    error = _stored(m.adapter, result, error)
    return _stored(m.base, result, error) if m.mixed else error


def replayed(m: Machine, sites: Sequence[Site], start: Bounded) -> Bounded:
    """Return the weight below the last of the sites' adapters.

    Its norm is that of the unmerged weight, so merging a further adapter takes the earlier ones out first and puts
    them back afterwards: one more round trip for each adapter but the first, none of which is undone.
    """
    for count in range(1, len(sites)):
        start = start.widened(round_trip(m, sites[:count], start))
    return start


def merge_many(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    """Return m_n (... m_1 (W + D_1) / norm(W + D_1) ... + D_n) / norm(W + D_n)."""
    start = replayed(m, sites, base["weight"])
    weight = start
    for site in sites:
        _, _, weight = _step(m, site, start, weight)
    return {"weight": weight}


def merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return m (W + D) / norm(W + D)."""
    return merge_many(m, (site,), base)


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return g (W + D) x + b with g = m / norm(W + D), in the form y + (g - 1)(y - b) + g D x.

    That is the same number, and the order in which an adapter that sits on a base layer's output has to compute it.
    Several adapters act one on the other's output, each with the norm of the base's own weight.
    """
    spec, bias = sites[0].spec, base.get("bias")
    y = layer_output(m.base, spec, base, x)
    below = m.base
    for site in sites:
        scale = channels(spec, gain(m, site, base["weight"]))
        change = m.adapter.mul(scale, path(m, site, x))
        if spec.kind in EMBEDDINGS:
            y = m.adapter.add(m.adapter.mul(scale, y), change)
            continue
        linear = y if bias is None else below.sub(y, _per_channel(spec, bias))
        more = m.adapter.sub(scale, Bounded(torch.ones_like(scale.value)))
        y = m.adapter.add(y, m.adapter.add(m.adapter.mul(more, linear), change))
        below = m.adapter
    return m.base.rounded(y) if m.mixed else y


def _per_channel(spec: LayerSpec, bias: Bounded) -> Bounded:
    return channels(spec, bias) if spec.kind in CONVOLUTIONS else bias


FORMULAS = {
    "dora": Formula(
        Family.NORMALIZED,
        merge,
        forward,
        "Liu et al., DoRA, 2024, eq. 5: m (W + B A) / norm(W + B A), the norm per output as in the authors' code",
        hints={"magnitude": "magnitude"},
        dyadic=False,
        merge_many=merge_many,
    )
}
