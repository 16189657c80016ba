"""Methods that adapt the bias alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftcheck.oracle.additive import merge_by_adding
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import channels, layer_output
from peftcheck.rounding import Bounded


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return what is added to the bias."""
    return {"bias": site.tensors["bias"].map(lambda t: t.flatten())}


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return W x + b + (sum of the adapters' biases), summed up first or added one by one: either is correct."""
    y = layer_output(m.base, sites[0].spec, base, x)
    own = [channels(site.spec, delta(m, site)["bias"]) for site in sites]
    total, one_by_one = own[0], m.adapter.add(y, own[0])
    for more in own[1:]:
        total, one_by_one = m.adapter.add(total, more), m.adapter.add(one_by_one, more)
    y = _either(m.adapter.add(y, total), one_by_one)
    return m.base.rounded(y) if m.mixed else y


def _either(one: Bounded, other: Bounded) -> Bounded:
    """Return the value with the larger of two bounds, for two orders of one sum."""
    if one.error is None and other.error is None:
        return one
    return Bounded(one.value, torch.maximum(one.bound, other.bound))


FORMULAS = {
    "bias": Formula(
        Family.ADDITIVE,
        merge_by_adding(delta),
        forward,
        "Ben Zaken et al., BitFit, 2021, section 3: the bias is what is tuned; BEFT tunes that of one projection",
        delta=delta,
    )
}
