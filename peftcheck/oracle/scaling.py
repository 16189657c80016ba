"""(IA)^3: a learned vector that multiplies outputs or, in feed-forward layers, inputs."""

from __future__ import annotations

from collections.abc import Sequence

from peftcheck.case import CONVOLUTIONS
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import channels, layer_output, rows
from peftcheck.rounding import Bounded


def _columns(site: Site) -> Bounded:
    """Shape the vector over inputs so that it multiplies the stored weight, group by group."""
    spec, vector = site.spec, site.tensors["scale"].map(lambda t: t.reshape(-1))
    if spec.kind == "conv1d-transformers":
        return vector.map(lambda v: v.reshape(-1, 1))
    if spec.kind in CONVOLUTIONS:
        per_group, tail = spec.n_in // spec.groups, (1,) * len(spec.kernel)
        return vector.map(
            lambda v: (
                v.reshape(spec.groups, per_group)
                .repeat_interleave(spec.n_out // spec.groups, dim=0)
                .reshape(spec.n_out, per_group, *tail)
            )
        )
    return vector.map(lambda v: v.reshape(1, -1))


def merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return diag(l) W and l * b, or W diag(l) for a feed-forward layer."""
    vector = site.tensors["scale"].map(lambda t: t.reshape(-1))
    if site.adapter.option("feedforward"):
        return {"weight": m.base.mul(base["weight"], _columns(site))}
    merged = {"weight": m.base.mul(base["weight"], rows(site.spec, vector))}
    if "bias" in base:
        merged["bias"] = m.base.mul(base["bias"], vector)
    return merged


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return l * (W x + b), or W (l * x) + b for a feed-forward layer; several vectors multiply up."""
    spec, gate = sites[0].spec, sites[0].tensors["scale"].map(lambda t: t.reshape(-1))
    for site in sites[1:]:
        gate = m.adapter.mul(gate, site.tensors["scale"].map(lambda t: t.reshape(-1)))
    if sites[0].adapter.option("feedforward"):
        return layer_output(m.base, spec, base, m.base.mul(x, channels(spec, gate)))
    return m.base.mul(layer_output(m.base, spec, base, x), channels(spec, gate))


IA3 = Formula(
    Family.SCALING,
    merge,
    forward,
    "Liu et al., Few-Shot Parameter-Efficient Fine-Tuning, 2022, section 3.3: l * (W x), and W (l * x) in feed-forward",
    hints={"scale": "scale"},
)

FORMULAS = {"ia3": IA3}
