"""Hold the record of one run: its shape, its JSON, and the joining of shards.

The JSON is published as `record.schema.json` beside this module. Non-finite numbers are the strings "inf",
"-inf" and "nan", because JSON has no others. Fields that do not apply are null, never left out.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcheck.dataclass_json import Mismatch, decode, encode, parse
from peftcheck.errors import HarnessError, UsageError

SCHEMA = 1

# Worst first: where cells are folded into one square, the first status found in this order is shown.
STATUSES = ("violation", "error", "vacuous", "fixed", "known", "pass", "unsupported", "absent")
FAILING = ("violation", "error", "fixed")
NOT_RUN = ("unsupported", "absent")


@dataclass(frozen=True)
class Worst:
    """Name the worst case of a cell: its replay token, and the case in words."""

    token: str
    words: str


@dataclass(frozen=True)
class CellRecord:
    """State what one law did on one sweep.

    `ratio` is the largest residual / budget over the cases, `headroom` what `headroom(ratio)` makes of it,
    `effect` how far the adapter moves the weight relative to its norm, `seconds` wall time.
    """

    id: str
    law: str
    variant: str
    layer: str
    dtype: str | None
    quantizer: str | None
    kind: str | None
    status: str
    cases: int
    ratio: float | None
    headroom: float | None
    effect: float | None
    seconds: float
    worst: Worst | None
    fingerprint: str | None
    issue: str | None
    message: str | None


@dataclass(frozen=True)
class DefectRecord:
    """State one cause: every cell that carries its fingerprint, and how to see it again.

    `steps` is what shrinking showed, one sentence each; `script` a standalone reproducer; `repair` what could
    be done instead.
    """

    fingerprint: str
    status: str
    law: str
    headline: str
    issue: str | None
    cells: tuple[str, ...]
    variants: tuple[str, ...]
    layers: tuple[str, ...]
    dtypes: tuple[str, ...]
    ratio: float | None
    token: str | None
    words: str | None
    message: str | None
    script: str | None
    steps: tuple[str, ...] = ()
    repair: str | None = None


@dataclass(frozen=True)
class LedgerRecord:
    """State one entry of the ledger and the verdict of its witness."""

    id: str
    kind: str
    law: str
    verdict: str
    reason: str
    url: str | None
    versions: str | None
    witness: tuple[str, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class FaultRecord:
    """State one deliberate defect, the real defect it is modelled on, and the laws that caught it."""

    name: str
    description: str
    models: str | None
    laws_killing: tuple[str, ...]
    killed: bool


@dataclass(frozen=True)
class Table:
    """Hold further published figures; every row has one value (text, number or null) for every column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str | None = None


@dataclass(frozen=True)
class Implementation:
    """Name the library under test."""

    name: str
    version: str


@dataclass(frozen=True)
class Record:
    """Hold one run. `peftcheck` is the version of the harness; `environment["shard"]`, if there, is "i/n"."""

    schema: int
    peftcheck: str
    implementation: Implementation
    environment: dict[str, Any]
    calibration: dict[str, Any]
    profile: str
    seed: int
    seconds: float
    cells: tuple[CellRecord, ...]
    defects: tuple[DefectRecord, ...]
    ledger: tuple[LedgerRecord, ...]
    totals: dict[str, int]
    faults: tuple[FaultRecord, ...] = ()
    measurements: tuple[Table, ...] = ()


def headroom(ratio: float | None) -> float | None:
    """Return the share of the budget that is left: 1 - ratio, and 0 for a ratio above 1 or NaN; null for
    null.

    Not 1 / ratio: that would say nothing that the ratio does not, and be infinite wherever arithmetic is
    exact.
    """
    if ratio is None:
        return None
    return 1.0 - ratio if ratio <= 1.0 else 0.0


def severity(ratio: float | None) -> float:
    """Order ratios: null below all, NaN above all."""
    if ratio is None:
        return -1.0
    return math.inf if math.isnan(ratio) else ratio


def totals(cells: Iterable[CellRecord]) -> dict[str, int]:
    """Count cells declared, cells run, cases, and cells of every status (zero where there is none)."""
    cells = tuple(cells)
    statuses = Counter(cell.status for cell in cells)
    run = len(cells) - sum(statuses[status] for status in NOT_RUN)
    counts = {"cells": len(cells), "run": run, "cases": sum(cell.cases for cell in cells)}
    return counts | {status: statuses[status] for status in STATUSES}


def dumps(record: Record) -> str:
    """Return the record as JSON with one cell or defect a line, so that a line diff can be read."""
    parts = []
    for key, value in encode(record).items():
        if isinstance(value, list) and value:
            body = ",\n".join("  " + json.dumps(item, allow_nan=False) for item in value)
            parts.append(f" {json.dumps(key)}: [\n{body}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(record: Record, path: str | Path) -> None:
    """Write the record, all of it or nothing."""
    write_text(path, dumps(record))


def write_text(path: str | Path, text: str) -> None:
    """Write a file beside its final place and rename it, so that no reader ever sees half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; give a path that can be written"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | Path) -> Record:
    """Read a record; raise UsageError where the file is none of this schema, or contradicts itself."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror or error}; give the JSON that a run wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text; give the JSON that a run wrote with --record") from error
    return loads(text, str(path))


def loads(text: str, name: str = "the record") -> Record:
    """Parse a record; `name` says in an error where the text came from."""
    try:
        value = parse(text)
    except ValueError as error:
        raise UsageError(
            f"{name} is not JSON ({error}); give the JSON that a run wrote with --record"
        ) from error
    if not isinstance(value, dict) or "schema" not in value:
        raise UsageError(f"{name} is not a record of peftcheck; give the JSON that a run wrote with --record")
    if value["schema"] != SCHEMA or isinstance(value["schema"], bool):
        raise UsageError(
            f"{name} has schema {value['schema']!r:.40} where this peftcheck reads schema {SCHEMA}; "
            "run again, or use the version of peftcheck that wrote it"
        )
    try:
        record = decode(Record, value, "record")
        check(record)
    except Mismatch as error:
        raise UsageError(f"{name} is not a valid record: {error}; run again to write a sound one") from None
    return record


def check(record: Record) -> None:
    """Raise Mismatch unless ids are unique, totals fit the cells, and defects and cells name each other."""
    cells = {cell.id: cell for cell in record.cells}
    if len(cells) != len(record.cells):
        twice = next(key for key, count in Counter(cell.id for cell in record.cells).items() if count > 1)
        raise Mismatch(f"cell {twice!r:.120} is there twice")
    if dict(record.totals) != totals(record.cells):
        raise Mismatch("its totals are not those of its cells")
    for cell in record.cells:
        if cell.status not in STATUSES:
            raise Mismatch(f"cell {cell.id!r:.120} has the unknown status {cell.status!r:.40}")
    fingerprints = {defect.fingerprint for defect in record.defects}
    if len(fingerprints) != len(record.defects):
        raise Mismatch("a defect's fingerprint is there twice")
    for cell in record.cells:
        if cell.fingerprint is not None and cell.fingerprint not in fingerprints:
            raise Mismatch(f"cell {cell.id!r:.120} has a fingerprint that no defect has")
    for defect in record.defects:
        if defect.status not in STATUSES:
            raise Mismatch(f"defect {defect.fingerprint!r:.120} has the unknown status {defect.status!r:.40}")
        for key in defect.cells:
            if key not in cells:
                raise Mismatch(
                    f"defect {defect.fingerprint!r:.120} names the cell {key!r:.120}, which is not there"
                )
    for table in record.measurements:
        if any(len(row) != len(table.columns) for row in table.rows):
            raise Mismatch(f"a row of the table {table.title!r:.120} does not fit its columns")
        if any(
            not (value is None or isinstance(value, (str, int, float))) for row in table.rows for value in row
        ):
            raise Mismatch(f"the table {table.title!r:.120} holds more than text, numbers and null")


def comparable(record: Record) -> dict[str, Any]:
    """Return what a serial and a parallel run must share: all but seconds and environment, in one order."""
    value = encode(record)
    for key in ("seconds", "environment"):
        del value[key]
    value["cells"] = sorted(
        ({k: v for k, v in cell.items() if k != "seconds"} for cell in value["cells"]),
        key=lambda cell: cell["id"],
    )
    for defect in value["defects"]:
        for key in ("cells", "variants", "layers", "dtypes"):
            defect[key] = sorted(defect[key])
    for entry in value["ledger"]:
        entry["cells"] = sorted(entry["cells"])
    for fault in value["faults"]:
        fault["laws_killing"] = sorted(fault["laws_killing"])
    value["defects"].sort(key=lambda defect: defect["fingerprint"])
    value["ledger"].sort(key=lambda entry: entry["id"])
    value["faults"].sort(key=lambda fault: fault["name"])
    return value


def without_losses(expected: Iterable[str], record: Record) -> Record:
    """Return the record if it has every expected cell and no other; else raise HarnessError, naming some."""
    expected, found = set(expected), {cell.id for cell in record.cells}
    for word, ids in (("lost", expected - found), ("not declared", found - expected)):
        if ids:
            raise HarnessError(f"{len(ids)} of {len(expected)} cells {word}: {_some(ids)}")
    return record


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def join(records: Sequence[Record]) -> Record:
    """Join the shards of one run; raise UsageError where that would lose a cell or change a verdict.

    Shards must be of one implementation, profile, seed and harness. A cell in several shards must say the
    same in each, seconds aside. Where `environment["shard"]` says "i/n", every one of the n must be there.
    """
    if not records:
        raise UsageError("there is nothing to join; give at least one record")
    first = records[0]
    for name in ("schema", "peftcheck", "implementation", "profile", "seed"):
        values = {getattr(record, name) for record in records}
        if len(values) > 1:
            shown = ", ".join(
                sorted(
                    f"{value.name} {value.version}" if name == "implementation" else str(value)
                    for value in values
                )
            )
            raise UsageError(
                f"records of different {name} cannot be joined ({shown}); join the shards of one run"
            )
    _require_all_shards(records)
    cells: dict[str, CellRecord] = {}
    for cell in (cell for record in records for cell in record.cells):
        held = cells.setdefault(cell.id, cell)
        if held is not cell and encode(replace(held, seconds=0.0)) != encode(replace(cell, seconds=0.0)):
            raise UsageError(
                f"cell {cell.id} has two verdicts ({held.status} and {cell.status}); "
                "join the shards of one run, each once"
            )
    ordered = tuple(cells[key] for key in sorted(cells))
    return replace(
        first,
        cells=ordered,
        totals=totals(ordered),
        seconds=sum(record.seconds for record in records),
        environment=_agreed(
            [
                {key: value for key, value in record.environment.items() if key != "shard"}
                for record in records
            ]
        ),
        calibration=_agreed([record.calibration for record in records]),
        defects=_grouped([record.defects for record in records], "fingerprint", _joined_defect),
        ledger=_grouped([record.ledger for record in records], "id", _joined_entry),
        faults=_grouped([record.faults for record in records], "name", _joined_fault),
        measurements=_distinct(table for record in records for table in record.measurements),
    )


def _require_all_shards(records: Sequence[Record]) -> None:
    shards = [str(record.environment["shard"]) for record in records if "shard" in record.environment]
    counts = {shard.partition("/")[2] for shard in shards}
    if len(counts) > 1 or any(not count.isdecimal() for count in counts):
        raise UsageError(
            f"shards of different splits cannot be joined ({_some(set(shards))}); join those of one run"
        )
    for count in counts:
        if missing := {f"{index}/{count}" for index in range(1, int(count) + 1)} - set(shards):
            raise UsageError(
                f"shard {_some(missing)} is missing and its cells would be lost; give its record too"
            )


def _grouped(parts: Iterable[Iterable[Any]], key: str, joined: Any) -> tuple[Any, ...]:
    groups: dict[str, list[Any]] = {}
    for item in (item for part in parts for item in part):
        groups.setdefault(getattr(item, key), []).append(item)
    return tuple(joined(groups[name]) for name in sorted(groups))


def _joined_defect(defects: list[DefectRecord]) -> DefectRecord:
    """Keep the witness of the gravest status, then of the largest ratio; the token decides between equals."""
    kept = min(
        defects,
        key=lambda defect: (STATUSES.index(defect.status), -severity(defect.ratio), defect.token or ""),
    )
    union = {
        name: tuple(sorted({item for defect in defects for item in getattr(defect, name)}))
        for name in ("cells", "variants", "layers", "dtypes")
    }
    return replace(kept, **union)


def _joined_entry(entries: list[LedgerRecord]) -> LedgerRecord:
    """Take the verdict of the shards that hold cells of the entry: the others had nothing to judge it by."""
    judged = [entry for entry in entries if entry.cells] or entries
    if len({entry.verdict for entry in judged}) > 1:
        verdicts = _some({entry.verdict for entry in judged})
        raise UsageError(
            f"ledger entry {judged[0].id} has several verdicts ({verdicts}); join the shards of one run"
        )
    return replace(judged[0], cells=tuple(sorted({cell for entry in judged for cell in entry.cells})))


def _joined_fault(faults: list[FaultRecord]) -> FaultRecord:
    laws = tuple(sorted({law for fault in faults for law in fault.laws_killing}))
    return replace(faults[0], laws_killing=laws, killed=any(fault.killed for fault in faults))


def _agreed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Keep what all parts say alike, and where they differ, all that they say under `values`."""
    result = {}
    for key in sorted({key for part in parts for key in part}):
        values = _distinct(part[key] for part in parts if key in part)
        result[key] = values[0] if len(values) == 1 else {"values": sorted(values, key=str)}
    return result


def _distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple({json.dumps(encode(value), sort_keys=True): value for value in values}.values())
