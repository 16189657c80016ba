"""RoAd: pairs of outputs are turned and stretched, so that the weight is multiplied from the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, Turn
from peftcheck.oracle.layers import layer_output
from peftcheck.oracle.turning import merge_by_turning
from peftcheck.rounding import Bounded
from peftcheck.rounding_linalg import invert


def columns(m: Machine, site: Site) -> tuple[Bounded, Bounded]:
    """Return for every output i the factors c_i of its own value and s_i of its partner's (n_out).

    c = alpha cos(theta) and s = alpha sin(theta); in form 1 the partners i and i + g / 2 of a group of g outputs share
    alpha and theta, in form 2 each output has its own, in form 4 its c and its s have each their own.
    """
    ar, half = m.adapter, site.adapter.option("group_size") // 2
    theta, alpha = site.tensors["theta"], site.tensors["alpha"]
    cosine, sine = ar.apply(theta, torch.cos, 1.0), ar.apply(theta, torch.sin, 1.0)
    if site.adapter.option("form") == "road_4":

        def kept(t: Tensor, which: int) -> Tensor:
            return t.reshape(-1, 2, 2 * half)[:, which].flatten()

        own = ar.mul(alpha.map(lambda t: kept(t, 0)), cosine.map(lambda t: kept(t, 0)))
        return own, ar.mul(alpha.map(lambda t: kept(t, 1)), sine.map(lambda t: kept(t, 1)))
    own, partner = ar.mul(alpha, cosine), ar.mul(alpha, sine)
    if site.adapter.option("form") == "road_2":
        return own, partner

    def shared(t: Tensor) -> Tensor:
        return t.reshape(-1, 1, half).expand(-1, 2, half).flatten()

    return own.map(shared), partner.map(shared)


def partners(n: int, group: int) -> Tensor:
    """Return the index of each output's partner: i + g / 2 in the first half of a group, i - g / 2 in the second."""
    index = torch.arange(n).reshape(-1, 2, group // 2)
    return index.flip(1).flatten()


def signs(n: int, group: int) -> Tensor:
    """Return -1 for the first half of every group, +1 for the second."""
    return torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(1, 2, 1).expand(n // group, 2, group // 2).flatten()


def matrix(m: Machine, site: Site) -> Bounded:
    """Return R (n_out, n_out): c on the diagonal, -s or +s where row i meets its partner; nothing rounds."""
    own, partner = columns(m, site)
    n, group = own.value.shape[0], site.adapter.option("group_size")
    rows, other, sign = torch.arange(n), partners(n, group), signs(n, group)

    def placed(c: Tensor, s: Tensor) -> Tensor:
        full = c.new_zeros(n, n)
        full[rows, rows], full[rows, other] = c, s
        return full

    return Bounded(placed(own.value, sign * partner.value), placed(own.bound, partner.bound))


def turn(m: Machine, site: Site) -> Turn:
    """Return R^T, which multiplies weight and bias, transposed, from the right.

    R is cast to the base's dtype before it multiplies; what unmerging multiplies by is the inverse of R as the adapter
    has it, cast too. With r the cast's rounding, abs(X' R' - I) <= abs(X' - R^-1) abs(R') + abs(R^-1) r.
    """
    stored = matrix(m, site)
    used = m.base.rounded(stored) if m.mixed else stored
    inverse, fresh = invert(m.base, stored)
    residual = fresh @ used.ceiling()
    if m.mixed:
        residual = residual + inverse.ceiling() @ m.base.rounded(Bounded(stored.ceiling())).bound
    return Turn(
        used.map(torch.t),
        inverse.map(torch.t),
        residual.t(),
        stored.value.shape[0],
        m.base,
        lambda name, tensor: tensor.t() if name == "weight" else tensor[None],
        lambda name, tensor: tensor.t() if name == "weight" else tensor[0],
        ("weight", "bias"),
    )


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return R (W x + b), elementwise: c * y + s * (the partners of y, signed); adapters follow one another."""
    y = m.adapter.rounded(layer_output(m.base, sites[0].spec, base, x))
    for site in sites:
        own, partner = columns(m, site)
        n, group = own.value.shape[0], site.adapter.option("group_size")
        other, sign = partners(n, group), signs(n, group)
        swapped = Bounded(y.value[..., other] * sign, y.bound[..., other])
        y = m.adapter.add(m.adapter.mul(y, own), m.adapter.mul(swapped, partner))
    return m.base.rounded(y)


ROAD = Formula(
    Family.ROTATION,
    merge_by_turning(turn),
    forward,
    "Liao and Monz, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, 2024, "
    "eq. 3 and 4, table 1 for the forms",
    hints={"theta": "factor", "alpha": "scale"},
    dyadic=False,
    turn=turn,
)

FORMULAS = {"road": ROAD}
