"""MiSS: one small block is shared by all shards of the inputs; Bat multiplies each shard by it first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import Arithmetic, Bounded
from peftcheck.rounding_linalg import working


def _block(site: Site) -> Bounded:
    """Return D (r, out); in the small form its columns repeat along the outputs."""
    return site.tensors["D"].map(lambda t: t.repeat(1, site.spec.n_out // t.shape[1]))


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return the matrix whose column j is row j mod r of D; nothing rounds."""
    n = site.spec.n_in

    def spread(t: Tensor) -> Tensor:
        return t.t().repeat(1, -(-n // t.shape[0]))[:, :n]

    return {"weight": _block(site).map(spread)}


def path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return (the sum of the shards of x, the last one padded with zeros) D."""
    block, ar = _block(site), m.adapter
    r, n = block.value.shape[0], site.spec.n_in
    shards = ar.rounded(x).map(lambda t: F.pad(t, (0, -n % r)).reshape(*t.shape[:-1], -1, r))
    return ar.matmul(ar.sum(shards, -2, keepdim=False), block)


def shards_of(weight: Tensor, r: int) -> Tensor:
    """Lay a weight (out, in) out as blocks (in / r, out / r, r, r): rows of a block are outputs."""
    out, n = weight.shape
    return weight.reshape(out // r, r, n // r, r).permute(2, 0, 1, 3)


def whole_of(blocks: Tensor) -> Tensor:
    """Return the weight of its blocks."""
    inputs, outputs, r, _ = blocks.shape
    return blocks.permute(1, 2, 0, 3).reshape(outputs * r, inputs * r)


def bat_merged(m: Machine, ar: Arithmetic, d: Bounded, w: Bounded) -> Bounded:
    """Return W + (W D + D) for blocks W (in / r, out / r, r, r) and D (out / r, r, r), the change computed in `ar`."""
    change = ar.add(ar.matmul(w, d), d)
    if ar.store.dtype != m.adapter.store.dtype:
        change = m.adapter.rounded(change)
    return m.base.add(w, m.base.rounded(change) if m.mixed else change)


def bat_merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return W_oj + W_oj D_o + D_o for every block of outputs o and inputs j."""
    d = site.tensors["D"]
    r = d.value.shape[-1]
    merged = bat_merged(m, working(m.adapter), d, base["weight"].map(lambda t: shards_of(t, r)))
    return {"weight": merged.map(whole_of)}


def bat_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return M x + b, the effective weight M computed adapter by adapter as merging does."""
    merged = dict(base)
    for site in sites:
        merged |= bat_merge(m, site, merged)
    return layer_output(m.base, sites[0].spec, merged, m.adapter.rounded(x))


_SOURCE = "Kang and Yin, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, 2025, eq. 5"

MISS = additive(delta, path, _SOURCE)
BAT = Formula(
    Family.SHARDS,
    bat_merge,
    bat_forward,
    "Kang, Bone: Block-Affine Adaptation of Large Language Models, 2024, section 3.2 (Bat): W + W D + D for each block",
    dyadic=False,
)

FORMULAS = {"miss": MISS, "miss.bat": BAT}
