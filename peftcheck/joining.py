"""Join the records of a run's shards into one, without losing a cell."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from peftcheck.dataclass_json import encode
from peftcheck.errors import UsageError
from peftcheck.record import (
    STATUSES,
    CellRecord,
    DefectRecord,
    FaultRecord,
    LedgerRecord,
    QuantizedRecord,
    Record,
    Table,
    severity,
    some,
    totals,
)


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
                sorted(f"{value.name} {value.version}" if name == "implementation" else str(value) for value in values)
            )
            raise UsageError(f"records of different {name} cannot be joined ({shown}); join the shards of one run")
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
            [{key: value for key, value in record.environment.items() if key != "shard"} for record in records]
        ),
        calibration=_agreed([record.calibration for record in records]),
        defects=_grouped([record.defects for record in records], "fingerprint", _joined_defect),
        ledger=_grouped([record.ledger for record in records], "id", _joined_entry),
        faults=_grouped([record.faults for record in records], "name", _joined_fault),
        measurements=_tables(table for record in records for table in record.measurements),
        quantized=_first_of_each(one for record in records for one in record.quantized),
    )


def _require_all_shards(records: Sequence[Record]) -> None:
    shards = [str(record.environment["shard"]) for record in records if "shard" in record.environment]
    counts = {shard.partition("/")[2] for shard in shards}
    if len(counts) > 1 or any(not count.isdecimal() for count in counts):
        raise UsageError(f"shards of different splits cannot be joined ({some(set(shards))}); join those of one run")
    for count in counts:
        if missing := {f"{index}/{count}" for index in range(1, int(count) + 1)} - set(shards):
            raise UsageError(f"shard {some(missing)} is missing and its cells would be lost; give its record too")


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
        verdicts = some({entry.verdict for entry in judged})
        raise UsageError(f"ledger entry {judged[0].id} has several verdicts ({verdicts}); join the shards of one run")
    return replace(judged[0], cells=tuple(sorted({cell for entry in judged for cell in entry.cells})))


def _joined_fault(faults: list[FaultRecord]) -> FaultRecord:
    laws = tuple(sorted({law for fault in faults for law in fault.laws_killing}))
    return replace(faults[0], laws_killing=laws, killed=any(fault.killed for fault in faults))


def _first_of_each(found: Iterable[QuantizedRecord]) -> tuple[QuantizedRecord, ...]:
    """Keep one row for each quantizer and method: shards on different processors may differ in the last digit."""
    rows: dict[tuple[str, str], QuantizedRecord] = {}
    for one in found:
        rows.setdefault((one.quantizer, one.variant), one)
    return tuple(rows[key] for key in sorted(rows))


def _tables(found: Iterable[Table]) -> tuple[Table, ...]:
    """Put the rows of tables with one title together, in the order of their first values where shards have different ones."""
    groups: dict[tuple[str, ...], list[Table]] = {}
    for table in found:
        groups.setdefault((table.title, *table.columns), []).append(table)
    return tuple(map(_joined_table, groups.values()))


def _joined_table(tables: list[Table]) -> Table:
    rows = _distinct(row for table in tables for row in table.rows)
    if rows == tables[0].rows:
        return tables[0]
    return replace(tables[0], rows=tuple(sorted(rows, key=lambda row: str(row[0]))))


def _agreed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Keep what all parts say alike, and where they differ, all that they say under `values`."""
    result = {}
    for key in sorted({key for part in parts for key in part}):
        values = _distinct(part[key] for part in parts if key in part)
        result[key] = values[0] if len(values) == 1 else {"values": sorted(values, key=str)}
    return result


def _distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple({json.dumps(encode(value), sort_keys=True): value for value in values}.values())
