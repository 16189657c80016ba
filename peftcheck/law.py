"""What a law is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import entry_points

from peftcheck.case import LAYERS, MODELS, Case, Sweep
from peftcheck.implementation import Op, Promise, Variant
from peftcheck.measurement import Measurement
from peftcheck.stage import Stage

GROUP = "peftcheck.laws"
Measure = Callable[[Stage], Measurement | None]


def _everyone(variant: Variant) -> bool:
    return True


def _everywhere(sweep: Sweep) -> bool:
    return True


def _every_case(variant: Variant, case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Law:
    """A property that must hold.

    `measure` returns the worst measurement, or None where the case says nothing about the law (an embedding has
    no bias to poison). `formula` states the law in one line; `needs` are the operations without which the
    library has nothing to check; `source` is the real defect or the paper behind it. `structural` laws need no
    effect to mean something. `concerns` tells for which variants the law says anything at all.
    `sweeps` tells on which sweeps (layers, dtypes) it has cells at all. `refuses` names the operation whose refusal a law
    of group `refuse` judges. `kinds`: the law runs once for each combination kind of the variant (all, or those
    of which it says anything).
    `on`: whether it is asked of layers alone, of whole models, or of both; 'methods': of whole models too, where a
    method adapts no layer alone.
    `cases` tells, before anything is built, which cases can say anything about the law: building costs more than asking.
    `exact`: whether it says anything in the exact regime.
    `logic`: a verdict hangs on logic rather than on rounding, so that fewer cases and dtypes say as much.
    """

    name: str
    formula: str
    needs: tuple[Op, ...]
    measure: Measure
    source: str
    structural: bool = False
    concerns: Callable[[Variant], bool] = _everyone
    kinds: bool | Callable[[str, Promise], bool] = False
    sweeps: Callable[[Sweep], bool] = _everywhere
    refuses: Op = Op.MERGE
    on: str = "layers"  # "layers", "models", "both" or "methods"
    cases: Callable[[Variant, Case], bool] = _every_case
    exact: bool = True
    logic: bool = False

    def asks(self, variant: Variant, layer: str) -> bool:
        """Return whether the law is asked of a variant on a layer kind, or on a whole model."""
        if layer not in MODELS:
            return self.on != "models"
        return self.on != "layers" and (self.on != "methods" or not variant.layers & frozenset(LAYERS))

    def of_kind(self, kind: str, promise: Promise) -> bool:
        """Return whether the law says anything of a combination kind."""
        return self.kinds(kind, promise) if callable(self.kinds) else self.kinds

    @property
    def group(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]


_LAWS: dict[str, Law] = {}


def law(
    name: str,
    formula: str,
    needs: tuple[Op, ...] = (),
    source: str = "",
    structural: bool = False,
    concerns: Callable[[Variant], bool] = _everyone,
    kinds: bool | Callable[[str, Promise], bool] = False,
    sweeps: Callable[[Sweep], bool] = _everywhere,
    refuses: Op = Op.MERGE,
    on: str = "layers",
    cases: Callable[[Variant, Case], bool] = _every_case,
    exact: bool = True,
    logic: bool = False,
) -> Callable[[Measure], Measure]:
    """Register a measuring function as a law."""

    def register(measure: Measure) -> Measure:
        if name in _LAWS:
            raise ValueError(f"law {name} is defined twice")
        _LAWS[name] = Law(
            name, formula, needs, measure, source, structural, concerns, kinds, sweeps, refuses, on, cases, exact, logic
        )
        return measure

    return register


def laws(*patterns: str) -> tuple[Law, ...]:
    """Return the laws whose names match any of the globs (all without), in the order of their definition.

    Laws of other packages come in through the entry-point group `peftcheck.laws` (modules that register).
    """
    import peftcheck.laws  # noqa: F401  registers the built-in ones

    for entry in entry_points(group=GROUP):
        entry.load()
    chosen = [one for one in _LAWS.values() if not patterns or any(fnmatchcase(one.name, p) for p in patterns)]
    return tuple(chosen)
