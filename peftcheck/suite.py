"""Which cells there are, and what comes of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from peftcheck.case import MODELS, SUBJECTS, Case, Sweep
from peftcheck.errors import UsageError
from peftcheck.implementation import Claim, Implementation, Variant
from peftcheck.law import Law
from peftcheck.outcome import Outcome
from peftcheck.record import QuantizedRecord
from peftcheck.rounding import DTYPES
from peftcheck.selection import PROFILES, Filters, Profile, quantized_dtypes

# layers of several weights: the laws of combinations compare one (test_combined_attention.py has closed forms)
UNCOMBINED = frozenset({"mha"})


@dataclass(frozen=True)
class Cell:
    """A law on a sweep, with the combination kind where the law has one."""

    law: str
    sweep: Sweep
    kind: str | None = None

    @property
    def id(self) -> str:
        """The test id: law, variant, layer, dtype, then quantizer and kind where they apply."""
        return "-".join(part for part in (self.law, str(self.sweep), self.kind) if part)


@dataclass(frozen=True)
class Failure:
    """A law that did not hold on a case."""

    fingerprint: str
    status: str
    token: str
    words: str
    message: str
    ratio: float | None
    case: Case = field(compare=False)
    outcome: Outcome = field(compare=False)


@dataclass(frozen=True)
class CellResult:
    """What came of a cell. `state`: 'ran', 'vacuous', 'unsupported', 'absent' or 'harness'; then `failures` decide."""

    cell: Cell
    state: str
    cases: int = 0
    ratio: float | None = None
    effect: float | None = None
    seconds: float = 0.0
    token: str | None = None
    words: str | None = None
    failures: tuple[Failure, ...] = ()
    message: str | None = None
    quantized: QuantizedRecord | None = None


def validated(filters: Filters, implementation: Implementation, laws: Sequence[Law]) -> Filters:
    """Return the filters; raises UsageError for a pattern that matches nothing there is."""
    known = {
        "law": [law.name for law in laws],
        "variant": list(implementation.variants()),
        "layer": list(SUBJECTS),
        "dtype": list(DTYPES),
    }
    for name, choices in known.items():
        for pattern in getattr(filters, name):
            if not any(fnmatchcase(choice, pattern) for choice in choices):
                raise UsageError(f"unknown {name} '{pattern}': choose from {', '.join(choices)}")
    return filters


def cells(implementation: Implementation, laws: Sequence[Law], filters: Filters) -> list[Cell]:
    """Return the cells of an implementation that the filters admit, sweep by sweep.

    A layer kind that a variant does not accept has one cell: `refuse.attach`, in float32.
    """
    found = []
    for name, variant in implementation.variants().items():
        for layer in SUBJECTS:
            if layer not in variant.layers:
                found.append(Cell("refuse.attach", Sweep(implementation.name, name, layer, "float32")))
                continue
            for dtype in DTYPES if layer not in MODELS else PROFILES["full"].model_dtypes:
                if dtype in variant.dtypes:
                    sweep = Sweep(implementation.name, name, layer, dtype)
                    found += [cell for law in laws for cell in _of_law(law, variant, sweep)]
        found += [
            cell
            for sweep in _quantized(implementation, variant)
            for law in laws
            for cell in _of_law(law, variant, sweep)
        ]
    chosen = {law.name for law in laws}
    return [cell for cell in found if cell.law in chosen and filters.admits(cell)]


def _quantized(implementation: Implementation, variant: Variant) -> Iterable[Sweep]:
    """Return a variant's sweeps on quantized linear layers."""
    for name in variant.quantizers:
        for dtype in quantized_dtypes(variant, name):
            yield Sweep(implementation.name, variant.name, "linear", dtype, name)


def _of_law(law: Law, variant: Variant, sweep: Sweep) -> Iterable[Cell]:
    if not law.sweeps(sweep):
        return ()
    if law.name == "refuse.attach" or (law.group == "quantize") != (sweep.quantizer is not None):
        return ()
    if sweep.quantizer is not None and (law.name == "quantize.refuses") != (
        variant.quantizers[sweep.quantizer] is not Claim.YES
    ):
        return ()
    if not law.asks(variant, sweep.layer):
        return ()
    if law.kinds and sweep.layer in UNCOMBINED:
        return ()
    if law.kinds:
        return [
            Cell(law.name, sweep, kind) for kind, promise in variant.combinations.items() if law.of_kind(kind, promise)
        ]
    return (Cell(law.name, sweep),)


__all__ = ["PROFILES", "Cell", "CellResult", "Failure", "Filters", "Profile", "cells", "validated"]
