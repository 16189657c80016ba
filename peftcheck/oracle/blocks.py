"""GraLoRA: a low-rank adapter for each of k x k blocks of the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftcheck.oracle.additive import merge_by_adding
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import layer_output, oriented
from peftcheck.rounding import Bounded


def _factors(site: Site) -> tuple[Bounded, Bounded, int, int]:
    """Return A as (n, in / k, j, r / k) and B as (j, n, r / k, out / k): block (j, n) is fed by input block n."""
    a, b = site.tensors["A"], site.tensors["B"]
    k, r = a.value.shape[0], a.value.shape[2]
    return a.map(lambda t: t.unflatten(2, (k, r // k))), b.map(lambda t: t.unflatten(1, (k, r // k))), k, r


def _scale(site: Site) -> float:
    return site.adapter.alpha / (site.adapter.rank + site.adapter.option("hybrid"))


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return s times the matrix of blocks B_jn A_jn, plus s B A of the hybrid's ordinary part."""
    a, b, k, r = _factors(site)
    blocks = m.adapter.bilinear(lambda s, t: torch.einsum("nijs,jnso->joni", s, t), a, b, r // k)
    matrix = blocks.map(lambda t: t.flatten(2).flatten(0, 1))
    if "A.general" in site.tensors:
        matrix = m.adapter.add(matrix, m.adapter.matmul(site.tensors["B.general"], site.tensors["A.general"]))
    return {"weight": oriented(site.spec, m.adapter.scale(matrix, _scale(site)))}


def _paths(m: Machine, site: Site, x: Bounded) -> list[Bounded]:
    """Return s times the blocks' output, and s times that of the ordinary part, scaled in the base's dtype."""
    a, b, k, r = _factors(site)
    width = site.spec.n_in // k
    x = m.adapter.rounded(x)
    pieces = x.map(lambda t: t.unflatten(-1, (k, width)))
    hidden = m.adapter.bilinear(lambda v, s: torch.einsum("...ni,nijs->...jns", v, s), pieces, a, width)
    y = m.adapter.bilinear(lambda v, t: torch.einsum("...jns,jnso->...jo", v, t), hidden, b, r)
    found = [y.map(lambda t: t.flatten(-2))]
    if "A.general" in site.tensors:
        low = m.adapter.matmul(x, site.tensors["A.general"].map(torch.t))
        found.append(m.adapter.matmul(low, site.tensors["B.general"].map(torch.t)))
    return [m.base.scale(m.base.rounded(part), _scale(site)) for part in found]


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return the plain layer's output plus each adapter's parts, added one by one."""
    y = layer_output(m.base, sites[0].spec, base, x)
    for site in sites:
        for part in _paths(m, site, x):
            y = m.base.add(y, part)
    return y


FORMULAS = {
    "gralora": Formula(
        Family.ADDITIVE,
        merge_by_adding(delta),
        forward,
        "Jung et al., GraLoRA, 2025, section 3: a LoRA of rank r / k for each of k x k blocks; hybrid: plus a LoRA",
        delta=delta,
    )
}
