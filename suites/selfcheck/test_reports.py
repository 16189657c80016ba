"""Every report says what the record says, and nothing in a record can break out of a report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from sample_record import cell, defect, record, sample

from peftcheck import escape, report, report_html, report_index, report_junit, report_markdown, summary
from peftcheck.errors import UsageError
from peftcheck.record import FaultRecord, LedgerRecord, QuantizedRecord, Table, Worst, dumps, totals, write

EVIL = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'` | @all #12 [x](javascript:alert(3))\n"
    "# head\n```\n"
)
ODD = EVIL + "\x00\x1b[31m\ud800\u202e www.example.org https://example.org/ &amp; {{ 7*7 }} {% raw %}"


class Page(HTMLParser):
    """Collect what the tests ask of an HTML page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def evil_record():
    """Build a record with hostile text in every field that holds text."""
    one = cell("merge.oracle", "lora", "linear", status="violation", ratio=3.0)
    bad = {f.name: ODD + f.name for f in fields(one) if isinstance(getattr(one, f.name), str) and f.name != "status"}
    one = replace(
        one, **bad, quantizer=ODD, kind=ODD, worst=Worst(ODD, ODD), issue="javascript:alert(4)"
    )  # fmt: skip
    found = defect(
        [one], headline=ODD, issue="javascript:alert(5)", token=ODD, words=ODD, message=ODD, script=ODD, steps=(ODD,),
        repair=ODD,
    )  # fmt: skip
    listed = replace(one, id=ODD + "known", status="known", fingerprint=ODD + "known", issue=ODD)
    known = replace(found, fingerprint=listed.fingerprint, status="known", issue=ODD, cells=(listed.id,))
    return record(
        [one, listed], [found, known], peftcheck=ODD, profile=ODD, environment={ODD: ODD}, calibration={ODD: {ODD: [ODD]}},
        implementation=replace(sample().implementation, name=ODD, version=ODD),
        ledger=(LedgerRecord(ODD, ODD, ODD, ODD, ODD, "data:text/html,x", ODD, (ODD,), (listed.id,), ODD),),
        faults=(FaultRecord(ODD, ODD, "javascript:alert(6)", (ODD,), True), FaultRecord("b", ODD, ODD, (), False)),
        measurements=(Table(ODD, (ODD, "n"), ((ODD, math.nan),), ODD),),
        quantized=(QuantizedRecord(ODD, ODD, 1.0, 0.1, 0.5, 0.03, math.nan, None, math.inf, 0.0),),
    )  # fmt: skip


def test_the_verdict_is_that_of_the_cells():
    holds = cell("a.b", "lora", "linear")
    cases = [
        ([holds], "holds", 0, "keeps every law in all 1 cell run"),
        ([holds, cell("a.c", "v", "l", status="known", ratio=9.0)], "known", 0, "1 known issue in 1 cell"),
        (
            [holds, cell("a.c", "v", "l", status="violation", ratio=9.0)],
            "violates",
            1,
            "1 distinct defect in 1 of 2",
        ),
        ([holds, cell("a.c", "v", "l", status="error", ratio=None)], "violates", 1, "breaks 1 law"),
        (
            [holds, cell("a.c", "v", "l", status="fixed", ratio=0.1)],
            "violates",
            1,
            "1 cell holds that the ledger",
        ),
        (
            [holds, cell("a.c", "v", "l", status="vacuous", ratio=0.1)],
            "unvouched",
            3,
            "1 cell tested nothing",
        ),
        ([cell("a.c", "v", "l", status="absent", ratio=None)], "unvouched", 3, "no cell was run"),
        ([], "unvouched", 3, "no cell was run"),
    ]
    for cells, kind, code, words in cases:
        found = summary.verdict(record(cells))
        assert (found.kind, found.code) == (kind, code) and words in found.sentence, found
    survivor = FaultRecord("f", "d", None, (), False)
    assert summary.verdict(record([holds], faults=(survivor,))).code == 3
    # A violation without a defect, which no list of defects shows, still decides.
    assert summary.verdict(record([cell("a.b", "v", "l", status="violation", fingerprint=None)], [])).code == 1


def _issue_of_two_symptoms():
    cells = [
        cell(
            law,
            "lora",
            "linear",
            status="known",
            ratio=9.0,
            fingerprint=f"{law}|lora|weight|numeric",
            issue="one-cause",
        )
        for law in ("merge.oracle", "merge.delta")
    ]
    defects = [defect([one], status="known", issue="one-cause", fingerprint=one.fingerprint) for one in cells]
    entry = LedgerRecord(
        "one-cause", "bug", "merge.*", "known", "the reason", "https://example.org/7", None, ("t",),
        tuple(one.id for one in cells), "silent numbers",
    )  # fmt: skip
    return record(cells, defects, ledger=(entry,))


def test_symptoms_of_one_entry_are_one_known_issue():
    run = _issue_of_two_symptoms()
    (known,) = summary.known_issues(run)
    assert (
        known.name == "one-cause" and len(known.cells) == 2 and known.places("law") == ("merge.delta", "merge.oracle")
    )
    assert "the rest are 1 known issue in 2 cells" in summary.verdict(run).sentence
    page = Page(report_html.render(run))
    assert "1 known issue, declared in the ledger" in page.text and "silent numbers" in page.text
    assert "2 symptoms" in page.text and "reported" in page.text and "no report found" not in page.text
    line = next(row for row in report_markdown.render(run).splitlines() if row.startswith("| one"))
    assert "silent numbers" in line and "https://example.org/7" in line and "| 2 |" in line


def test_a_known_issue_without_address_says_so():
    run = _issue_of_two_symptoms()
    run = replace(run, ledger=(replace(run.ledger[0], url=None),))
    assert "no report found" in Page(report_html.render(run)).text
    assert "no report found" in report_markdown.render(run)


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, "–"), (0.0, "0"), (1.0, "1"), (0.98765, "0.988"), (0.9999, "0.9999"), (1.0001, "1.0001"),
        (math.nan, "NaN"), (math.inf, "∞"), (45_000_000.0, "4.5e7"), (2e-9, "2.0e-9"), (123.4, "123"),
    ],
)  # fmt: skip
def test_ratios_in_words(value, shown):
    assert summary.number(value) == shown


def test_folding_shows_the_gravest():
    cells = [
        cell("a.b", "v", "l", "float64", ratio=0.9),
        cell("a.b", "v", "l", "float32", status="known", ratio=50.0),
        cell("a.b", "v", "l", "bfloat16", status="violation", ratio=2.0),
        cell("a.b", "v", "l", "float16", status="violation", ratio=math.nan),
    ]
    rows, laws, squares = summary.heat_map(record(cells))
    (fold,) = squares.values()
    assert (len(rows), laws) == (1, ["a.b"])
    assert fold.worst.dtype == "float16" and fold.status == "violation" and fold.count("violation") == 2
    assert fold.holding.ratio == 0.9


def test_cells_that_no_defect_names_are_told_as_defects():
    died = [
        cell(
            "a.b",
            "v",
            layer,
            status="error",
            ratio=None,
            fingerprint=None,
            message="the interpreter died\nover it",
        )
        for layer in ("linear", "conv2d")
    ]
    bare = record([cell("a.b", "v", "mha"), *died], [])
    (found,) = summary.defects(bare)
    assert found.headline == "a.b on v: the interpreter died" and len(found.cells) == 2
    assert "1 distinct defect in 2 of 3" in summary.verdict(bare).sentence
    for suffix in (".html", ".md"):
        assert "the interpreter died" in report.render(bare, suffix)


def test_html_leads_with_the_verdict_then_defects_then_cells():
    text = report_html.render(sample())
    order = [">Violates</p>", "breaks 4 laws: 4 distinct defects in 32 of 3,431 cells", "Cells declared",
             ">Distinct defects</h2>", "A non-finite LoRA bias is merged", "NaN in lora_A or lora_B is refused",
             "peftcheck replay pc1_", ">Heat map</h2>", ">How close to the budget</h2>", ">Coverage</h2>",
             ">Ledger</h2>", "add_weighted_adapter sums A and B apart", ">Kill matrix</h2>", ">Checkpoint size</h3>",
             ">Environment and calibration</h2>"]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_html_asks_for_nothing_and_lets_only_its_own_script_run():
    html = report_html.render(sample())
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "img", "form", "base")
        assert "src" not in attributes and "srcset" not in attributes
        if tag == "link":
            assert attributes["href"].startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import", html)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_html_has_a_square_for_every_row_and_law_and_working_anchors():
    original = sample()
    page = Page(report_html.render(original))
    rows, _, squares = summary.heat_map(original)
    titled = [a for tag, a in page.tags if tag == "td" and "title" in a]
    assert len(titled) == len(squares)
    assert sum(tag == "td" and "class" in a and a["class"].split()[0] in "vekfu" for tag, a in page.tags) == sum(
        fold.status in ("violation", "error", "known", "fixed", "vacuous") for fold in squares.values()
    )
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")}
    assert targets <= set(ids) and len(targets) > len(rows)


@pytest.mark.parametrize("cells, most", [(3000, 400_000), (10_000, 6_000_000), (20_000, 12_000_000)])
def test_html_stays_small(cells, most):
    original = sample(cells)
    assert len(original.cells) >= cells
    assert len(report_html.render(original).encode()) < most


def test_nothing_in_a_record_becomes_markup_in_html():
    page = Page(report_html.render(evil_record()))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        if "href" in attributes:
            assert attributes["href"].startswith(("#", "https:", "data:,"))
    assert "alert(1)" in page.text and "{{ 7*7 }}" in page.text


def test_nothing_in_a_record_becomes_markup_in_markdown():
    text = report_markdown.render(evil_record())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202e]", text)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inner = [child for token in tokens for child in token.children or []]
    raw = [t.content.strip() for t in (*tokens, *inner) if t.type.startswith("html")]
    allowed = {
        "<details><summary>Full message</summary>",
        "<details><summary>Standalone script</summary>",
        "</details>",
    }
    assert set(raw) <= allowed and raw
    assert not [t for t in inner if t.type in ("link_open", "image")]
    shown = " ".join(t.content for t in inner if t.type == "text")
    # GitHub looks for these in the rendered text, so escaping alone would not stop them.
    assert not re.search(r"@\w|#\d|://|www\.", shown)
    assert len([t for t in tokens if t.type == "heading_open" and t.tag == "h1"]) == 0


def test_markdown_tables_keep_their_columns():
    text = report_markdown.render(evil_record())
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    widths, tables = [], 0
    for token in tokens:
        if token.type == "table_open":
            widths, tables = [], tables + 1
        elif token.type == "tr_open":
            widths.append(0)
        elif token.type in ("td_open", "th_open"):
            widths[-1] += 1
        elif token.type == "table_close":
            assert len(set(widths)) == 1
    source = [row for row in text.splitlines() if row.startswith("|")]
    assert tables >= 6 and source
    for row in source:
        assert not row.replace("\\|", "").rstrip().rstrip("|").endswith("\\")


def test_markdown_leads_like_the_html_and_fits_a_comment():
    text = report_markdown.render(sample())
    order = [
        "Violates",
        "| cells | run |",
        "### Distinct defects",
        "peftcheck replay",
        "### Known issues",
        "### Laws",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places) and len(text) < 65_536
    many = [
        cell("merge.oracle", f"v{i}", "linear", status="violation", ratio=2.0, message="x" * 9000) for i in range(300)
    ]
    long = report_markdown.render(record(many))
    assert len(long) < 65_536 and "left out for length" in long and "300 distinct defects" in long


def test_junit_has_a_case_for_every_cell():
    original = sample()
    root = ElementTree.fromstring(report_junit.render(original).encode())
    counts = original.totals
    assert root.attrib["tests"] == str(counts["cells"]) == str(len(root.findall(".//testcase")))
    assert root.attrib["failures"] == str(counts["violation"]) == str(len(root.findall(".//failure")))
    assert root.attrib["errors"] == str(counts["error"]) == str(len(root.findall(".//error")))
    assert root.attrib["skipped"] == str(counts["known"] + counts["absent"]) == str(len(root.findall(".//skipped")))
    assert {case.attrib["name"] for case in root.iter("testcase")} == {c.id for c in original.cells}
    assert sum(int(suite.attrib["tests"]) for suite in root) == counts["cells"]


@pytest.mark.parametrize(
    "status, element",
    [("violation", "failure"), ("fixed", "failure"), ("error", "error"), ("vacuous", "error"), ("known", "skipped"),
     ("absent", "skipped"), ("unsupported", None), ("pass", None)],
)  # fmt: skip
def test_junit_results(status, element):
    root = ElementTree.fromstring(report_junit.render(record([cell("a.b", "v", "l", status=status)])))
    found = [e.tag for e in root.iter() if e.tag in ("failure", "error", "skipped")]
    assert found == ([element] if element else [])


def test_junit_holds_hostile_text():
    root = ElementTree.fromstring(report_junit.render(evil_record()).encode())
    (failure,) = root.iter("failure")
    assert "<script>alert(1)</script>" in failure.text and "\x1b" not in failure.text


@pytest.mark.parametrize("suffix", [".html", ".md", ".xml", ".json"])
def test_reports_are_pure_functions_of_the_record(suffix, tmp_path):
    original = sample()
    before = dumps(original)
    assert report.render(original, suffix) == report.render(original, suffix.upper())
    assert dumps(original) == before
    report.write(evil_record(), tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", ["", ".pdf", ".htm"])
def test_another_format_is_refused(suffix):
    with pytest.raises(UsageError, match=r"\.html"):
        report.render(record([]), suffix)


@pytest.mark.parametrize("suffix", [".html", ".md", ".xml", ".json"])
def test_an_empty_record_has_reports_too(suffix):
    bare = replace(record([]), environment={}, calibration={})
    assert "0.21.2" in report.render(bare, suffix)


@pytest.mark.parametrize(
    "url, safe",
    [
        ("https://github.com/huggingface/peft/issues/1", True),
        ("http://example.org", True),
        ("HTTPS://example.org/a?b=c&d#e", True),
        ("javascript:alert(1)", False),
        ("JaVaScRiPt:alert(1)", False),
        (" javascript:alert(1)", False),
        ("java\nscript:alert(1)", False),
        ("data:text/html,x", False),
        ("//example.org", False),
        ("https://", False),
        ("https://[bad", False),
        ("https://example.org/ onclick=x", False),
        ('https://example.org/"x', False),
        ("https://example.org/>x", False),
        ("file:///etc/passwd", False),
        ("ftp://example.org/x", False),
        ("javascript://example.org/%0aalert", False),
        ("", False),
        (None, False),
    ],
)
def test_only_http_becomes_a_link(url, safe):
    found = escape.link(url)
    assert (found == url) if safe else (found is None)
    assert not safe or urlsplit(found).hostname


def test_the_replay_command_cannot_run_another():
    assert escape.replay("pc1_abc-DEF.9") == "peftcheck replay pc1_abc-DEF.9"
    assert escape.replay("x; rm -rf ~\n$(id) 'q") == "peftcheck replay 'x; rm -rf ~ $(id) '\"'\"'q'"


@pytest.mark.parametrize("text", ["`", "``", " `a` ", "a|b", "", "a\nb", "```"])
def test_code_spans_hold_any_text(text):
    (inline,) = [t for t in MarkdownIt("commonmark").parse("x " + escape.code(text)) if t.type == "inline"]
    spans = [t.content for t in inline.children if t.type == "code_inline"]
    assert [s.strip() for s in spans] == [" ".join(text.split())]


def test_the_index_lists_records_newest_version_first(tmp_path):
    holds = record([cell("a.b", "lora", "linear")])
    for name, version in (
        ("peft", "0.9.0"),
        ("peft", "0.21.2"),
        ("lycoris", "4.1.3"),
        ("peft", "odd|version"),
    ):
        told = replace(holds, implementation=replace(holds.implementation, name=name, version=version))
        write(told, tmp_path / f"{name}-{version.replace('|', '-')}.json")
    (tmp_path / "peft-0.21.2.html").write_text("x", encoding="utf-8")
    path = report_index.write(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert path.name == "README.md" and report_index.render(tmp_path) == text
    order = [text.index(words) for words in ("lycoris 4", "peft 0.21.2", "peft 0.9.0", "peft odd")]
    assert order == sorted(order)
    row = next(row for row in text.splitlines() if "0.21.2" in row)
    assert "[html](peft-0.21.2.html), [json](peft-0.21.2.json)" in row and "[md]" not in row
    assert "1 of 1" in row and "Holds" in row


def test_the_index_of_no_folder_or_of_a_bad_record_is_refused(tmp_path):
    assert "no records yet" in report_index.render(tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        report_index.render(tmp_path / "none")
    (tmp_path / "bad.json").write_text(json.dumps({"schema": 9}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"bad\.json"):
        report_index.render(tmp_path)


def test_the_denominators_are_those_of_the_cells():
    original = sample()
    text = Page(report_html.render(original)).text
    for name in ("pass", "known", "unsupported", "absent", "vacuous"):
        assert f"{name.capitalize()} {totals(original.cells)[name]:,}" in text
