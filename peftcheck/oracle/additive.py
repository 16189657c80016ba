"""What every additive method shares: merging is adding, several adapters add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import Bounded

Delta = Callable[[Machine, Site], dict[str, Bounded]]
Path = Callable[[Machine, Site, Bounded], Bounded]


def merge_by_adding(delta: Delta) -> Callable[[Machine, Site, Base], dict[str, Bounded]]:
    """Return the merge of an additive method: base + delta, stored once.

    An adapter of another dtype may be cast to the base's before it is added: one more rounding of the delta.
    """

    def merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
        merged = {}
        for name, change in delta(m, site).items():
            if m.mixed:
                change = m.base.rounded(change)
            merged[name] = m.base.add(base[name], change)
        return merged

    return merge


def forward_by_adding(path: Path) -> Callable[[Machine, Sequence[Site], Base, Bounded], Bounded]:
    """Return the forward of an additive method: the plain layer, plus each adapter's path, each added once."""

    def forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
        y = layer_output(m.base, sites[0].spec, base, x)
        for site in sites:
            y = m.base.add(y, path(m, site, x))
        return y

    return forward


def additive(delta: Delta, path: Path, source: str, **fields) -> Formula:
    """Return the formula of an additive method from its delta and its path."""
    return Formula(Family.ADDITIVE, merge_by_adding(delta), forward_by_adding(path), source, delta=delta, **fields)
