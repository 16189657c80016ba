"""From the results of a run to its record, and to what the terminal says at the end."""

from __future__ import annotations

import platform
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from peftcheck import checkpoint_table, engine, record, repro, shrink
from peftcheck.case import decode, encode
from peftcheck.dataclass_json import Mismatch
from peftcheck.errors import HarnessError
from peftcheck.implementation import Implementation
from peftcheck.measurement import Repair
from peftcheck.record import CellRecord, DefectRecord, LedgerRecord, QuantizedRecord, Record, Table, Worst
from peftcheck.session import Session
from peftcheck.watchdog import CASE_SECONDS, interrupt

SHRINK_CHECKS = 4000  # for all defects of a run together
_PACKAGES = ("torch", "numpy", "transformers", "bitsandbytes", "torchao", "optimum-quanto", "hqq", "accelerate")


def assemble(
    session: Session,
    results: dict[str, dict],
    expected: Sequence[str],
    died: set[str],
    calibration: dict,
    started: float,
) -> tuple[Record, frozenset[str]]:
    """Return the record of a run, and the ids of the cells for which the harness cannot vouch.

    `results`: plain verdicts by cell id; `expected`: every collected id; `died`: ids over which a worker died. A cell
    without result is never lost in silence: it is an error of the library where a worker died over it, and a
    fault of the harness otherwise. Raises HarnessError for a record that contradicts itself.
    """
    unvouched = set()
    plain = []
    for name in expected:
        found = results.get(name)
        if found is None:
            found = _missing(session, name, name in died)
        if found["harness"] or found["status"] == "vacuous":
            unvouched.add(name)
        plain.append(found)
    cells = tuple(_cell(one) for one in plain)
    settings = session.settings
    made = Record(
        schema=record.SCHEMA,
        peftcheck=metadata.version("peftcheck"),
        implementation=record.Implementation(session.implementation.name, session.implementation.version),
        environment=environment() | ({"shard": "{}/{}".format(*settings.shard)} if settings.shard != (1, 1) else {}),
        calibration=calibration,
        profile=settings.profile,
        seed=settings.seed,
        seconds=round(time.time() - started, 3),
        cells=cells,
        defects=defects(plain),
        ledger=_ledger(session, plain),
        totals=record.totals(cells),
        measurements=_checkpoints(session, cells),
        quantized=tuple(QuantizedRecord(**one["quantized"]) for one in plain if one["quantized"]),
    )
    try:
        record.check(made)
    except Mismatch as error:
        raise HarnessError(f"the record of this run contradicts itself, and nobody could read it: {error}") from error
    return made, frozenset(unvouched)


def _checkpoints(session: Session, cells: Sequence[CellRecord]) -> tuple[Table, ...]:
    """Return what checkpoints hold, of the variants of which the run asked for it."""
    asked = {cell.variant for cell in cells if cell.law == "state.checkpoint_size"}
    table = checkpoint_table.table(session.implementation, asked) if asked else None
    return (table,) if table is not None else ()


def environment() -> dict[str, Any]:
    """Return the versions that a result depends on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system(), **versions}


def _missing(session: Session, name: str, died: bool) -> dict[str, Any]:
    cell = next(cell for cell in session.cells if cell.id == name)
    text = "the interpreter died while this cell was checked" if died else "lost: no worker reported this cell"
    blank = dict.fromkeys(("ratio", "effect", "token", "words", "fingerprint", "issue"))
    sweep = cell.sweep
    return {
        **blank,
        "id": name,
        "law": cell.law,
        "variant": sweep.variant,
        "layer": sweep.layer,
        "dtype": sweep.dtype,
        "quantizer": sweep.quantizer,
        "kind": cell.kind,
        "status": "error",
        "cases": 0,
        "seconds": 0.0,
        "message": text,
        "harness": not died,
        "quantized": None,
        "failures": [],
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def _cell(plain: dict[str, Any]) -> CellRecord:
    ratio = _number(plain["ratio"])
    worst = Worst(plain["token"], plain["words"]) if plain["token"] else None
    same = (
        "id",
        "law",
        "variant",
        "layer",
        "dtype",
        "quantizer",
        "kind",
        "status",
        "cases",
        "fingerprint",
        "issue",
        "message",
    )
    return CellRecord(
        **{name: plain[name] for name in same},
        ratio=ratio,
        headroom=record.headroom(ratio),
        effect=_number(plain["effect"]),
        seconds=round(plain["seconds"], 6),
        worst=worst,
        repairs=tuple(record.Repair(**way) for way in plain.get("repairs", ())),
    )


def defects(plain: Sequence[dict[str, Any]]) -> tuple[DefectRecord, ...]:
    """Group every failure of every cell by its fingerprint; new ones first, then known ones."""
    groups: dict[str, list[tuple[dict, dict]]] = {}
    for cell in plain:
        for failure in cell["failures"]:
            groups.setdefault(failure["fingerprint"], []).append((cell, failure))
    made = [_defect(name, members) for name, members in groups.items()]
    order = {"error": 0, "violation": 0, "known": 1}
    return tuple(sorted(made, key=lambda d: (order[d.status], d.law, d.fingerprint)))


def _defect(name: str, members: list[tuple[dict, dict]]) -> DefectRecord:
    fresh = [(cell, failure) for cell, failure in members if failure["issue"] is None]
    cell, failure = (fresh or members)[0]
    ratios = [_number(f["ratio"]) for _, f in members]
    known = [r for r in ratios if r is not None]
    shown = fresh or members
    return DefectRecord(
        fingerprint=name,
        status=failure["status"] if fresh else "known",
        law=cell["law"],
        headline=f"{cell['law']}: {failure['message']}",
        issue=failure["issue"],
        cells=tuple(dict.fromkeys(c["id"] for c, _ in shown)),
        variants=tuple(dict.fromkeys(c["variant"] for c, _ in shown)),
        layers=tuple(dict.fromkeys(c["layer"] for c, _ in shown)),
        dtypes=tuple(dict.fromkeys(c["dtype"] for c, _ in shown if c["dtype"])),
        ratio=max(known, key=record.severity) if known else None,
        token=failure["token"],
        words=failure["words"],
        message=failure["message"],
        script=None,
        repair="; ".join(Repair(**way).words() for way in failure.get("repairs", ())) or None,
    )


def shrunk(session: Session, defect: DefectRecord, budget: int) -> tuple[DefectRecord, int]:
    """Return the defect with its case shrunk and a standalone script, and the checks that it took."""
    ends = defect.fingerprint.endswith("|interpreter") or "|Hung in " in defect.fingerprint
    if defect.token is None or ends:  # what kills or hangs a process is not tried two hundred times in this one
        return defect, 0
    implementation: Implementation = session.implementation
    case, name = decode(defect.token)
    law = session.laws.get(name)
    if law is None:
        return defect, 0
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2 * CASE_SECONDS)
    try:
        small = shrink.shrink(implementation, case, law, defect.fingerprint, engine.check, min(200, budget))
        script = repro.script(implementation, small.case, law)
    except Exception as error:  # the defect stays as red as it was: only its convenience is lost, and that is said
        return replace(defect, steps=(f"could not be shrunk: {type(error).__name__}: {error}",)), 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    token = encode(small.case, name)
    return replace(defect, token=token, words=small.case.words(), steps=small.steps, script=script), small.checks


def with_shrunk(session: Session, run: Record) -> Record:
    """Return the record with every new defect shrunk, as far as the checks for it reach."""
    left, done = SHRINK_CHECKS, []
    for defect in run.defects:
        if defect.status != "known" and left > 0:
            defect, used = shrunk(session, defect, left)
            left -= used
        done.append(defect)
    return replace(run, defects=tuple(done))


def _ledger(session: Session, plain: Sequence[dict[str, Any]]) -> tuple[LedgerRecord, ...]:
    cells: dict[str, dict[str, None]] = {}
    for cell in plain:
        for failure in cell["failures"]:
            if failure["issue"] is not None:
                cells.setdefault(failure["issue"], {})[cell["id"]] = None
    return tuple(
        LedgerRecord(
            entry.id,
            entry.kind,
            ", ".join(entry.law),
            session.court.verdict(entry.id) if entry.id in cells else "not run",
            entry.reason,
            entry.url,
            str(entry.versions),
            tuple(witness.token for witness in entry.witnesses),
            tuple(cells.get(entry.id, ())),
            entry.severity,
        )
        for entry in session.court.entries()
    )
