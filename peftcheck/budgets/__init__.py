"""The bounds that a correct implementation cannot exceed, one module per family; docstrings are the proofs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from peftcheck.budgets import additive, documented, mixed, normalized, rotation, scaling, shards, stored
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site

Budget = dict[str, Tensor]
_ROUNDTRIP: dict[Family, Callable[..., Budget]] = {
    Family.ADDITIVE: additive.roundtrip,
    Family.NORMALIZED: normalized.roundtrip,
    Family.STORED: stored.roundtrip,
    Family.SNAPSHOT: stored.restored,
    Family.SCALING: scaling.roundtrip,
    Family.SHARDS: shards.roundtrip,
    Family.ROTATION: rotation.roundtrip,
    Family.MIXED: mixed.roundtrip,
}
DOCUMENTED: dict[str, Callable[..., Budget]] = documented.BOUNDS


def roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base) -> Budget:
    """Return how far merging the sites' adapters in order and unmerging them may move each tensor of the layer."""
    rule = formula.roundtrip or _ROUNDTRIP[formula.family]
    return rule(m, formula, sites, base)
