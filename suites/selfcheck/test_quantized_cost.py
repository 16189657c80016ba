"""What a merge into quantized weights costs: measured, carried by the record, and told by the reports."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest
from sample_record import sample

from peftcheck import closing, engine, joining, quantized_cost, report_html, report_markdown, report_quantized
from peftcheck import record as records
from peftcheck.case import Sweep
from peftcheck.errors import HarnessError, UsageError
from peftcheck.implementations.peft import Peft
from peftcheck.record import QuantizedRecord
from peftcheck.session import Session, Settings
from peftcheck.suite import Filters

INT8 = QuantizedRecord("bitsandbytes.int8", "lora", 0.5, 0.0125, 0.4, 0.005, 0.0049, 0.9, 0.4, 0.02)
WRONG = replace(INT8, variant="twist", cost=0.5, kept=None, cosine=None, changed=None)
NF4 = replace(INT8, quantizer="bitsandbytes.nf4", step=0.18, unavoidable=0.0674, cost=0.0636)


def with_rows(*rows: QuantizedRecord) -> records.Record:
    return replace(sample(), quantized=rows)


@pytest.fixture(scope="module")
def measured() -> dict[str, QuantizedRecord]:
    names = ("bitsandbytes.int8", "bitsandbytes.nf4")
    with engine.pinned():
        found = [quantized_cost.measure(Peft(), Sweep("peft", "lora", "linear", "float32", name)) for name in names]
    return dict(zip(names, found, strict=True))


def test_a_right_merge_costs_what_the_grid_makes_unavoidable(measured) -> None:
    for one in measured.values():
        assert 0.8 < one.cost / one.unavoidable < 1.1
        assert one.cost < one.step


def test_four_bits_cost_more_than_eight_by_the_ratio_of_their_steps(measured) -> None:
    eight, four = measured["bitsandbytes.int8"], measured["bitsandbytes.nf4"]
    assert 8 < four.cost / eight.cost < 20


def test_little_of_a_small_change_keeps_its_direction(measured) -> None:
    for one in measured.values():
        assert 0 <= one.cosine < 0.9
        assert one.changed < 0.5


def test_ten_round_trips_move_the_weights_and_ten_of_nothing_only_where_the_grid_is_no_fixpoint(measured) -> None:
    for one in measured.values():
        assert one.cost < one.drift < 20 * one.step
        assert one.idle == 0.0
    pytest.importorskip("torchao")
    with engine.pinned():
        walking = quantized_cost.measure(Peft(), Sweep("peft", "lora", "linear", "float32", "torchao.int8"))
    assert walking.idle > walking.unavoidable


def test_a_merge_that_leaves_nothing_readable_has_no_cost() -> None:
    with engine.pinned():
        sweep = Sweep("peft", "pvera", "linear", "float32", "bitsandbytes.nf4")
        assert quantized_cost.measure(Peft(), sweep) is None


def test_the_record_carries_the_rows_and_reads_them_back() -> None:
    one = with_rows(INT8, NF4)
    text = records.dumps(one)
    schema = json.loads((records.Path(records.__file__).parent / "record.schema.json").read_text())
    jsonschema.validate(json.loads(text), schema)
    assert records.loads(text).quantized == (INT8, NF4)


def test_a_record_without_the_table_is_read_as_before() -> None:
    value = json.loads(records.dumps(with_rows()))
    del value["quantized"]
    assert records.loads(json.dumps(value)).quantized == ()
    assert report_quantized.table(with_rows()) is None
    assert report_quantized.TITLE not in report_html.render(with_rows())


def test_two_rows_of_one_method_are_refused() -> None:
    with pytest.raises(UsageError, match="two rows"):
        records.loads(records.dumps(with_rows(INT8, INT8)))


def test_shards_bring_their_rows_together() -> None:
    halves = [replace(with_rows(row), environment={"shard": f"{i}/2"}) for i, row in enumerate((NF4, INT8), 1)]
    assert joining.join(halves).quantized == (INT8, NF4)
    other = replace(halves[1], quantized=(replace(NF4, cost=NF4.cost * (1 + 1e-12)),))
    assert joining.join([halves[0], other]).quantized == (NF4,)


def test_the_report_says_what_to_do() -> None:
    said = report_quantized.sentences(with_rows(NF4, WRONG, INT8))
    assert [text.partition(":")[0] for text in said] == [
        "bitsandbytes.int8", "bitsandbytes.int8, twist", "bitsandbytes.nf4",
    ]  # fmt: skip
    assert "0.98 %" in said[0] and "less than 9.8 %" in said[0] and "0.40 (cosine)" in said[0]
    assert "100 times" in said[1]
    assert "13 %" in said[2]


def test_the_report_names_the_grid_that_walks_away_by_itself() -> None:
    rows = [replace(INT8, drift=0.02, idle=0.0), replace(NF4, drift=0.2, idle=0.05)]
    still, walks = report_quantized.sentences(with_rows(*rows))
    assert "taken out ten times, the weights are 4 % off" in still and "leave them where they are" in still
    assert "40 % off" in walks and "walks away by itself: 10 % after ten merges of nothing" in walks
    assert "round trip" not in report_quantized.sentences(with_rows(INT8))[0]
    assert [row[9:11] for row in report_quantized.table(with_rows(*rows, replace(INT8, variant="a"))).rows] == [
        (None, None), (0.04, 0.0), (0.4, 0.1),
    ]  # fmt: skip


@pytest.mark.parametrize("render", [report_html.render, report_markdown.render])
def test_both_reports_have_the_section(render) -> None:
    text = render(with_rows(INT8, NF4))
    assert report_quantized.TITLE in text
    assert "keep apart below" in text
    assert "bitsandbytes.nf4" in text


def test_the_section_is_a_pure_function_of_the_record() -> None:
    one = with_rows(NF4, INT8)
    assert report_quantized.table(one) == report_quantized.table(with_rows(INT8, NF4))
    assert report_html.render(one) == report_html.render(one)


def test_weights_of_zero_have_no_relative_cost() -> None:
    nothing = replace(INT8, weight=0.0, unavoidable=0.0)
    rows = report_quantized.table(with_rows(nothing)).rows
    assert rows[0][2] is None and rows[0][5] is None
    assert report_quantized.sentences(with_rows(nothing))


@pytest.fixture(scope="module")
def every_dtype():
    """The verdicts, as a worker sends them, on a merge into one quantizer in each of its dtypes, and their session."""
    pytest.importorskip("bitsandbytes")
    asked = Filters(law=("quantize.merge_budget",), variant=("lora",), quantizer=("bitsandbytes.nf4",))
    session = Session(Settings("peft", filters=asked))
    return session, [session.verdict(cell).as_plain() for cell in session.cells]


def test_a_run_over_every_dtype_costs_each_method_and_quantizer_once(every_dtype):
    rows = [plain["quantized"] for plain in every_dtype[1]]
    assert [row is not None for row in rows] == [True, False, False]
    assert (rows[0]["quantizer"], rows[0]["variant"]) == ("bitsandbytes.nf4", "lora")


def test_a_run_whose_record_contradicts_itself_is_a_fault_of_the_harness(every_dtype):
    session, plain = every_dtype
    sound = {one["id"]: one for one in plain}
    twice = {key: {**one, "quantized": plain[0]["quantized"]} for key, one in sound.items()}
    run, unvouched = closing.assemble(session, sound, list(sound), set(), {}, 0.0)
    assert records.loads(records.dumps(run)).totals == run.totals and not unvouched
    with pytest.raises(HarnessError, match="two rows"):
        closing.assemble(session, twice, list(twice), set(), {}, 0.0)
