"""Render a record as one HTML file that needs nothing but itself.

Everything in a record is untrusted: jinja2 escapes it, only http and https become links, and the content
security policy of the page lets no script run but the one whose hash it names.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jinja2

from peftcheck import escape, report_combinations, report_quantized, summary
from peftcheck.record import STATUSES, CellRecord, DefectRecord, Record
from peftcheck.summary import Fold, Row, number

SIGNS = {
    "violation": "✗",
    "error": "!",
    "vacuous": "∅",
    "fixed": "F",
    "known": "K",
    "pass": "✓",
    "unsupported": "–",
    "absent": "○",
}
MEANINGS = {
    "violation": "the law does not hold",
    "error": "the library crashed, hung, or refused what it claims to support",
    "vacuous": "no case tested anything: a failure of the harness",
    "fixed": "listed in the ledger, but holds",
    "known": "breaks as the ledger says",
    "pass": "the law holds; the figure is the worst ratio",
    "unsupported": "declared unsupported, and refused as it should be",
    "absent": "not installed, or the library has no such operation",
}
# One letter a square, so that ten thousand of them stay small.
LETTERS = {
    "violation": "v",
    "error": "e",
    "vacuous": "u",
    "fixed": "f",
    "known": "k",
    "unsupported": "n",
    "absent": "a",
}
BINS = (
    (0.0, "0"),
    (1e-3, "≤ .001"),
    (1e-2, "≤ .01"),
    (0.1, "≤ .1"),
    (0.25, "≤ ¼"),
    (0.5, "≤ ½"),
    (0.75, "≤ ¾"),
    (1.0, "≤ 1"),
    (10.0, "≤ 10"),
    (1e3, "≤ 10³"),
    (1e6, "≤ 10⁶"),
    (math.inf, "more"),
)


@dataclass(frozen=True)
class Square:
    """Hold one square of the heat map: its class, its sign, its words, and the defect that it leads to."""

    letter: str
    sign: str
    words: str
    anchor: str | None


@dataclass(frozen=True)
class Bar:
    """Hold one bar of the histogram of ratios: cells that hold are drawn apart from those that do not."""

    label: str
    cells: int
    x: float
    y: float
    height: float
    broken: bool


def render(record: Record) -> str:
    """Return the page."""
    rows, laws, squares = summary.heat_map(record)
    found = summary.defects(record)
    known = summary.known_issues(record)
    anchors = {defect.fingerprint: f"d{index}" for index, defect in enumerate(found, 1)}
    for one in known:  # a symptom of a known issue leads to the issue
        anchors |= {defect.fingerprint: anchors[one.defects[0].fingerprint] for defect in one.defects}
    groups = [(name, len(list(members))) for name, members in itertools.groupby(laws, key=_group)]
    script, style = (_templates().get_template(name).render() for name in ("report.js.j2", "report.css.j2"))
    page = (
        _templates()
        .get_template("report.html.j2")
        .render(
            record=record,
            name=f"{record.implementation.name} {record.implementation.version}",
            verdict=summary.verdict(record),
            totals=record.totals,
            shares=_shares(record),
            defects=[defect for defect in found if defect.status != "known"],
            known=known,
            anchors=anchors,
            rows=rows,
            laws=laws,
            groups=groups,
            spans=_spans(groups),
            # A column or two are too narrow for the name of their group: the law shows it then.
            small={name: size < 3 for name, size in groups},
            troubled=_troubled(rows, squares),
            lines=_lines(rows, laws, squares, _leads(found, anchors)),
            bars=_bars(record.cells),
            by_law=summary.by_law(record),
            by_sweep=summary.by_sweep(record),
            first_sweeps=_first_sweeps(record),
            killers=_killers(record),
            quantized=report_quantized.table(record),
            quantized_lead=report_quantized.LEAD,
            quantized_sentences=report_quantized.sentences(record),
            combinations=report_combinations.read(record),
            signs=SIGNS,
            meanings=MEANINGS,
            statuses=STATUSES,
            script=script,
            style=style,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    return escape.encodable(page)


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("peftcheck"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "plain": escape.plain,
        "line": escape.line,
        "link": escape.link,
        "replay": escape.replay,
        "value": value,
        "count": summary.count,
        "square": report_combinations.square,
        "cost": report_combinations.cost,
    }
    return environment


def value(item: Any) -> str:
    """Return a value of an environment, a calibration or a table as words."""
    if item is None:
        return "–"
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int):
        return f"{item:,}"
    if isinstance(item, float):
        return number(item)
    if isinstance(item, dict):
        return ", ".join(f"{key}: {value(entry)}" for key, entry in item.items())
    if isinstance(item, (list, tuple)):
        return ", ".join(map(value, item))
    return escape.plain(item)


def _shares(record: Record) -> list[tuple[str, int, float]]:
    """Return status, cells, and percent of all cells, gravest first."""
    whole = max(1, record.totals["cells"])
    return [
        (status, record.totals[status], 100 * record.totals[status] / whole)
        for status in STATUSES
        if record.totals[status]
    ]


def _group(law: str) -> str:
    return law.partition(".")[0]


def _spans(groups: Iterable[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Return group, first and last column of the heat map, counted as CSS does; column 1 names the row."""
    ends = list(itertools.accumulate((size for _, size in groups), initial=1))
    return [(name, start + 1, end) for (name, _), start, end in zip(groups, ends[:-1], ends[1:], strict=True)]


def _troubled(rows: Iterable[Row], squares: dict[tuple[Row, str], Fold]) -> set[Row]:
    return {row for (row, _), fold in squares.items() if fold.status not in summary.QUIET}


def _leads(found: list[DefectRecord], anchors: dict[str, str]) -> dict[str, str]:
    """Return the anchor of the gravest defect of each cell."""
    return {cell: anchors[defect.fingerprint] for defect in reversed(found) for cell in defect.cells}


def _lines(
    rows: Iterable[Row], laws: list[str], squares: dict[tuple[Row, str], Fold], leads: dict[str, str]
) -> list[tuple[Row, list[Square | None]]]:
    return [
        (row, [_square(squares[row, law], leads) if (row, law) in squares else None for law in laws]) for row in rows
    ]


def _square(fold: Fold, leads: dict[str, str]) -> Square:
    cell = fold.worst
    words = fold.status
    if cell.ratio is not None:
        words += f", ratio {number(cell.ratio)}"
    if place := ", ".join(part for part in (cell.dtype, cell.kind) if part):
        words += f" ({place})"
    if len(fold.cells) > 1:
        words += f"; {fold.count(fold.status)} of {len(fold.cells)} cells"
    if cell.worst is not None and (case := escape.line(cell.worst.words)):
        words += f". Worst case: {case if len(case) <= 160 else case[:159] + '…'}"
    if fold.status == "pass":
        return Square(_shade(cell.ratio), _figure(cell.ratio), words, None)
    return Square(LETTERS[fold.status], SIGNS[fold.status], words, leads.get(cell.id))


def _shade(ratio: float | None) -> str:
    """Return p0 to p3: exact or not measured, at most a tenth, at most a half, and up to the whole budget."""
    return "p" + str(sum((ratio or 0.0) > edge for edge in (0.0, 0.1, 0.5)))


def _figure(ratio: float | None) -> str:
    """Return the ratio in at most three characters; it never rounds up to 1, the edge."""
    if ratio is None:
        return "✓"
    if ratio == 0:
        return "0"
    return "1" if ratio == 1 else f"{math.floor(100 * ratio) / 100:.2f}"[1:]


def _bars(cells: Iterable[CellRecord]) -> list[Bar]:
    """Return the histogram of the ratios of all cells that have one; heights grow as the square root."""
    heights = [0] * len(BINS)
    for cell in cells:
        if cell.ratio is not None:
            heights[next((index for index, (edge, _) in enumerate(BINS) if cell.ratio <= edge), len(BINS) - 1)] += 1
    top = math.sqrt(max([1, *heights]))
    bars = []
    for index, ((edge, label), amount) in enumerate(zip(BINS, heights, strict=True)):
        # The square root keeps one broken cell among thousands visible; every bar says its number.
        height = 96 * math.sqrt(amount) / top
        bars.append(
            Bar(
                label,
                amount,
                8 + 60 * index + (16 if edge > 1 else 0),
                round(116 - height, 1),
                round(height, 1),
                edge > 1,
            )
        )
    return bars


def _first_sweeps(record: Record) -> dict[tuple[str, str, str | None], str]:
    """Return the anchor of the first line of the table of sweeps for each row of the heat map."""
    anchors: dict[tuple[str, str, str | None], str] = {}
    for variant, layer, _, quantizer in summary.by_sweep(record):
        anchors.setdefault((variant, layer, quantizer), f"s{len(anchors) + 1}")
    return anchors


def _killers(record: Record) -> list[str]:
    return sorted({law for fault in record.faults for law in fault.laws_killing})
