"""The record keeps what it is given, refuses what it cannot trust, and joins shards without a loss."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from sample_record import cell, defect, record, sample

import peftcheck.record as records
from peftcheck.errors import HarnessError, UsageError
from peftcheck.joining import join
from peftcheck.record import (
    SCHEMA,
    LedgerRecord,
    comparable,
    dumps,
    headroom,
    loads,
    read,
    totals,
    write,
)
from peftcheck.tokens import pack

PUBLISHED = json.loads(Path(records.__file__).with_name("record.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(PUBLISHED)


def small():
    """Build a record with one cell of every kind of value."""
    return record(
        [
            cell("merge.roundtrip", "oft", "conv2d", status="violation", ratio=math.nan),
            cell("merge.oracle", "oft", "conv2d", status="violation", ratio=math.inf),
            cell("combine.linear", "lora", "linear", kind="svd", ratio=0.25),
            cell("refuse.clear", "lora", "mha", None, ratio=None),
        ],
        ledger=(LedgerRecord("peft-001", "bug", "merge.delta", "known", "reason", None, None, ("t",), ()),),
        faults=sample().faults,
        measurements=sample().measurements,
    )


def test_a_written_record_reads_back_the_same(tmp_path):
    original = sample()
    write(original, tmp_path / "new" / "record.json")
    again = read(tmp_path / "new" / "record.json")
    assert dumps(again) == dumps(original)
    assert len(again.cells) == len(original.cells) >= 3000
    # Compared as objects too, where NaN cannot be.
    finite = record([cell("merge.oracle", "lora", "linear", ratio=0.1 + 0.2)], ledger=small().ledger)
    assert loads(dumps(finite)) == finite


def test_non_finite_numbers_are_text_and_the_json_is_strict():
    def refuse(name):
        raise AssertionError(f"{name} in the JSON")

    value = json.loads(dumps(small()), parse_constant=refuse)
    assert [c["ratio"] for c in value["cells"]] == ["nan", "inf", 0.25, None]
    back = loads(dumps(small()))
    assert math.isnan(back.cells[0].ratio) and back.cells[1].ratio == math.inf


def test_the_published_schema_is_sound_and_accepts_a_record():
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)
    VALIDATOR.validate(json.loads(dumps(small())))
    VALIDATOR.validate(json.loads(dumps(record([]))))


def test_a_realistic_record_is_valid():
    value = json.loads(dumps(sample()))
    # A cell of each status and group is enough: validating thousands alike takes seconds and shows no more.
    seen = {(c["status"], c["law"].split(".")[0]): c for c in value["cells"]}
    VALIDATOR.validate(value | {"cells": list(seen.values())})


def spoilt():
    """Yield a name and a function that spoils the JSON of a record, each in one place."""
    yield "no cells", lambda v: v.pop("cells")
    yield "no table of cases", lambda v: v.pop("cases")
    yield "no table of messages", lambda v: v.pop("messages")
    yield "unknown field", lambda v: v.update(extra=1)
    yield "cell lacks a field", lambda v: v["cells"][0].pop("issue")
    yield "cell has another field", lambda v: v["cells"][0].update(more=None)
    yield "unknown status", lambda v: v["cells"][0].update(status="maybe")
    yield "text for a number", lambda v: v["cells"][0].update(ratio="large")
    yield "truth value for a number", lambda v: v["cells"][0].update(ratio=True)
    yield "truth value for an integer", lambda v: v.update(seed=True)
    yield "null where there must be text", lambda v: v["cells"][0].update(law=None)
    yield "number for text", lambda v: v["cells"][0].update(message=3.5)
    yield "cells is an object", lambda v: v.update(cells={})
    yield "worst without words", lambda v: v["cells"][0].update(worst={"token": "t"})
    yield "worst is an index", lambda v: v["cells"][0].update(worst=0)
    yield "worst points before the table", lambda v: v["cells"][0].update(worst={"case": -1})
    yield "worst points by a truth value", lambda v: v["cells"][0].update(worst={"case": False})
    yield "worst points by text", lambda v: v["cells"][0].update(worst={"case": "0"})
    yield "worst points and tells", lambda v: v["cells"][0].update(worst={"case": 0, "words": "w"})
    yield "message is a truth value", lambda v: v["cells"][0].update(message=False)
    yield "message before the table", lambda v: v["cells"][0].update(message=-1)
    yield "case without words", lambda v: v["cases"][0].pop("words")
    yield "case with a law", lambda v: v["cases"][0].update(law="merge.oracle")
    yield "case is text", lambda v: v["cases"].append("pc1.")
    yield "cases is an object", lambda v: v.update(cases={})
    yield "null among the messages", lambda v: v["messages"].append(None)
    yield "defect without witness", lambda v: v["defects"][0].pop("witness")
    yield "defect with a token of its own", lambda v: v["defects"][0].update(token="t")
    yield "witness without words", lambda v: v["defects"][0].update(witness={"token": "t"})
    yield "witness points before the table", lambda v: v["defects"][0].update(witness={"case": -1})
    yield "witness is text", lambda v: v["defects"][0].update(witness="t")
    yield "implementation is text", lambda v: v.update(implementation="peft 0.21.2")
    yield "a list in a table", lambda v: v["measurements"][0]["rows"].append([[], 1, 1, 1])
    yield "fraction for an integer", lambda v: v["cells"][0].update(cases=1.5)
    yield "defect of unknown status", lambda v: v["defects"][0].update(status="odd")
    yield "verdict is missing", lambda v: v["ledger"][0].pop("verdict")


@pytest.mark.parametrize("name, spoil", list(spoilt()), ids=[name for name, _ in spoilt()])
def test_schema_and_reader_refuse_the_same(name, spoil):
    value = json.loads(dumps(small()))
    assert VALIDATOR.is_valid(value)
    spoil(value)
    assert not VALIDATOR.is_valid(value), name
    with pytest.raises(UsageError) as caught:
        loads(json.dumps(value), "night.json")
    assert "night.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"schema": 1, "seed": NaN}', "NaN"),
        ("[]", "not a record"),
        ("{}", "not a record"),
        ('{"schema": 3}', "schema 3 where this peftcheck reads schema 1 and 2"),
        ('{"schema": 0}', "schema 0"),
        ('{"schema": "1"}', "schema '1'"),
        ('{"schema": [2]}', "schema [2]"),
        ('{"schema": true}', "schema True"),
        ('{"schema": 2.0, "cases": [], "messages": []}', "lacks"),
        ('{"schema": 1}', "lacks"),
        ('{"schema": 2}', "lacks"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, text, says):
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "r.json")
    message = str(caught.value)
    assert says in message and "r.json" in message and "\n" not in message


def test_a_missing_file_and_one_that_is_not_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path / "none.json")
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read(tmp_path / "r.json")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda v: v["cells"].pop(), "totals"),
        (lambda v: v["cells"].append(copy.deepcopy(v["cells"][0])), "twice"),
        (lambda v: v["totals"].update({"pass": 9}), "totals"),
        (lambda v: v["defects"].pop(), "fingerprint that no defect has"),
        (lambda v: v["defects"].append(copy.deepcopy(v["defects"][0])), "twice"),
        (lambda v: v["defects"][0]["cells"].append("gone"), "not there"),
        (lambda v: v["measurements"][0]["rows"].append([1]), "columns"),
        (lambda v: v["cells"][0].update(worst={"case": 99}), r"cells\[0\].worst.case is 99, where record.cases has"),
        (lambda v: v["cells"][0].update(message=99), r"cells\[0\].message is 99, where record.messages has"),
        (lambda v: v["defects"][0].update(witness={"case": 99}), r"defects\[0\].witness.case is 99"),
        (lambda v: v["cells"][0].update(worst={"case": int("9" * 4000)}), "worst.case is 999"),
        (lambda v: v["cases"][0].update(token="pc1.broken"), r"cases\[0\].token is not the token of a case"),
        (lambda v: v["cases"][0].update(token=pack("merge.oracle", "{}")), r"cases\[0\].token is not the token of"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(spoil, says):
    value = json.loads(dumps(small()))
    spoil(value)
    with pytest.raises(UsageError, match=says):
        loads(json.dumps(value))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write(small(), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(UsageError, match="No space left"):
        write(sample(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_a_value_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="object"):
        write(replace(small(), environment={"torch": object()}), tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_totals_count_every_status():
    cells = [cell("a.b", "lora", f"l{i}", status=s) for i, s in enumerate(records.STATUSES)]
    assert totals(cells) == {"cells": 8, "run": 6, "cases": 280} | dict.fromkeys(records.STATUSES, 1)
    assert totals([])["vacuous"] == 0


@pytest.mark.parametrize(
    "ratio, left",
    [(None, None), (0.0, 1.0), (0.75, 0.25), (1.0, 0.0), (7.0, 0.0), (math.inf, 0.0), (math.nan, 0.0)],
)
def test_headroom(ratio, left):
    assert headroom(ratio) == left


def test_comparable_forgets_time_place_and_order_only():
    one = small()
    other = replace(
        one, seconds=9.0, environment={}, cells=tuple(replace(c, seconds=7.0) for c in reversed(one.cells)),
        defects=tuple(reversed(one.defects)),
    )  # fmt: skip
    assert comparable(one) == comparable(other)
    changed = (replace(one.cells[0], ratio=2.0), *one.cells[1:])
    assert comparable(one) != comparable(replace(one, cells=changed))
    assert comparable(one) != comparable(replace(one, calibration={}))


def test_losses_are_named():
    whole = small()
    ids = [c.id for c in whole.cells]
    assert records.without_losses(ids, whole) is whole
    with pytest.raises(HarnessError, match=r"1 of 5 cells lost: merge\.drift"):
        records.without_losses([*ids, "merge.drift-lora"], whole)
    with pytest.raises(HarnessError, match="not declared"):
        records.without_losses(ids[1:], whole)


def shards(whole, count):
    """Split a record as a run with --shard would: every defect only with the cells of its shard."""
    for index in range(count):
        cells = whole.cells[index::count]
        ids = {c.id for c in cells}
        parts = [replace(d, cells=tuple(i for i in d.cells if i in ids)) for d in whole.defects]
        ledger = tuple(replace(e, cells=tuple(i for i in e.cells if i in ids)) for e in whole.ledger)
        yield replace(
            whole, cells=cells, totals=totals(cells), defects=tuple(p for p in parts if p.cells), ledger=ledger,
            seconds=whole.seconds / count, environment=whole.environment | {"shard": f"{index + 1}/{count}"},
        )  # fmt: skip


def test_joined_shards_are_the_whole_run_in_any_order():
    whole = sample()
    parts = list(shards(whole, 3))
    for order in (parts, parts[::-1]):
        joined = join(order)
        assert comparable(joined) == comparable(whole)
        assert joined.environment == whole.environment
        assert joined.seconds == pytest.approx(whole.seconds)
        assert loads(dumps(joined)).totals == whole.totals


def test_join_puts_the_rows_of_a_table_together_whichever_shards_have_them():
    (table,) = small().measurements
    rows = sorted(table.rows, key=lambda row: row[0])
    assert len(rows) > 2
    parts = [
        replace(small(), measurements=(replace(table, rows=tuple(some)),)) for some in (rows[1:], rows[:2], rows[::2])
    ]
    for order in (parts, parts[::-1]):
        (joined,) = join(order).measurements
        assert joined == replace(table, rows=tuple(rows))


def test_join_keeps_the_worst_witness_of_a_defect():
    mild = cell("merge.oracle", "lora", "linear", status="known", ratio=8.0)
    grave = cell("merge.oracle", "lora", "conv2d", status="violation", ratio=3.0)
    gravest = cell("merge.oracle", "lora", "mha", status="violation", ratio=math.nan)
    parts = [record([c], [defect([c], token=t)]) for c, t in ((mild, "a"), (grave, "b"), (gravest, "c"))]
    (found,) = join(parts).defects
    assert (found.token, found.status) == ("c", "violation") and math.isnan(found.ratio)
    assert found.layers == ("conv2d", "linear", "mha") and len(found.cells) == 3


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(implementation=records.Implementation("peft", "0.21.1")), "peft 0.21.1, peft 0.21.2"),
        (dict(profile="full"), "profile"),
        (dict(seed=1), "seed"),
        (dict(peftcheck="0.2.0"), "peftcheck"),
        (dict(schema=SCHEMA + 1), "schema"),
    ],
)
def test_records_of_different_runs_are_not_joined(change, says):
    with pytest.raises(UsageError, match=says):
        join([small(), replace(small(), **change)])


def test_join_refuses_a_missing_shard_and_another_split():
    parts = list(shards(sample(), 3))
    with pytest.raises(UsageError, match="shard 2/3 is missing"):
        join([parts[0], parts[2]])
    with pytest.raises(UsageError, match="different splits"):
        join([parts[0], *shards(sample(), 2)])
    with pytest.raises(UsageError, match="nothing to join"):
        join([])


def test_join_refuses_two_verdicts_and_accepts_one_twice():
    holds = record([cell("merge.oracle", "lora", "linear", ratio=0.5)])
    slower = record([replace(holds.cells[0], seconds=99.0)])
    assert join([holds, slower]).totals == holds.totals
    for other in (dict(status="violation", ratio=2.0), dict(status="absent", ratio=None), dict(ratio=0.6)):
        with pytest.raises(UsageError, match="two verdicts"):
            join([holds, record([cell("merge.oracle", "lora", "linear", **other)])])


def test_a_ledger_entry_is_judged_by_the_shards_that_hold_its_cells():
    first, second = (record([cell("merge.oracle", "lora", layer)]) for layer in ("linear", "conv2d"))
    entry = LedgerRecord("peft-001", "bug", "merge.oracle", "known", "reason", None, None, ("t",), (first.cells[0].id,))
    idle = replace(entry, verdict="inactive", cells=())
    joined = join([replace(second, ledger=(idle,)), replace(first, ledger=(entry,))])
    assert joined.ledger == (entry,)
    other = replace(entry, verdict="fixed", cells=(second.cells[0].id,))
    with pytest.raises(UsageError, match="several verdicts"):
        join([replace(first, ledger=(entry,)), replace(second, ledger=(other,))])
