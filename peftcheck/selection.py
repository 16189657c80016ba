"""Which cells a run takes: by the filters that it was given, and by its profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from peftcheck.case import LAYERS, MODELS
from peftcheck.implementation import Implementation
from peftcheck.rounding import DTYPES

if TYPE_CHECKING:
    from peftcheck.law import Law
    from peftcheck.suite import Cell


@dataclass(frozen=True)
class Filters:
    """Globs that select cells; an empty tuple selects everything."""

    law: tuple[str, ...] = ()
    variant: tuple[str, ...] = ()
    layer: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    quantizer: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()

    def admits(self, cell: Cell) -> bool:
        """Return whether the cell passes every filter."""
        values = (cell.law, cell.sweep.variant, cell.sweep.layer, cell.sweep.dtype, cell.sweep.quantizer, cell.kind)
        patterns = (self.law, self.variant, self.layer, self.dtype, self.quantizer, self.kind)
        return all(_matches(value, wanted) for value, wanted in zip(values, patterns, strict=True))


def _matches(value: str | None, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(value or "none", pattern) for pattern in patterns)


@dataclass(frozen=True)
class Profile:
    """How far a run searches: cases per cell in the exact regime and outside, and tries to find them.

    What it takes where no filter asks for more: all groups of laws and single laws but `leaves`; whole models in
    `model_dtypes`; of the quantizers those that match `quantizers` (globs); of the groups `turns`, which have kinds, some
    variants in one dtype for each layer and kind, of whole models one for each variant, and of the variants that are
    like another (`likes`) some, others with the next seed (`in_turn`).
    """

    name: str
    exact: int
    native: int
    tries: int
    leaves: frozenset[str] = frozenset()
    model_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    quantizers: tuple[str, ...] = ("*",)
    turns: frozenset[str] = frozenset()

    def takes(self, cell: Cell, law: Law, filters: Filters) -> bool:
        """Return whether the profile runs a cell that the filters admit."""
        sweep = cell.sweep
        if self.name == "quick" and not filters.dtype and sweep.dtype not in law.quick:
            return False
        if self.name == "quick" and not filters.layer and sweep.layer in MODELS and not law.quick_models:
            return False
        if not filters.law and {cell.law, cell.law.partition(".")[0]} & self.leaves:
            return False
        if sweep.quantizer is not None and not (filters.law or filters.quantizer):
            return _matches(sweep.quantizer, self.quantizers)
        return bool(filters.dtype) or sweep.layer not in MODELS or sweep.dtype in self.model_dtypes


_ABREAST = 3  # variants of which one has its turn: what they add to each other's share of the code is little
_QUICK = ("bitsandbytes.int8", "bitsandbytes.nf4")
PROFILES = {
    "quick": Profile("quick", 1, 1, 96, frozenset({"forward.compiled", "merge.under_no_grad"}), ("float32",), _QUICK, frozenset({"combine", "models", "likes"})),
    "full": Profile("full", 6, 14, 120),
    "nightly": Profile("nightly", 20, 60, 480),
}


def in_turn(cells: Sequence[Cell], implementation: Implementation, groups: frozenset[str], seed: int) -> list[Cell]:
    """Return the cells without those of the given groups whose variant or dtype has not its turn; filters do not move a turn.

    Of `_ABREAST` variants one has its turn on a layer with a kind, in one dtype, the others with the next seeds: like a
    Latin square, so that over the layers each kind meets every dtype, over the kinds each layer does, and seeds in a row
    visit every cell. Variants that combine on more layers come first, so that no layer is left out.
    Of the whole models that a variant accepts (group `models`) one has its turn, and of `_ABREAST` variants that are like
    another (group `likes`) one, on all of its layers.
    """
    variants = implementation.variants()
    combining = sorted((v for v in variants.values() if v.combinations), key=lambda v: -len(v.layers & set(LAYERS)))
    places = {variant.name: place for place, variant in enumerate(combining)}
    order = {name: place for place, name in enumerate(variants)}

    alike = {name: place for place, name in enumerate(name for name, variant in variants.items() if variant.like)}

    def has_its_turn(cell: Cell) -> bool:
        if "likes" in groups and (alike.get(cell.sweep.variant, -seed) + seed) % _ABREAST:
            return False
        own_models = [model for model in MODELS if model in variants[cell.sweep.variant].layers]
        if "models" in groups and cell.sweep.layer in own_models:
            return cell.sweep.layer == own_models[(order[cell.sweep.variant] + seed) % len(own_models)]
        if cell.law.partition(".")[0] not in groups or cell.kind is None:
            return True
        variant = variants[cell.sweep.variant]
        own = [dtype for dtype in DTYPES if dtype in variant.dtypes]
        place = places[variant.name] + LAYERS.index(cell.sweep.layer) + list(variant.combinations).index(cell.kind) + seed
        return place % _ABREAST == 0 and cell.sweep.dtype == own[place // _ABREAST % len(own)]

    return [cell for cell in cells if has_its_turn(cell)]
