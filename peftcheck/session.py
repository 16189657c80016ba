"""One worker's session: sweeps are walked once, and each cell's result is judged against the ledger."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftcheck import engine, ledger, selection, suite
from peftcheck import implementation as port
from peftcheck import law as registry
from peftcheck.calibration import calibrate
from peftcheck.case import Sweep
from peftcheck.errors import HarnessError, UsageError
from peftcheck.hearings import Hearings
from peftcheck.suite import Cell, CellResult, Failure, Filters
from peftcheck.walk import Walk
from peftcheck.watchdog import CASE_SECONDS, Watchdog


@dataclass(frozen=True)
class Settings:
    """What a run was asked for. `ledger`: a path, '' for the implementation's own, None for no ledger."""

    target: str
    profile: str = "quick"
    seed: int = 0
    ledger: str | None = ""
    filters: Filters = field(default_factory=Filters)
    shard: tuple[int, int] = (1, 1)
    journal: str | None = None
    watchdog: float = CASE_SECONDS


def parse_shard(text: str | None) -> tuple[int, int]:
    """Return (i, n) of a shard written 'i/n', (1, 1) of None; raises UsageError for anything else."""
    if text is None:
        return (1, 1)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"a shard is written i/n with 1 <= i <= n, not '{text}'")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Verdict:
    """A judged cell: its status, every failure with the issue that absorbs it, and the issues that had a say."""

    cell: Cell
    status: str
    result: CellResult
    issues: tuple[str | None, ...] = ()
    listed: tuple[str, ...] = ()
    message: str | None = None
    harness: bool = False

    def as_plain(self) -> dict[str, Any]:
        """Return the verdict as JSON data, to travel from a worker to its controller."""
        result = self.result
        leading = next((i for i, issue in enumerate(self.issues) if issue is None), 0 if self.issues else None)
        failures = [
            {
                "fingerprint": f.fingerprint,
                "status": f.status,
                "token": f.token,
                "words": f.words,
                "message": f.message,
                "ratio": None if f.ratio is None else str(f.ratio),
                "issue": issue,
                "repairs": _repairs(f),
            }
            for f, issue in zip(result.failures, self.issues, strict=True)
        ]
        lead = failures[leading] if leading is not None else None
        return {
            "id": self.cell.id,
            "law": self.cell.law,
            **{k: v for k, v in asdict(self.cell.sweep).items() if k != "implementation"},
            "kind": self.cell.kind,
            "status": self.status,
            "cases": result.cases,
            "ratio": None if result.ratio is None else str(result.ratio),
            "effect": None if result.effect is None else str(result.effect),
            "seconds": result.seconds,
            "token": lead["token"] if lead else result.token,
            "words": lead["words"] if lead else result.words,
            "fingerprint": lead["fingerprint"] if lead else None,
            "issue": lead["issue"] if lead else next(iter(self.listed), None),
            "message": self.message or (lead["message"] if lead else result.message),
            "harness": self.harness,
            "quantized": None if result.quantized is None else asdict(result.quantized),
            "repairs": next((f["repairs"] for f in failures if f["repairs"]), []),
            "failures": failures,
        }


def _repairs(failure: Failure) -> list[dict[str, Any]]:
    measurement = failure.outcome.measurement
    return [asdict(way) for way in measurement.repairs] if measurement else []


class Session:
    """The implementation, the laws, the ledger, and the sweeps walked so far."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        if settings.profile not in suite.PROFILES:
            raise UsageError(f"unknown profile '{settings.profile}': choose from {', '.join(suite.PROFILES)}")
        self.implementation = port.load(settings.target)
        self.laws = {law.name: law for law in registry.laws()}
        filters = suite.validated(settings.filters, self.implementation, tuple(self.laws.values()))
        found = suite.cells(self.implementation, tuple(self.laws.values()), filters)
        profile = suite.PROFILES[settings.profile]
        found = [cell for cell in found if profile.takes(cell, filters)]
        if not filters.dtype:
            turns = profile.turns - selection.lifted(filters)
            logic = frozenset(name for name, law in self.laws.items() if law.logic)
            found = selection.in_turn(found, self.implementation, logic, turns, settings.seed)
        self.cells = _shard(found, settings.shard)
        if not self.cells:
            raise UsageError("no cell is left: the filters exclude each other; see peftcheck list cells")
        self._own_folder = None if settings.journal else tempfile.TemporaryDirectory(prefix="peftcheck-")
        self._journal = Path(settings.journal or self._own_folder.name)
        self.court = ledger.Court(
            self._ledger(), self.implementation, self.laws.values(), hearings=Hearings(self._journal)
        )
        self.select(self.cells)
        self._results: dict[str, CellResult] = {}
        self._crashed: set[Sweep] = set()
        self.calibration: dict[str, Any] = {}

    def _ledger(self) -> ledger.Ledger:
        if self.settings.ledger is None:
            return ledger.EMPTY
        path = Path(self.settings.ledger) if self.settings.ledger else self.implementation.ledger
        if path is None or (not self.settings.ledger and not path.exists()):
            return ledger.EMPTY
        return ledger.load(path)

    def select(self, cells: Iterable[Cell]) -> None:
        """Say which cells are asked for: a walk over a sweep serves all of its own at once."""
        self._selected: dict[tuple[Sweep, str | None], list[Cell]] = {}
        first: dict[tuple[str, str], Sweep] = {}
        for cell in cells:
            self._selected.setdefault((cell.sweep, cell.kind), []).append(cell)
            if cell.law == "quantize.merge_budget":
                first.setdefault((cell.sweep.variant, cell.sweep.quantizer or ""), cell.sweep)
        self._costed = frozenset(first.values())  # one of each method and quantizer, whichever dtypes are asked

    def verdict(self, cell: Cell) -> Verdict:
        """Return the verdict on a cell; the first cell of a sweep walks it for all that are selected."""
        if cell.id not in self._results:
            own = self._selected[cell.sweep, cell.kind]
            try:
                self._walk(own)
            except HarnessError as error:
                for other in own:
                    self._results[other.id] = CellResult(other, "harness", message=str(error))
        return self._judge(cell, self._results[cell.id])

    def recovered(self, cell: Cell) -> list[Verdict]:
        """Return the verdicts of the whole sweep, where an earlier worker died over it and cannot report its own."""
        if cell.sweep not in self._crashed:
            return []
        siblings = [one for (sweep, _), cells in self._selected.items() if sweep == cell.sweep for one in cells]
        return [self._judge(other, self._results[other.id]) for other in siblings if other.id in self._results]

    def _walk(self, cells: Sequence[Cell]) -> None:
        if not self.calibration:
            with engine.pinned():
                self.calibration = calibrate()
        watchdog = Watchdog(self._journal, f"{cells[0].sweep}-{cells[0].kind}", self.settings.watchdog)
        if watchdog.crashed:
            self._crashed.add(cells[0].sweep)
        laws = {cell.law: self.laws[cell.law] for cell in cells}
        profile = suite.PROFILES[self.settings.profile]
        walk = Walk(
            self.implementation,
            cells[0].sweep,
            laws,
            profile,
            self.settings.seed,
            watchdog.watch,
            watchdog.crashed,
            cells[0].kind,
            cells[0].sweep in self._costed,
        )
        for result in walk.run().values():
            self._results[result.cell.id] = result
        watchdog.close()

    def _judge(self, cell: Cell, result: CellResult) -> Verdict:
        if result.state == "harness":
            return Verdict(cell, "error", result, message=f"the harness is at fault: {result.message}", harness=True)
        if result.state != "ran":
            return Verdict(cell, result.state, result)
        issues = tuple(self.court.absorbs(f.outcome, f.case) for f in result.failures)
        ruling = self.court.rule(cell.law, cell.sweep, [(f.outcome, f.case) for f in result.failures])
        return Verdict(cell, ruling.status, result, issues, ruling.issues, ruling.message or None)


def _shard(cells: list[Cell], shard: tuple[int, int]) -> list[Cell]:
    """Return the cells of shard i of n (from 1), whole sweeps at a time."""
    index, count = shard
    sweeps = list(dict.fromkeys(cell.sweep for cell in cells))
    mine = {sweep for position, sweep in enumerate(sweeps) if position % count == index - 1}
    return [cell for cell in cells if cell.sweep in mine]
