"""What a run says at its end: defects first, then the denominator."""

from __future__ import annotations

from collections.abc import Iterable

from peftcheck.record import FAILING, DefectRecord, Record

_ORDER = ("pass", "known", "unsupported", "absent", "vacuous", "violation", "fixed", "error")


def summary(run: Record) -> Iterable[str]:
    """Yield the lines that close a run."""
    fresh = [defect for defect in run.defects if defect.status != "known"]
    for defect in fresh:
        yield from _defect(defect)
    fixed = [cell for cell in run.cells if cell.status == "fixed"]
    for cell in fixed:
        yield f"FIXED but listed: {cell.id}: {cell.message}"
    counts = {status: sum(cell.status == status for cell in run.cells) for status in _ORDER}
    ran = len(run.cells) - counts["absent"] - counts["unsupported"]
    known = len(run.defects) - len(fresh)
    yield (
        f"{run.implementation.name} {run.implementation.version}: {len(run.cells)} cells, {ran} run, "
        + ", ".join(f"{counts[status]} {status}" for status in _ORDER)
        + f"; {len(fresh)} new defects, {known} known; {sum(cell.cases for cell in run.cells)} law checks, "
        f"profile {run.profile}, seed {run.seed}"
    )


def _defect(defect: DefectRecord) -> Iterable[str]:
    yield f"{defect.status.upper()} {defect.fingerprint} ({len(defect.cells)} cells)"
    yield f"  {defect.headline}"
    if defect.words:
        yield f"  case: {defect.words}"
    for step in defect.steps:
        yield f"  {step}"
    if defect.token:
        yield f"  reproduce with: peftcheck replay {defect.token}"


def exit_code(run: Record | None, vouched: bool, usage: bool = False) -> int:
    """Return 2 for a usage error, else 1 for a red cell of the library, else 3 where the harness cannot vouch, else 0."""
    if usage:
        return 2
    if run is None or not run.cells:
        return 3
    # a fault of the harness is an error cell without a failure of the library behind it
    library = any(cell.status in FAILING and (cell.fingerprint or cell.status == "fixed") for cell in run.cells)
    died = any(cell.status == "error" and cell.message and "interpreter died" in cell.message for cell in run.cells)
    if library or died:
        return 1
    return 0 if vouched else 3
