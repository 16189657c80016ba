"""Hold the record of one run: its shape, its JSON, and the joining of shards.

The JSON is published as `record.schema.json` beside this module. Non-finite numbers are the strings "inf",
"-inf" and "nan", because JSON has no others. Fields that do not apply are null, never left out. What many cells share
stands once, in tables (`record_tables.py`): that is schema 2. Schema 1, in which each cell held its own, is still read.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcheck.dataclass_json import Mismatch, decode, encode, parse
from peftcheck.errors import HarnessError, UsageError
from peftcheck.record_tables import fold, unfold

SCHEMA = 2
READABLE = (1, SCHEMA)

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
class Repair:
    """Name a combination kind that gives what the cell's own kind does not, measured on the violating case.

    `rank` is what it costs, `instead` the rank of the kind asked for, `error` the relative error that is left.
    """

    kind: str
    rank: int
    instead: int
    error: float


@dataclass(frozen=True)
class CellRecord:
    """State what one law did on one sweep.

    `ratio` is the largest residual / budget over the cases, `headroom` what `headroom(ratio)` makes of it,
    `effect` how far the adapter moves the weight relative to its norm, `seconds` wall time, `repairs` what gives a
    violated combination today.
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
    repairs: tuple[Repair, ...] = ()


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
    """State one entry of the ledger and the verdict of its witness.

    `severity` is what it does to a user, `url` where it is reported upstream (null: no report was found).
    """

    id: str
    kind: str
    law: str
    verdict: str
    reason: str
    url: str | None
    versions: str | None
    witness: tuple[str, ...]
    cells: tuple[str, ...]
    severity: str | None = None


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
class QuantizedRecord:
    """State what one merge into quantized weights cost, in root mean squares over the elements of one layer.

    `weight` and `delta` are sizes; `step` is twice what rounding to the grid may cost at an element, `unavoidable` what
    it costs on the average, `cost` how far the merge was off. Of a delta a tenth of the step: `kept` is the share
    of it that the merge moved along it, `cosine` the direction's, `changed` the share of codes that moved at all;
    null where the method has no such delta. `drift` is how far ten merges and unmerges have moved the weights, `idle`
    how far ten of an adapter that changes nothing have; null where the method does not come back, or was not asked.
    """

    quantizer: str
    variant: str
    weight: float
    step: float
    delta: float
    unavoidable: float
    cost: float
    kept: float | None
    cosine: float | None
    changed: float | None
    drift: float | None = None
    idle: float | None = None


@dataclass(frozen=True)
class Implementation:
    """Name the library under test."""

    name: str
    version: str


@dataclass(frozen=True)
class Record:
    """Hold one run. `peftcheck` is the version of the harness; `environment["shard"]`, if there, is "i/n".

    `schema` is that of the JSON it is written as, whatever schema it was read from.
    """

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
    quantized: tuple[QuantizedRecord, ...] = ()


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
    """Return the record as JSON with one case, cell or defect a line, so that a line diff can be read."""
    parts = []
    for key, value in fold(encode(record)).items():
        if isinstance(value, list) and value:
            body = ",\n".join("  " + json.dumps(item, allow_nan=False, separators=(",", ":")) for item in value)
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
        raise UsageError(f"cannot write {path}: {error.strerror or error}; give a path that can be written") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | Path) -> Record:
    """Read a record; raise UsageError where the file is none of a known schema, or contradicts itself."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; give the JSON that a run wrote") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text; give the JSON that a run wrote with --record") from error
    return loads(text, str(path))


def loads(text: str, name: str = "the record") -> Record:
    """Parse a record; `name` says in an error where the text came from."""
    try:
        value = parse(text)
    except ValueError as error:
        raise UsageError(f"{name} is not JSON ({error}); give the JSON that a run wrote with --record") from error
    if not isinstance(value, dict) or "schema" not in value:
        raise UsageError(f"{name} is not a record of peftcheck; give the JSON that a run wrote with --record")
    schema = value["schema"]
    if schema not in READABLE or isinstance(schema, bool):
        raise UsageError(
            f"{name} has schema {schema!r:.40} where this peftcheck reads schema {' and '.join(map(str, READABLE))}; "
            "run again, or use the version of peftcheck that wrote it"
        )
    try:
        record = replace(decode(Record, unfold(value) if schema == SCHEMA else value, "record"), schema=SCHEMA)
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
                raise Mismatch(f"defect {defect.fingerprint!r:.120} names the cell {key!r:.120}, which is not there")
    if len({(one.quantizer, one.variant) for one in record.quantized}) != len(record.quantized):
        raise Mismatch("a quantizer and method has two rows of what a merge costs")
    for table in record.measurements:
        if any(len(row) != len(table.columns) for row in table.rows):
            raise Mismatch(f"a row of the table {table.title!r:.120} does not fit its columns")
        if any(not (value is None or isinstance(value, (str, int, float))) for row in table.rows for value in row):
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
    value["quantized"].sort(key=lambda one: (one["quantizer"], one["variant"]))
    value["defects"].sort(key=lambda defect: defect["fingerprint"])
    value["ledger"].sort(key=lambda entry: entry["id"])
    value["faults"].sort(key=lambda fault: fault["name"])
    return value


def without_losses(expected: Iterable[str], record: Record) -> Record:
    """Return the record if it has every expected cell and no other; else raise HarnessError, naming some."""
    expected, found = set(expected), {cell.id for cell in record.cells}
    for word, ids in (("lost", expected - found), ("not declared", found - expected)):
        if ids:
            raise HarnessError(f"{len(ids)} of {len(expected)} cells {word}: {some(ids)}")
    return record


def some(names: Iterable[str]) -> str:
    """Return the first few of the names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
