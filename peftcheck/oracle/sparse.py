"""Deltas with few nonzero entries: SHiRA, Super-Tuning, and WaveFT without its transform."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftcheck.oracle.additive import additive, merge_by_adding
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import layer_output, linear_map, oriented
from peftcheck.rounding import Bounded


def scattered(values: Bounded, entries: torch.Tensor, shape: tuple[int, int]) -> Bounded:
    """Return the matrix of `shape` with `values` (n) at `entries` (2, n), zero elsewhere; nothing rounds."""
    row, column = entries.long()

    def place(t: torch.Tensor) -> torch.Tensor:
        matrix = torch.zeros(shape, dtype=torch.float64)
        matrix[row, column] = t
        return matrix

    return values.map(place)


def _shape(site: Site) -> tuple[int, int]:
    return site.spec.n_out, site.spec.n_in


def shira(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return the trained values at the entries of the mask, (out, in)."""
    return {"weight": scattered(site.tensors["values"], site.tensors["entries"].value, _shape(site))}


def waveft(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return the scaled spectrum at its entries, in the layer's orientation."""
    matrix = scattered(site.tensors["spectrum"], site.tensors["entries"].value, _shape(site))
    return {"weight": oriented(site.spec, m.adapter.scale(matrix, site.adapter.alpha))}


def _rounded_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    return linear_map(m.adapter, site.spec, waveft(m, site)["weight"], x)


_merge_sparse = merge_by_adding(shira)


def _forward_on_merged(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return the layer's output with the entries added to its weight, adapter by adapter."""
    tuned = dict(base)
    for site in sites:
        tuned = {**tuned, **_merge_sparse(m, site, tuned)}
    return layer_output(m.base, sites[0].spec, tuned, x)


def _entries(m: Machine, site: Site) -> Bounded:
    """Return the trained values at the flat entries of the weight, in the base's dtype."""
    flat = site.tensors["entries"].value.long()
    pair = torch.stack([flat // site.spec.n_in, flat % site.spec.n_in])
    return scattered(m.base.rounded(site.tensors["values"]), pair, _shape(site))


def _low_rank(m: Machine, site: Site) -> Bounded | None:
    """Return (alpha / r) B A in the base's dtype, where the adapter has that part."""
    if "A" not in site.tensors:
        return None
    product = m.adapter.matmul(site.tensors["B"], site.tensors["A"])
    return m.base.rounded(m.adapter.scale(product, site.adapter.alpha / site.adapter.rank))


def supertuning(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return the trained values at their entries, plus (alpha / r) B A in the hybrid."""
    sparse, dense = _entries(m, site), _low_rank(m, site)
    return {"weight": sparse if dense is None else m.base.add(sparse, dense)}


def _supertuning_steps(m: Machine, site: Site, base: Base) -> list[dict[str, Bounded]]:
    """Return the weight after the sparse part is added, and after the low-rank one."""
    stages = [m.base.add(base["weight"], _entries(m, site))]
    dense = _low_rank(m, site)
    if dense is not None:
        stages.append(m.base.add(stages[0], dense))
    return [{"weight": stage} for stage in stages]


def _supertuning_merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    return _supertuning_steps(m, site, base)[-1]


def _supertuning_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return the output with all sparse parts in the weight, plus each low-rank path."""
    weight = base["weight"]
    for site in sites:
        weight = m.base.add(weight, _entries(m, site))
    y = layer_output(m.base, sites[0].spec, {**base, "weight": weight}, x)
    for site in sites:
        if "A" in site.tensors:
            hidden = m.adapter.matmul(x, site.tensors["A"].map(torch.t))
            z = m.adapter.matmul(hidden, site.tensors["B"].map(torch.t))
            z = m.adapter.scale(z, site.adapter.alpha / site.adapter.rank)
            y = m.base.add(y, m.base.rounded(z))
    return y


FORMULAS = {
    "shira": Formula(
        Family.ADDITIVE,
        _merge_sparse,
        _forward_on_merged,
        "Bhardwaj et al., SHiRA, 2024, section 3: only the masked entries of W are trained",
        delta=shira,
    ),
    "supertuning": Formula(
        Family.STORED,
        _supertuning_merge,
        _supertuning_forward,
        "Super-Tuning, arXiv 2607.09287, 2026: W plus values at the entries of largest magnitude; Supra: plus a LoRA",
        delta=supertuning,
        steps=_supertuning_steps,
    ),
    "waveft.direct": additive(
        waveft,
        _rounded_path,
        "Bilican et al., WaveFT, 2025 (its ablation without the transform): W + lambda C, C sparse",
    ),
}
