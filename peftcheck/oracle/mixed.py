"""Adapters of several methods on one layer: each one adapts what the ones before it have made of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch

from peftcheck.oracle import adaptive, lowrank, products
from peftcheck.oracle.additive import Path
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.rotation import OFT, oft_rotated
from peftcheck.rounding import Bounded

_ADDITIVE: dict[str, tuple[Formula, Path]] = {
    "lora": (lowrank.LORA, lowrank.path),
    "loha": (products.FORMULAS["loha"], products.path_of(products.loha)),
    "lokr": (products.FORMULAS["lokr"], products.path_of(products.lokr)),
    "adalora": (adaptive.FORMULAS["adalora"], adaptive.path),
}


def method_of(site: Site) -> str:
    """Return the name of the adapter's own method."""
    return site.adapter.option("method")


def path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return what the adapter's own method adds to the output."""
    return _ADDITIVE[method_of(site)][1](m, site, x)


def merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return the base merged by the adapter's own method: W + D, or W R^T."""
    return formula_of(site).merge(m, site, base)


def merge_many(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    """Return W + D_1 + ... + D_K, added in whichever order: the bound is the largest of all orders."""
    forms = [_in_order(m, order, base) for order in permutations(sites)]
    worst = torch.stack([form["weight"].bound for form in forms]).amax(0)
    exact = all(form["weight"].quantum is not None for form in forms)
    return {"weight": forms[0]["weight"] if exact else Bounded(forms[0]["weight"].value, worst)}


def _in_order(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    weight = base["weight"]
    for site in sites:
        weight = merge(m, site, {**base, "weight": weight})["weight"]
    return {"weight": weight}


def formula_of(site: Site) -> Formula:
    """Return the closed form of the adapter's own method."""
    return OFT if method_of(site) == "oft" else _ADDITIVE[method_of(site)][0]


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return f_K(x), f_0 the plain layer: f_k(x) = f_{k-1}(x) + D_k x, or f_{k-1}(R_k^T x) for a rotation."""
    *inner, last = sites
    if not inner:
        return formula_of(last).forward(m, [last], base, x)
    if method_of(last) == "oft":
        return forward(m, inner, base, m.base.rounded(oft_rotated(m, last, x)))
    return m.base.add(forward(m, inner, base, x), path(m, last, x))


_SOURCE = "PEFT's documentation of mixed adapter types: one method's layer wraps the other's, in the order of loading"

FORMULAS = {
    "mixed": Formula(Family.MIXED, merge, forward, _SOURCE, merge_many=merge_many),
    "mixed.adalora": Formula(
        Family.MIXED, merge, forward, _SOURCE, hints={"ranknum": "keep"}, dyadic=False, merge_many=merge_many
    ),
    "mixed.rotated": Formula(Family.MIXED, merge, forward, _SOURCE, hints={"R": "rotation"}, dyadic=False),
}
