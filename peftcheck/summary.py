"""Say what a record means: its verdict in one sentence, its distinct defects in order, and its cells folded.

Shared by every report, so that no two of them can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftcheck.record import NOT_RUN, STATUSES, CellRecord, DefectRecord, LedgerRecord, Record, severity

LAYERS = (
    "linear",
    "conv1d-transformers",
    "conv1d",
    "conv2d",
    "conv3d",
    "embedding",
    "embedding.scaled",
    "mha",
    "layernorm",
    "parameter",
    "model.llama",
    "model.bert",
    "model.gpt2",
    "model.vit",
    "model.resnet",
)
QUIET = ("pass", *NOT_RUN)
GROUPS = ("attach", "forward", "merge", "safe_merge", "combine", "quantize", "state", "train", "refuse")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Verdict:
    """Hold the outcome of a run: `kind` is `violates`, `unvouched`, `known` or `holds`."""

    kind: str
    title: str
    sentence: str
    code: int


@dataclass(frozen=True)
class Fold:
    """Hold what several cells amount to: the gravest status and the cell that shows it worst."""

    status: str
    worst: CellRecord
    cells: tuple[CellRecord, ...]

    @property
    def run(self) -> int:
        """Count the cells that were run."""
        return sum(cell.status not in NOT_RUN for cell in self.cells)

    def count(self, *statuses: str) -> int:
        """Count the cells of these statuses."""
        return sum(cell.status in statuses for cell in self.cells)

    @property
    def holding(self) -> CellRecord | None:
        """Return the passing cell with the largest ratio, which has the least headroom."""
        passing = [cell for cell in self.cells if cell.status == "pass" and cell.ratio is not None]
        return max(passing, key=lambda cell: severity(cell.ratio), default=None)


@dataclass(frozen=True, order=True)
class Row:
    """Name a row of the heat map."""

    variant: str
    layer: str
    quantizer: str | None


def count(amount: int, noun: str, plural: str | None = None) -> str:
    """Return an amount with its noun: 1 cell, 2,874 cells."""
    return f"{amount:,} {noun if amount == 1 else plural or noun + 's'}"


def number(value: float | None) -> str:
    """Return a ratio for people: three digits, powers of ten where it is far from 1, an en dash for null."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0 or 0.001 <= abs(value) < 10_000:
        # A ratio just above 1 violates and one just below holds: rounding must not hide which.
        shown = f"{value:.3g}"
        return f"{value:.6g}" if float(shown) == 1 and value != 1 else shown
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def fold(cells: Iterable[CellRecord]) -> Fold:
    """Fold cells into one; the order they come in does not matter."""
    cells = tuple(cells)
    worst = min(cells, key=lambda cell: (STATUSES.index(cell.status), -severity(cell.ratio), cell.id))
    return Fold(worst.status, worst, cells)


def by_law(record: Record) -> dict[str, Fold]:
    """Fold the cells of each law, laws of one group side by side."""
    folds = _folded(record.cells, lambda cell: cell.law)
    return {law: folds[law] for law in sorted(folds, key=_law_rank)}


def by_sweep(record: Record) -> dict[tuple[str, str, str, str | None], Fold]:
    """Fold the cells of each (variant, layer, dtype, quantizer)."""
    folds = _folded(record.cells, lambda cell: (cell.variant, cell.layer, cell.dtype or "", cell.quantizer))
    return dict(
        sorted(
            folds.items(),
            key=lambda item: (
                item[0][0],
                _rank(LAYERS, item[0][1]),
                item[0][3] or "",
                _rank(DTYPES, item[0][2]),
            ),
        )
    )


def heat_map(record: Record) -> tuple[list[Row], list[str], dict[tuple[Row, str], Fold]]:
    """Return rows, laws, and a fold for every (row, law) that has cells: dtypes and kinds are folded."""
    squares = _folded(record.cells, lambda cell: (Row(cell.variant, cell.layer, cell.quantizer), cell.law))
    rows = sorted(
        {row for row, _ in squares},
        key=lambda row: (row.variant, _rank(LAYERS, row.layer), row.quantizer or ""),
    )
    return rows, sorted({law for _, law in squares}, key=_law_rank), squares


def defects(record: Record) -> list[DefectRecord]:
    """Order the distinct defects: the gravest status, then the most cells, then the largest ratio.

    Cells that fail, or are known to, and that no defect names are told as one defect for each law, variant and status:
    a worker that died over a cell leaves no fingerprint, and must not go unsaid.
    """
    named = {key for defect in record.defects for key in defect.cells}
    groups: dict[str, list[CellRecord]] = {}
    for cell in record.cells:
        if cell.status not in QUIET and cell.id not in named:
            groups.setdefault(cell.fingerprint or f"{cell.law}|{cell.variant}|{cell.status}", []).append(cell)
    described = {defect.fingerprint for defect in record.defects}
    found = [
        *record.defects,
        *(_undescribed(key, cells) for key, cells in groups.items() if key not in described),
    ]
    return sorted(
        found,
        key=lambda defect: (
            STATUSES.index(defect.status),
            -len(defect.cells),
            -severity(defect.ratio),
            defect.fingerprint,
        ),
    )


@dataclass(frozen=True)
class Known:
    """Hold a known issue: its name, its entry in the ledger, and the fingerprints that it absorbs, most cells first."""

    name: str
    entry: LedgerRecord | None
    defects: tuple[DefectRecord, ...]

    @property
    def cells(self) -> frozenset[str]:
        """The ids of the cells that it turns."""
        return frozenset(cell for defect in self.defects for cell in defect.cells)

    def places(self, field: str) -> tuple[str, ...]:
        """Return the laws, variants, layers or dtypes of its defects."""
        found = (getattr(defect, field) for defect in self.defects)
        return tuple(dict.fromkeys(name for names in found for name in ([names] if isinstance(names, str) else names)))


def known_issues(record: Record) -> list[Known]:
    """Group the known defects by the entry that absorbs them, most cells first: an issue is one cause, in many laws."""
    entries = {entry.id: entry for entry in record.ledger}
    groups: dict[str, list[DefectRecord]] = {}
    for defect in defects(record):
        if defect.status == "known":
            groups.setdefault(defect.issue or defect.fingerprint, []).append(defect)
    found = [Known(name, entries.get(name), tuple(members)) for name, members in groups.items()]
    return sorted(found, key=lambda known: (-len(known.cells), known.name))


def _undescribed(key: str, cells: Sequence[CellRecord]) -> DefectRecord:
    worst = fold(cells).worst
    first = (worst.message or worst.status).strip().partition("\n")[0]
    return DefectRecord(
        fingerprint=key,
        status=worst.status,
        law=worst.law,
        headline=f"{worst.law} on {worst.variant}: {first}",
        issue=worst.issue,
        cells=tuple(cell.id for cell in cells),
        variants=(worst.variant,),
        layers=tuple(sorted({cell.layer for cell in cells})),
        dtypes=tuple(sorted({cell.dtype for cell in cells if cell.dtype})),
        ratio=worst.ratio,
        token=worst.worst.token if worst.worst else None,
        words=worst.worst.words if worst.worst else None,
        message=worst.message,
        script=None,
    )


def verdict(record: Record) -> Verdict:
    """Judge a record by its cells: one that no defect names still counts."""
    name = f"{record.implementation.name} {record.implementation.version}"
    whole = fold(record.cells) if record.cells else None
    run = whole.run if whole else 0
    causes = [defect.status for defect in defects(record)]
    broken = [cell for cell in record.cells if cell.status in ("violation", "error")]
    stale = sum(cell.status == "fixed" for cell in record.cells)
    known = sum(cell.status == "known" for cell in record.cells)
    apart = f"{count(len(known_issues(record)), 'known issue')} in {count(known, 'cell')}" if known else ""
    doubts = _doubts(record, run)
    tail = f" Besides, {apart}." if apart else ""
    tail += f" And {doubts}." if doubts else ""
    listed = f"{count(stale, 'cell')} {'holds' if stale == 1 else 'hold'} that the ledger lists as broken"
    if broken:
        distinct = causes.count("violation") + causes.count("error")
        sentence = (
            f"{name} breaks {count(len({cell.law for cell in broken}), 'law')}: "
            f"{count(distinct, 'distinct defect')} in {len(broken):,} of {count(run, 'cell')} run."
        )
        return Verdict("violates", "Violates", sentence + (f" {listed}." if stale else "") + tail, 1)
    if stale:
        return Verdict("violates", "Ledger out of date", f"{name}: {listed}; remove the entries.{tail}", 1)
    if doubts:
        return Verdict(
            "unvouched",
            "Cannot vouch",
            f"The harness cannot vouch for its verdict on {name}: {doubts}." + (f" Besides, {apart}." if apart else ""),
            3,
        )
    if known:
        return Verdict(
            "known",
            "Holds, with known issues",
            f"{name} keeps its laws in {run - known:,} of {count(run, 'cell')} run; the rest are {apart}.",
            0,
        )
    return Verdict("holds", "Holds", f"{name} keeps every law in all {count(run, 'cell')} run.", 0)


def _doubts(record: Record, run: int) -> str:
    vacuous = sum(cell.status == "vacuous" for cell in record.cells)
    alive = sum(not fault.killed for fault in record.faults)
    found = [] if run else ["no cell was run"]
    if vacuous:
        found.append(f"{count(vacuous, 'cell')} tested nothing")
    if alive:
        found.append(f"{count(alive, 'deliberate fault')} went unnoticed")
    return " and ".join(found)


def _folded(cells: Sequence[CellRecord], key) -> dict:
    groups: dict = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return {name: fold(groups[name]) for name in sorted(groups, key=str)}


def _law_rank(law: str) -> tuple:
    return *_rank(GROUPS, law.partition(".")[0]), law


def _rank(order: Sequence[str], name: str) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order)), name
