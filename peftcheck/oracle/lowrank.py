"""LoRA and what is built on a product of two factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, AdapterSpec, LayerSpec
from peftcheck.oracle.additive import forward_by_adding, merge_by_adding
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import convolve, layer_output, oriented, pointwise, scaled_lookup, with_bias
from peftcheck.rounding import Bounded, leaf


def scale(adapter: AdapterSpec) -> float:
    """Return alpha / r, or alpha / sqrt(r) with `rslora` (Kalajdzievski, 2023)."""
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.option("rslora") else adapter.rank)


def product(m: Machine, site: Site) -> Bounded:
    """Return s B A as a matrix (out, in) or kernel (out, in, *k), in the adapter's arithmetic.

    In a grouped convolution the outputs of a group see only their own share of the rank.
    """
    a, b = site.tensors["A"], site.tensors["B"]
    groups = site.spec.groups
    by_group = b.map(lambda t: t.reshape(groups, t.shape[0] // groups, -1))
    matrix = m.adapter.matmul(by_group, a.map(lambda t: t.reshape(groups, t.shape[0] // groups, -1)))
    shape = (b.value.shape[0], *a.value.shape[1:])
    matrix = matrix.map(lambda t: t.reshape(shape))
    return m.adapter.scale(matrix, scale(site.adapter))


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return s B A in the layer's orientation, and s times the bias of B where the adapter has one."""
    change = {"weight": oriented(site.spec, product(m, site))}
    if "B.bias" in site.tensors:
        change["bias"] = m.adapter.scale(site.tensors["B.bias"], scale(site.adapter))
    return change


def path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return s (B (A x) + bias), each product stored in the adapter's dtype."""
    a, b, spec = site.tensors["A"], site.tensors["B"], site.spec
    if spec.kind in EMBEDDINGS:
        ids = x.value.long()
        hidden = a.map(lambda t: t.t()[ids])
        y = m.adapter.scale(m.adapter.matmul(hidden, b.map(torch.t)), scale(site.adapter))
        return y if spec.scale == 1.0 else scaled_lookup(m.base, spec, y)
    x = m.adapter.rounded(x)
    if spec.kind in CONVOLUTIONS:
        y = convolve(m.adapter, _second(spec, b), b, convolve(m.adapter, _first(spec, a), a, x))
    else:
        hidden = m.adapter.matmul(x, a.map(torch.t))
        y = m.adapter.matmul(hidden, b.map(torch.t))
    y = with_bias(m.adapter, spec, y, site.tensors.get("B.bias"))
    return m.adapter.scale(y, scale(site.adapter))


def _first(spec: LayerSpec, a: Bounded) -> LayerSpec:
    """Return the spec of the convolution by A, which sees all channels or those of a group."""
    return replace(spec, groups=spec.n_in // a.value.shape[1])


def _second(spec: LayerSpec, b: Bounded) -> LayerSpec:
    """Return the spec of the 1x1 convolution by B, grouped like the layer where B is narrower than the rank."""
    return replace(pointwise(spec), groups=spec.groups)


def _in_attention(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return s B A of the stacked projections of query, key and value, and of the output projection, each with its own."""
    change, plain = {}, replace(site.spec, kind="linear")
    for prefix, weight, bias in (("", "in_proj_weight", "in_proj_bias"), ("out.", "out_proj.weight", "out_proj.bias")):
        own = {role: site.tensors[prefix + role] for role in ("A", "B", "B.bias") if prefix + role in site.tensors}
        found = delta(m, replace(site, spec=plain, tensors=own))
        change |= {name: found[kind] for kind, name in (("weight", weight), ("bias", bias)) if kind in found}
    return change


def any_delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return what an adapter adds to each tensor of a layer of any kind."""
    return _in_attention(m, site) if site.spec.kind == "mha" else delta(m, site)


_merge, _forward = merge_by_adding(any_delta), forward_by_adding(path)


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return W x + b + sum of s B A x; an attention layer's on weights that hold the sum, as it has no path beside them."""
    if sites[0].spec.kind == "mha":
        held = dict(base)
        for site in sites:
            for name, change in any_delta(m, site).items():
                held.setdefault(name, leaf(torch.zeros_like(change.value), m.exact))  # a bias of the adapter's alone
            held |= _merge(m, site, held)
        return layer_output(m.base, sites[0].spec, held, x)
    return _forward(m, sites, base, x)


LORA = Formula(Family.ADDITIVE, _merge, forward, "Hu et al., LoRA, 2021, eq. 3: W + (alpha / r) B A", delta=any_delta)

FORMULAS = {"lora": LORA}
