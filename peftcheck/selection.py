"""Which cells a run takes: by the filters that it was given, and by its profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from peftcheck import quantizers
from peftcheck.case import LAYERS, MODELS
from peftcheck.implementation import Claim, Implementation, Variant
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
        if self == _NO_FILTERS:
            return True
        values = (cell.law, cell.sweep.variant, cell.sweep.layer, cell.sweep.dtype, cell.sweep.quantizer, cell.kind)
        patterns = (self.law, self.variant, self.layer, self.dtype, self.quantizer, self.kind)
        return all(_matches(value, wanted) for value, wanted in zip(values, patterns, strict=True))


_NO_FILTERS = Filters()


def _matches(value: str | None, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(value or "none", pattern) for pattern in patterns)


@dataclass(frozen=True)
class Profile:
    """How far a run searches.

    `exact`, `native`: cases per cell in the exact regime and outside; `logic`: cases of a law that hangs on logic rather
    than rounding; `heavy`: cases in either regime on whole models and of combination kinds, whose cells are many or
    dear. `tries`: cases drawn at most to find them.

    What it takes where no filter asks for more: all groups of laws and single laws but `leaves`, on whole models
    `model_leaves` neither, and in `model_dtypes`; of the quantizers those that match `quantizers` (globs); of what
    `turns` names, a part that moves with the seed (`in_turn`).
    """

    name: str
    exact: int
    native: int
    logic: int
    heavy: int
    tries: int
    leaves: frozenset[str] = frozenset()
    model_leaves: frozenset[str] = frozenset()
    model_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    quantizers: tuple[str, ...] = ("*",)
    turns: frozenset[str] = frozenset()

    def takes(self, cell: Cell, filters: Filters) -> bool:
        """Return whether the profile runs a cell that the filters admit."""
        sweep = cell.sweep
        if not filters.law and {cell.law, cell.law.partition(".")[0]} & self.leaves:
            return False
        if not (filters.law or filters.layer) and sweep.layer in MODELS and cell.law in self.model_leaves:
            return False
        if sweep.quantizer is not None and not (filters.law or filters.quantizer):
            return _matches(sweep.quantizer, self.quantizers)
        return bool(filters.dtype) or sweep.layer not in MODELS or sweep.dtype in self.model_dtypes

    def cases(self, cell: Cell, law: Law) -> tuple[int, int]:
        """Return how many cases a cell asks for in the exact regime, and how many outside."""
        most = self.heavy if cell.kind or cell.sweep.layer in MODELS else max(self.exact, self.native)
        if law.logic:
            return (0, min(self.logic, most))
        return (min(self.exact, most) if law.exact else 0, min(self.native, most))


# Variants of which one has its turn: what they add to each other's share of the code is little.
_ABREAST = 3  # of those that are like another
_COMBINING = 6  # of those that combine, on a layer with a kind: of fewer, one
PROFILES = {
    "quick": Profile(
        "quick",
        exact=1,
        native=1,
        logic=1,
        heavy=1,
        tries=400,
        leaves=frozenset({"forward.compiled", "merge.under_no_grad"}),
        model_leaves=frozenset({"state.sequence"}),
        model_dtypes=("float32",),
        quantizers=("bitsandbytes.int8", "bitsandbytes.nf4"),
        turns=frozenset({"dtypes", "combine", "models", "likes", "quantized"}),
    ),
    "full": Profile(
        "full", exact=1, native=2, logic=1, heavy=1, tries=400, leaves=frozenset({"forward.compiled"})
    ),  # which takes a second or two a cell to trace: a quarter of the rest together
    "nightly": Profile("nightly", exact=20, native=60, logic=20, heavy=20, tries=480),
}


def lifted(filters: Filters) -> frozenset[str]:
    """Return the turns that filters lift: who names a layer, a variant, a law or a quantizer asks for all of it."""
    named = {
        "models": filters.layer,
        "likes": filters.variant,
        "quantized": filters.law or filters.quantizer,
    }
    return frozenset(turn for turn, patterns in named.items() if patterns)


def in_turn(
    cells: Sequence[Cell], implementation: Implementation, logic: frozenset[str], groups: frozenset[str], seed: int
) -> list[Cell]:
    """Return the cells without those that have not their turn; filters do not move a turn.

    Group `dtypes`: on each layer a variant is asked in one of float64 and float32 and in one of the half-precision
    dtypes; laws on logic (their names) in one of those two. Eight seeds visit all.
    Group `combine`: on a layer with a kind one in `_COMBINING` variants has its turn (of fewer, one), in one dtype, the
    others with the next seeds: like a Latin square, so that over the layers each kind meets every dtype, over the kinds each
    layer does, and seeds in a row visit every cell.
    Group `models`: of the whole models that a variant accepts, one has its turn: at every second seed, where the variant is
    asked on single layers too.
    Group `likes`: of `_ABREAST` variants that are like another, one has its turn, on all of its layers.
    Group `quantized`: of the dtypes in which a variant is asked on a quantizer, one has its turn.
    """
    variants = implementation.variants()
    combining = {
        (layer, kind): [name for name, v in variants.items() if layer in v.layers and kind in v.combinations]
        for layer in LAYERS
        for kind in dict.fromkeys(kind for v in variants.values() for kind in v.combinations)
    }
    order = {name: place for place, name in enumerate(variants)}
    alike = {name: place for place, name in enumerate(name for name, variant in variants.items() if variant.like)}
    quantized = {
        (variant.name, name): quantized_dtypes(variant, name)
        for variant in variants.values()
        for name in variant.quantizers
    }

    def has_its_turn(cell: Cell) -> bool:
        sweep, variant = cell.sweep, variants[cell.sweep.variant]
        if "likes" in groups and (alike.get(variant.name, -seed) + seed) % _ABREAST:
            return False
        if cell.kind is not None:
            own = combining[sweep.layer, cell.kind]
            place = own.index(variant.name) + LAYERS.index(sweep.layer) + list(variant.combinations).index(cell.kind)
            return "combine" not in groups or _combines(variant, cell, place + seed, min(_COMBINING, len(own)))
        own_models = [model for model in MODELS if model in variant.layers]
        if sweep.layer in own_models:
            turn, apart = divmod(order[sweep.variant] + seed, 2 if variant.layers & set(LAYERS) else 1)
            return "models" not in groups or (not apart and sweep.layer == own_models[turn % len(own_models)])
        if sweep.quantizer is not None:
            own = quantized[sweep.variant, sweep.quantizer]
            place = order[sweep.variant] + list(variant.quantizers).index(sweep.quantizer)
            return "quantized" not in groups or sweep.dtype == own[(place + seed) % len(own)]
        if "dtypes" not in groups or sweep.layer not in variant.layers:
            return True
        return sweep.dtype in _dtypes(
            variant, cell.law in logic, order[sweep.variant] + LAYERS.index(sweep.layer) + seed
        )

    return [cell for cell in cells if has_its_turn(cell)]


def quantized_dtypes(variant: Variant, quantizer: str) -> list[str]:
    """Return the dtypes in which a variant is asked on a quantizer; where it must refuse to merge, one says it all."""
    own = [dtype for dtype in quantizers.DECLARED[quantizer].dtypes if dtype in variant.dtypes]
    return own if variant.quantizers[quantizer] is Claim.YES else own[:1]


def _combines(variant: Variant, cell: Cell, turn: int, abreast: int) -> bool:
    own = [dtype for dtype in DTYPES if dtype in variant.dtypes]
    return turn % abreast == 0 and cell.sweep.dtype == own[turn // abreast % len(own)]


def _dtypes(variant: Variant, logic: bool, turn: int) -> list[str]:
    """Return the dtypes whose turn it is: one of the wide and one of the half-precision ones, or one of those two."""
    wide = [dtype for dtype in ("float32", "float64") if dtype in variant.dtypes]
    half = [dtype for dtype in ("bfloat16", "float16") if dtype in variant.dtypes]
    chosen = [kind[turn // apart % len(kind)] for kind, apart in ((wide, 1), (half, 2)) if kind]
    return [chosen[turn // 4 % len(chosen)]] if logic else chosen
