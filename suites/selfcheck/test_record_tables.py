"""What cells share stands once in the JSON, every token comes back to the letter, and older records are still read."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_record import cell, defect, record, sample
from test_record import VALIDATOR

from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep, decode, encode
from peftcheck.cli import main
from peftcheck.dataclass_json import encode as plain
from peftcheck.diff import diff
from peftcheck.errors import UsageError
from peftcheck.joining import join
from peftcheck.record import SCHEMA, Record, Worst, comparable, dumps, loads, read, totals, write
from peftcheck.report import render
from peftcheck.tokens import NO_LAW, TOKEN_PREFIX, pack

LAWS = ("merge.oracle", "merge.roundtrip", "merge.drift")


def case(index: int = 0) -> Case:
    """Return a case of a sweep."""
    sweep = Sweep("peftcheck.implementations.reference:Reference", "lora", "linear", "float64")
    layers = (LayerSpec("layer", "linear", 3, 2),)
    return Case(sweep, 0, index, layers, (AdapterSpec("a", (0,)),), "float64", "normal")


def of(law: str, one: Case, **fields):
    """Return a cell of which this is the worst case."""
    fields = {"layer": "linear", "dtype": "float64"} | fields
    return cell(law, "lora", worst=Worst(encode(one, law), one.words()), **fields)


def written(run: Record) -> dict:
    """Return the JSON of a record, once it was found valid."""
    value = json.loads(dumps(run))
    VALIDATOR.validate(value)
    return value


def as_schema_1(run: Record) -> str:
    """Return the JSON as it was written before there were tables: every cell and defect with its own text."""
    return json.dumps(plain(run) | {"schema": 1})


def test_the_laws_of_a_sweep_share_one_case():
    run = record([of(law, case()) for law in LAWS])
    value = written(run)
    assert [one["worst"] for one in value["cells"]] == [{"case": 0}] * 3
    (shared,) = value["cases"]
    assert decode(shared["token"]) == (case(), NO_LAW) and shared["words"] == case().words()
    assert loads(json.dumps(value)) == run


def test_the_table_is_in_the_order_of_first_use():
    cells = [of(law, case(index)) for index, law in ((4, LAWS[0]), (1, LAWS[1]), (4, LAWS[2]))]
    value = written(record(cells))
    assert [decode(one["token"])[0].index for one in value["cases"]] == [4, 1]
    assert [one["worst"]["case"] for one in value["cells"]] == [0, 1, 0]
    # And it comes before the cells, one row a line, each cell on its line.
    lines = dumps(record(cells)).splitlines()
    assert lines.index(' "cases": [') < lines.index(' "cells": [')
    assert len([line for line in lines if line.startswith('  {"token":')]) == 2
    assert len([line for line in lines if line.startswith('  {"id":')]) == 3


def test_one_case_in_two_wordings_is_two_rows():
    one, other = of(LAWS[0], case()), of(LAWS[1], case())
    run = record([one, replace(other, worst=replace(other.worst, words="told otherwise"))])
    assert len(written(run)["cases"]) == 2 and loads(dumps(run)) == run


TEXT = zlib.decompress(base64.urlsafe_b64decode(encode(case(), LAWS[0])[len(TOKEN_PREFIX) :] + "==="))


def deflated(text: bytes, level: int = 9) -> str:
    """Return a token that holds any bytes."""
    return TOKEN_PREFIX + base64.urlsafe_b64encode(zlib.compress(text, level)).decode().rstrip("=")


FOREIGN = {
    "another law": encode(case(), LAWS[1]),
    "no law": encode(case(), NO_LAW),
    "a law that begins alike": encode(case(), LAWS[0] + "s"),
    "another compression": deflated(TEXT, 1),
    "blanks around it": f" {encode(case(), LAWS[0])}\n",
    "padded": encode(case(), LAWS[0]) + "====",
    "blanks within": deflated(TEXT.replace(b"[", b"[ ", 1)),
    "not closed": deflated(TEXT[:-1]),
    "not UTF-8": deflated(b'["' + LAWS[0].encode() + b'",\xff]'),
    "cut": encode(case(), LAWS[0])[:-9],
    "another prefix": "pc2." + encode(case(), LAWS[0])[len(TOKEN_PREFIX) :],
    "a bomb": deflated(b'["' + LAWS[0].encode() + b'",' + b" " * (1 << 21) + b"1]"),
    "no token": "</script>\x00\ud800",
    "nothing": "",
}


@pytest.mark.parametrize("token", FOREIGN.values(), ids=FOREIGN)
def test_a_token_that_does_not_fit_the_table_is_spelled_out(token):
    foreign = replace(of(LAWS[0], case(), status="violation", ratio=9.0), worst=Worst(token, "words of it"))
    run = record([foreign, of(LAWS[1], case())], [defect([foreign], token=token, words="words of it")])
    value = written(run)
    assert value["cells"][0]["worst"] == value["defects"][0]["witness"] == {"token": token, "words": "words of it"}
    assert len(value["cases"]) == 1
    assert loads(dumps(run)) == run


def test_a_token_of_a_case_that_this_version_does_not_know_is_shared_all_the_same():
    """What a case says is not looked at: records outlive the fields of cases."""
    newer = '{"field of another version":[1,2]}'
    run = record([cell(law, "lora", "linear", worst=Worst(pack(law, newer), "w")) for law in LAWS])
    assert len(written(run)["cases"]) == 1 and loads(dumps(run)) == run


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a.b", 'a."b', "ü\ud800"]),
            st.sampled_from(["a.b", 'a."b', "ü\ud800", NO_LAW]),
            st.text(max_size=4) | st.sampled_from(["{}", '{"a":1}', "]", ""]),
            st.sampled_from(["", "words"]),
            st.none() | st.sampled_from(["told", "0", ""]),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_whatever_a_record_holds_comes_back(drawn):
    cells = []
    for index, (law, named, text, words, message, packed) in enumerate(drawn):
        token = pack(named, text) if packed and text.isascii() else text
        one = cell(law, "v", f"l{index}", worst=Worst(token, words), message=message)
        cells.append(replace(one, status="violation", fingerprint=f"f{index}"))
    defects = [defect([one], token=cells[-1 - at].worst.token, words=one.worst.words) for at, one in enumerate(cells)]
    run = record(cells, defects)
    value = written(run)
    assert loads(json.dumps(value)) == run
    rows = [(one["token"], one["words"]) for one in value["cases"]]
    assert len(set(rows)) == len(rows) and len(set(value["messages"])) == len(value["messages"])


def test_a_defect_points_to_the_case_of_its_cell_and_keeps_a_shrunk_one():
    broken = [of(law, case(1), status="violation", ratio=2.0) for law in LAWS]
    told = dict(token=broken[0].worst.token, words=broken[0].worst.words)
    small = dict(token=encode(case(2), LAWS[1]), words=case(2).words())
    run = record(
        broken, [defect(broken[:1], **told), defect(broken[1:2], **small), defect(broken[2:], token=None, words=None)]
    )
    value = written(run)
    assert [one["witness"] for one in value["defects"]] == [{"case": 0}, small, None]
    assert not {"token", "words"} & value["defects"][0].keys()
    assert loads(dumps(run)) == run
    for half in (dict(token=None, words="words alone"), dict(token=told["token"], words=None)):
        bare = record(broken, [defect(broken[:1], **half), *run.defects[1:]])
        assert written(bare)["defects"][0]["witness"] == half and loads(dumps(bare)) == bare


def test_what_several_cells_say_stands_once():
    said = (None, "alone", "shared", "both", "shared", None, "both", "")
    run = record([cell("a.b", "lora", f"l{at}", message=text) for at, text in enumerate(said)])
    value = written(run)
    assert value["messages"] == ["shared", "both"]
    assert [one["message"] for one in value["cells"]] == [None, "alone", 0, 1, 0, None, 1, ""]
    assert loads(dumps(run)) == run


def test_a_case_packed_by_another_zlib_is_read():
    value = written(record([of(law, case()) for law in LAWS]))
    value["cases"][0]["token"] = deflated(b'["",' + TEXT.partition(b",")[2], 1)
    assert loads(json.dumps(value)) == record([of(law, case()) for law in LAWS])


@pytest.mark.parametrize("text", [b"", b'["",{}', b'["",{}x', b'["a",{}]', b"[null,{}]", b"{}", b'["",\xff]'])
def test_a_row_that_is_no_case_without_law_is_refused(text):
    value = written(record([of(law, case()) for law in LAWS]))
    value["cases"].append({"token": deflated(text), "words": "of no cell"})
    with pytest.raises(UsageError, match=r"cases\[1\].token is not the token of a case without law"):
        loads(json.dumps(value))


@pytest.mark.parametrize("law", [{"law": None}, {"law": 3}, {"law": ["merge.oracle"]}, {}], ids=str)
@pytest.mark.parametrize("part", ["cells", "defects"])
def test_a_pointer_without_a_law_is_refused(part, law):
    broken = of(LAWS[0], case(), status="violation", ratio=2.0)
    value = written(record([broken], [defect([broken], token=broken.worst.token, words=broken.worst.words)]))
    (one,) = value[part]
    assert one.get("worst", one.get("witness")) == {"case": 0}
    del one["law"]
    one.update(law)
    with pytest.raises(UsageError, match=rf"record.{part}\[0\].*law"):
        loads(json.dumps(value))


def test_a_record_of_schema_1_reads_as_the_same_record():
    whole = sample(1500)
    old = loads(as_schema_1(whole))
    assert old.schema == SCHEMA and comparable(old) == comparable(whole)
    assert {one.id: one.worst for one in old.cells} == {one.id: one.worst for one in whole.cells}
    assert comparable(loads(dumps(old))) == comparable(whole)
    assert len(dumps(old)) < 0.7 * len(as_schema_1(whole))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda v: v.update(cases=[], messages=[]), "unknown field 'cases'"),
        (lambda v: v["cells"][0].update(worst={"case": 0}), "worst"),
        (lambda v: v["cells"][0].update(message=0), "message is not text"),
        (lambda v: v["defects"][0].update(witness=None), "unknown field 'witness'"),
    ],
)
def test_a_record_of_schema_1_has_no_tables(spoil, says):
    value = json.loads(as_schema_1(record([of(LAWS[0], case(), status="violation", ratio=2.0)])))
    loads(json.dumps(value))
    spoil(value)
    with pytest.raises(UsageError, match=says) as caught:
        loads(json.dumps(value))
    assert "\n" not in str(caught.value)


def test_records_of_both_schemas_give_the_same_reports_compare_and_join(tmp_path):
    whole = sample(1500)
    (tmp_path / "old.json").write_text(as_schema_1(whole), encoding="utf-8")
    write(read(tmp_path / "old.json"), tmp_path / "new.json")
    old, new = read(tmp_path / "old.json"), read(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["schema"] == SCHEMA == 2
    for suffix in (".html", ".md", ".xml", ".json"):
        assert render(old, suffix) == render(new, suffix)
    found = diff(old, new)
    assert found.clean and not (found.fixed or found.gained or found.halved)
    halves = [replace(whole, cells=part, totals=totals(part), defects=(), ledger=()) for part in _halves(whole)]
    (tmp_path / "1.json").write_text(as_schema_1(halves[0]), encoding="utf-8")
    write(halves[1], tmp_path / "2.json")
    joined = join([read(tmp_path / "1.json"), read(tmp_path / "2.json")])
    assert {one.id for one in joined.cells} == {one.id for one in whole.cells}
    assert {one.worst for one in joined.cells} == {one.worst for one in whole.cells}


def _halves(whole: Record):
    cells = tuple(replace(one, fingerprint=None) for one in whole.cells)
    return cells[::2], cells[1::2]


@pytest.mark.parametrize("command", [("report", "bad.json", "-o", "x.md"), ("diff", "bad.json", "bad.json")])
def test_a_pointer_to_nothing_is_one_clear_line_and_exit_2(tmp_path, monkeypatch, command):
    value = written(record([of(LAWS[0], case())]))
    value["cells"][0]["worst"]["case"] = 1
    (tmp_path / "bad.json").write_text(json.dumps(value), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 2 and len(found.stderr.strip().splitlines()) == 1
    assert "bad.json" in found.stderr and "worst.case is 1" in found.stderr
    assert not (tmp_path / "x.md").exists()


def test_a_case_of_the_table_is_replayed_with_a_law():
    (shared,) = written(record([of(LAWS[0], case())]))["cases"]
    run = CliRunner().invoke
    bare = run(main, ["replay", shared["token"]])
    assert bare.exit_code == 2 and "--law" in bare.stderr and len(bare.stderr.strip().splitlines()) == 1
    unknown = run(main, ["replay", shared["token"], "--law", "merge.nothing"])
    assert unknown.exit_code == 2 and "unknown law 'merge.nothing'" in unknown.stderr
    for law in ("merge.oracle", "merge.roundtrip"):
        held = run(main, ["replay", shared["token"], "--law", law])
        assert held.exit_code == 0 and held.stdout.startswith(f"FIXED: {law} on "), held.output
        # A law that is asked for goes before the one in the token.
        assert run(main, ["replay", encode(case(), "merge.drift"), "--law", law]).stdout == held.stdout
