"""Say what combining adapters gives today: kind by layer by law, and what gives the sum where a kind does not.

A pure function of the record, for the reports that show it. Costs and errors are those that the run measured on the
cases that violate, never taken from a list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peftcheck import summary
from peftcheck.record import NOT_RUN, CellRecord, Record, severity
from peftcheck.summary import Fold

_BROKEN = ("violation", "error", "known")
_ABOUT_NUMBERS = (
    "linear",
    "cross_term_free",
    "single",
    "cancel",
    "homogeneous",
    "permutation",
    "additive",
    "best_rank",
    "definition",
)


@dataclass(frozen=True)
class Line:
    """Hold what a combination kind does on a layer: a fold of variants and dtypes for each law, None where it has none."""

    kind: str
    layer: str
    folds: tuple[Fold | None, ...]


@dataclass(frozen=True)
class Remedy:
    """Hold what gives the result that a kind does not: `exact`, in `cells` of the `broken` cells of the kind.

    `least` and `most`: its rank over the rank of the kind asked for; `rank` and `instead`: the dearest case; `error`: the
    largest relative error that is left. All but `broken` are None where nothing that was tried gives the result.
    """

    kind: str
    broken: int
    exact: str | None = None
    cells: int | None = None
    least: float | None = None
    most: float | None = None
    rank: int | None = None
    instead: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class Combinations:
    """Hold both tables; `laws` are the columns of the first."""

    laws: tuple[str, ...]
    lines: tuple[Line, ...]
    remedies: tuple[Remedy, ...]


def read(record: Record) -> Combinations | None:
    """Return what the record says of combinations, or None where it has no cell with a kind."""
    cells = [cell for cell in record.cells if cell.kind is not None]
    if not cells:
        return None
    laws = tuple(law for law in summary.by_law(record) if any(cell.law == law for cell in cells))
    squares: dict[tuple[str, str, str], list[CellRecord]] = {}
    for cell in cells:
        squares.setdefault((cell.kind, cell.layer, cell.law), []).append(cell)
    kinds = sorted({cell.kind for cell in cells})
    lines = []
    for kind in kinds:
        for layer in sorted({layer for own, layer, _ in squares if own == kind}, key=_layer_rank):
            found = (squares.get((kind, layer, law)) for law in laws)
            lines.append(Line(kind, layer, tuple(summary.fold(group) if group else None for group in found)))
    remedies = [remedy for kind in kinds for remedy in _remedies(kind, [cell for cell in cells if cell.kind == kind])]
    return Combinations(laws, tuple(lines), tuple(remedies))


def square(fold: Fold) -> str:
    """Return what a fold shows in the table, without its sign: cells that hold of those that ran, and the worst ratio."""
    if fold.status in NOT_RUN:
        return ""
    return f"{fold.count('pass')}/{fold.run} {summary.number(fold.worst.ratio)}"


def cost(remedy: Remedy) -> str:
    """Return what a remedy costs in rank, in words."""
    if remedy.exact is None:
        return "–"
    times = f"{remedy.least:.3g}" if remedy.least == remedy.most else f"{remedy.least:.3g} to {remedy.most:.3g}"
    return f"{times} times the rank; at most {remedy.rank} instead of {remedy.instead}"


def _remedies(kind: str, cells: Iterable[CellRecord]) -> Iterable[Remedy]:
    # a cell that is known by a witness alone has no failure of its own; a crash leaves no number to mend
    wrong = [c for c in cells if c.status in _BROKEN and c.fingerprint and not c.fingerprint.startswith("crash|")]
    broken = [cell for cell in wrong if cell.law.partition(".")[2] in _ABOUT_NUMBERS]
    ways = [(cell, way) for cell in broken for way in cell.repairs]
    for exact in sorted({way.kind for _, way in ways}):
        own = [(cell, way) for cell, way in ways if way.kind == exact]
        factors = [way.rank / max(1, way.instead) for _, way in own]
        dearest = max((way for _, way in own), key=lambda way: (way.rank / max(1, way.instead), way.rank))
        error = max((way.error for _, way in own), key=severity)
        yield Remedy(
            kind,
            len(broken),
            exact,
            len({cell.id for cell, _ in own}),
            min(factors),
            max(factors),
            dearest.rank,
            dearest.instead,
            error,
        )
    if broken and not ways:
        yield Remedy(kind, len(broken))


def _layer_rank(layer: str) -> tuple[int, str]:
    return (summary.LAYERS.index(layer) if layer in summary.LAYERS else len(summary.LAYERS)), layer
