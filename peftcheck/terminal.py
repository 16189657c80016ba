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
    known = len({defect.issue for defect in run.defects if defect.status == "known"})
    yield (
        f"{run.implementation.name} {run.implementation.version}: {len(run.cells)} cells, {ran} run, "
        + ", ".join(f"{counts[status]} {status}" for status in _ORDER)
        + f"; {len(fresh)} new defects, {known} known issues; {sum(cell.cases for cell in run.cells)} law checks, "
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


def exit_code(run: Record | None, unvouched: frozenset[str]) -> int:
    """Return 1 for a red cell of the library, else 3 where the harness cannot vouch, else 0.

    `unvouched`: the ids of the cells that are red by the harness's own fault, or that tested nothing. Whatever else
    fails is the library's or its ledger's.
    """
    if run is None or not run.cells:
        return 3
    if any(cell.status in FAILING and cell.id not in unvouched for cell in run.cells):
        return 1
    return 3 if unvouched else 0
