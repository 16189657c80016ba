"""Closed forms from the papers, in fp64 with running error bounds; no line is shared with any library."""

from __future__ import annotations

from peftcheck.oracle import lowrank, scaling
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, machine

_MODULES = (lowrank, scaling)
FORMULAS: dict[str, Formula] = {name: formula for module in _MODULES for name, formula in module.FORMULAS.items()}

__all__ = ["FORMULAS", "Base", "Family", "Formula", "Machine", "Site", "machine"]
