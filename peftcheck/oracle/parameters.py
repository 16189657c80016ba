"""LoRA on a bare parameter: one matrix, or a stack of them with factors of its own for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from peftcheck.oracle.additive import merge_by_adding
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, unknown
from peftcheck.oracle.layers import layer_output
from peftcheck.oracle.lowrank import scale
from peftcheck.rounding import Bounded


def _factors(site: Site) -> tuple[Bounded, Bounded]:
    """Return A (experts, r, in) and B (experts, out, r) of factors that are stored for all experts together.

    A holds its experts one below the other; B, whose columns go with A's rows, interleaves them: column j e + k of
    e experts is direction j of expert k. A plain matrix has one expert and no first axis.
    """
    a, b, experts = site.tensors["A"], site.tensors["B"], site.spec.depth
    if not experts:
        return a, b
    height, rank = b.value.shape[0], b.value.shape[1] // experts
    return (
        a.map(lambda t: t.reshape(experts, rank, -1)),
        b.map(lambda t: t.reshape(height, rank, experts).permute(2, 0, 1)),
    )


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return s B A for each expert, in the parameter's shape; without factors nothing is known."""
    if not {"A", "B"} <= set(site.tensors):
        return {"weight": unknown(site.spec.weight_shape)}
    a, b = _factors(site)
    return {"weight": m.adapter.scale(m.adapter.matmul(b, a), scale(site.adapter))}


def _narrowed(m: Machine, site: Site) -> Bounded:
    """Return s B A of factors that are cast to the parameter's dtype first, in its arithmetic.

    That is coarser than casting the product, which is done elsewhere: the bound covers both.
    """
    on = replace(m, adapter=m.base)
    return delta(on, replace(site, tensors={role: m.base.rounded(t) for role, t in site.tensors.items()}))["weight"]


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return x (W + sum of s B A)^T: the parameter itself is what changes, the module computes as it does."""
    change = reduce(m.base.add, (_narrowed(m, site) for site in sites))
    return layer_output(m.base, sites[0].spec, {**base, "weight": m.base.add(base["weight"], change)}, x)


FORMULAS = {
    "lora.parameter": Formula(
        Family.ADDITIVE,
        merge_by_adding(delta),
        forward,
        "Hu et al., LoRA, 2021, eq. 3, on each matrix of a stacked parameter, as documented for target_parameters",
        delta=delta,
    )
}
