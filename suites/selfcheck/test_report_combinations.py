"""What a report says of combinations: from the cells of the record, and from nothing else."""

from __future__ import annotations

from html.parser import HTMLParser

from sample_record import cell, record

from peftcheck import record as records
from peftcheck import report_combinations, report_html, report_markdown
from peftcheck.record import Repair

LINEAR = ("combine.linear", "lora", "linear", "float32", None, "linear")
WAYS = (Repair("cat", 8, 4, 0.0), Repair("svd", 8, 4, 4e-7))


def broken(*key, repairs=WAYS, **fields):
    return cell(*key, status="known", ratio=1.1e7, issue="cross-terms", repairs=repairs, **fields)


def sample():
    return record([
        broken(*LINEAR),
        broken("combine.linear", "lora.rslora", "linear", "float64", None, "linear", repairs=(Repair("cat", 12, 4, 1e-16),)),
        cell("combine.linear", "lora", "linear", "float32", None, "cat", ratio=0.9),
        cell("combine.linear", "lora", "conv2d", "float32", None, "cat", ratio=0.2),
        cell("combine.rank", "lora", "linear", "float32", None, "cat", ratio=0.0),
        cell("merge.oracle", "lora", "linear"),
    ])  # fmt: skip


def test_what_gives_the_sum_and_its_cost_are_those_that_were_measured():
    found = report_combinations.read(sample()).remedies
    assert [(r.kind, r.exact, r.cells, r.least, r.most, r.rank, r.instead, r.error) for r in found] == [
        ("linear", "cat", 2, 2.0, 3.0, 12, 4, 1e-16),
        ("linear", "svd", 1, 2.0, 2.0, 8, 4, 4e-7),
    ]
    assert report_combinations.cost(found[0]) == "2 to 3 times the rank; at most 12 instead of 4"
    assert report_combinations.cost(found[1]) == "2 times the rank; at most 8 instead of 4"


def test_a_broken_kind_that_nothing_mends_is_said_to_be_so():
    (only,) = report_combinations.read(record([broken(*LINEAR, repairs=())])).remedies
    assert only.exact is None and only.broken == 1 and report_combinations.cost(only) == "–"
    page = report_html.render(record([broken(*LINEAR, repairs=())]))
    assert "no kind that was tried" in page


def test_crashes_and_cells_without_a_failure_of_their_own_ask_for_no_remedy():
    crash = broken(*LINEAR, repairs=(), fingerprint="crash|lora|RuntimeError in model.py:combine")
    quiet = broken("combine.linear", "lora", "conv2d", "float32", None, "linear", repairs=(), fingerprint=None)
    assert report_combinations.read(record([crash, quiet])).remedies == ()


def test_the_table_is_kind_by_layer_by_law():
    found = report_combinations.read(sample())
    assert found.laws == ("combine.linear", "combine.rank")
    assert [(line.kind, line.layer) for line in found.lines] == [
        ("cat", "linear"),
        ("cat", "conv2d"),
        ("linear", "linear"),
    ]
    exact, rank = found.lines[0].folds
    assert (exact.status, report_combinations.square(exact)) == ("pass", "1/1 0.9")
    assert report_combinations.square(rank) == "1/1 0"
    assert found.lines[1].folds[1] is None
    assert (
        found.lines[2].folds[0].status == "known" and report_combinations.square(found.lines[2].folds[0]) == "0/2 1.1e7"
    )


def test_a_record_without_combinations_has_no_such_part():
    plain = record([cell("merge.oracle", "lora", "linear")])
    assert report_combinations.read(plain) is None
    assert "Combining adapters" not in report_html.render(plain)
    assert "Combining adapters" not in report_markdown.render(plain)


def test_both_reports_tell_the_same():
    page, text = report_html.render(sample()), report_markdown.render(sample())
    for words in ("Combining adapters today", "2 to 3 times the rank; at most 12 instead of 4", "0/2 1.1e7"):
        assert words in page
    assert "2 to 3 times the rank; at most 12 instead of 4" in text and "known 0/2 1.1e7" in text


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.found += [name for name, _ in attrs if name.startswith("on")]


def test_nothing_in_a_cell_becomes_markup():
    nasty = '"><img src=x onerror=alert(1)>|`<b>'
    bad = broken("combine.linear", nasty, nasty, nasty, None, nasty, repairs=(Repair(nasty, 2, 1, 0.0),))
    tags = Tags()
    tags.feed(report_html.render(record([bad])))
    assert "img" not in tags.found and "onerror" not in tags.found
    plain = report_markdown.render(record([bad]))
    rows = [line for line in plain.splitlines() if line.startswith("|") and "onerror" in line]
    assert rows and all("<img" not in row.replace("`", "").replace("\\<", "") or "`" in row for row in rows)


def test_repairs_survive_the_file():
    run = sample()
    again = records.loads(records.dumps(run))
    assert again == run and again.cells[0].repairs == WAYS
