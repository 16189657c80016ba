"""Adaption prompts: an attention layer that attends to learned tokens too, by a softmax of their own."""

from __future__ import annotations

from collections.abc import Sequence

from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, unmerged
from peftcheck.oracle.rotary import attend, output, projected, queries, shared, weighed
from peftcheck.rounding import Bounded


def _added(m: Machine, site: Site, base: Base, x: Bounded) -> Bounded:
    """Return W_o g softmax(Q K_p^T / sqrt(d)) V_p, keys and values those of the prompt, which has no positions."""
    ar, spec = m.base, site.spec
    keys, values = (
        projected(ar, spec, base, site.tensors["prompt"], name, spec.groups) for name in ("k_proj", "v_proj")
    )
    weights = weighed(ar, queries(ar, spec, base, x), shared(spec, keys))
    return output(ar, base, ar.matmul(ar.mul(site.tensors["gate"], weights), shared(spec, values)))


def _forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    y = attend(m.base, sites[0].spec, base, x)
    for site in sites:
        y = m.base.add(y, _added(m, site, base, x))
    return y


FORMULAS = {
    "adaption_prompt": Formula(
        Family.OPAQUE,
        unmerged,
        _forward,
        "Zhang et al., LLaMA-Adapter, 2023, eq. 4 to 7: W_o (softmax(Q K^T) V + g softmax(Q K_p^T / sqrt(d)) V_p) + b_o",
        dyadic=False,
    ),
}
