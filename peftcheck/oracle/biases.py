"""Methods that adapt the bias alone."""

from __future__ import annotations

from collections.abc import Sequence

from peftcheck.oracle.additive import merge_by_adding
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import Bounded


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return what is added to the bias."""
    return {"bias": site.tensors["bias"].map(lambda t: t.flatten())}


def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return W x + b + (sum of the adapters' biases)."""
    total = delta(m, sites[0])["bias"]
    for site in sites[1:]:
        total = m.adapter.add(total, delta(m, site)["bias"])
    y = m.adapter.add(layer_output(m.base, sites[0].spec, base, x), total)
    return m.base.rounded(y) if m.mixed else y


FORMULAS = {
    "bias": Formula(
        Family.ADDITIVE,
        merge_by_adding(delta),
        forward,
        "Ben Zaken et al., BitFit, 2021, section 3: the bias is what is tuned; BEFT tunes that of one projection",
        delta=delta,
    )
}
