"""Closed forms from the papers, in fp64 with running error bounds; no line is shared with any library."""

from __future__ import annotations

from peftcheck.oracle import (
    activated,
    adaptive,
    banks,
    biases,
    blocks,
    clustered,
    experts,
    gated,
    householder,
    lowrank,
    lowrank_variants,
    mixed,
    normalized,
    pairwise,
    parameters,
    products,
    projections,
    random_bases,
    reconstructed,
    replaced,
    residual,
    rotation,
    routed,
    scaling,
    shards,
    sparse,
    spectral,
    subspace,
)
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, machine, unlimited

_MODULES = (
    lowrank,
    lowrank_variants,
    activated,
    products,
    projections,
    adaptive,
    biases,
    normalized,
    scaling,
    rotation,
    householder,
    random_bases,
    banks,
    sparse,
    replaced,
    spectral,
    pairwise,
    parameters,
    gated,
    blocks,
    residual,
    reconstructed,
    shards,
    subspace,
    clustered,
    routed,
    experts,
    mixed,
)
FORMULAS: dict[str, Formula] = {name: formula for module in _MODULES for name, formula in module.FORMULAS.items()}

__all__ = ["FORMULAS", "Base", "Family", "Formula", "Machine", "Site", "machine", "unlimited"]
