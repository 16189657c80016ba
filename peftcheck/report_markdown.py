"""Render a record as Markdown that fits a comment on GitHub.

Everything in a record is untrusted: it is escaped, or shown as code that it cannot leave.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftcheck import escape, report_combinations, report_quantized, summary
from peftcheck.escape import code, markdown
from peftcheck.record import DefectRecord, LedgerRecord, Record, Table, severity
from peftcheck.summary import count, number

# GitHub refuses a comment of more than 65,536 characters.
LIMIT = 60_000
_SIGNS = {"violates": "❌", "unvouched": "⚠️", "known": "🟡", "holds": "✅"}
_TEXT = 400


def render(record: Record) -> str:
    """Return the report: verdict and denominators, then as many whole parts as there is room for."""
    parts = [_lead(record)]
    room = LIMIT - len(parts[0])
    left_out = 0
    for part in _parts(record):
        if len(part) + 2 <= room - 200:
            parts.append(part)
            room -= len(part) + 2
        else:
            left_out += 1
    if left_out:
        parts.append(f"{count(left_out, 'part')} left out for length; the HTML report and the JSON have all of them.")
    return escape.encodable("\n\n".join(parts) + "\n")


def _parts(record: Record) -> Iterable[str]:
    found = summary.defects(record)
    fresh = [defect for defect in found if defect.status != "known"]
    known = summary.known_issues(record)
    if fresh:
        yield "### Distinct defects"
    yield from (_defect(index, defect) for index, defect in enumerate(fresh, 1))
    if known:
        yield "### Known issues\n\n" + _table(
            ("issue", "severity", "laws", "cells", "worst ratio", "reported"),
            (
                (
                    _short(one.name),
                    _short((one.entry and one.entry.severity) or "–"),
                    ", ".join(code(law, True) for law in one.places("law")[:3]) + _more(one.places("law")[3:]),
                    f"{len(one.cells):,}",
                    number(max((defect.ratio for defect in one.defects), key=severity)),
                    _address(one.entry and one.entry.url) or "no report found",
                )
                for one in known
            ),
        )
    if record.cells:
        yield "### Laws\n\n" + _laws(record)
    if (found := report_combinations.read(record)) is not None:
        yield from _combinations(found)
    if record.ledger:
        yield "### Ledger\n\n" + _ledger(record.ledger)
    if record.faults:
        yield "### Kill matrix\n\n" + _table(
            ("fault", "what it does", "killed by"),
            (
                (
                    code(fault.name, True),
                    _short(fault.description),
                    ", ".join(code(law, True) for law in fault.laws_killing) or "**survives**",
                )
                for fault in record.faults
            ),
        )
    quantized = report_quantized.table(record)
    if quantized:
        said = "\n".join(f"- {_short(text)}" for text in report_quantized.sentences(record))
        yield f"{_measurement(quantized)}\n\n{said}"
    yield from map(_measurement, record.measurements)
    yield "### Environment\n\n" + _table(
        ("", ""), ((markdown(key), _short(value)) for key, value in sorted(record.environment.items()))
    )


def _lead(record: Record) -> str:
    verdict, totals = summary.verdict(record), record.totals
    run = f"profile {code(record.profile)}, seed {record.seed}, peftcheck {markdown(record.peftcheck)}"
    columns = (
        "cells",
        "run",
        "cases",
        "pass",
        "violation",
        "error",
        "fixed",
        "known",
        "unsupported",
        "absent",
        "vacuous",
    )
    return (
        f"## {_SIGNS[verdict.kind]} {markdown(verdict.title)}: {markdown(record.implementation.name)} "
        f"{markdown(record.implementation.version)}\n\n{markdown(verdict.sentence)}\n\n"
        + _table(columns, [tuple(f"{totals[name]:,}" for name in columns)])
        + f"\n\n{run}"
    )


def _defect(index: int, defect: DefectRecord) -> str:
    lines = [f"#### {index}. {_short(defect.headline)}", ""]
    lines.append(
        f"- **{defect.status}** of {code(defect.law)} in {count(len(defect.cells), 'cell')}, "
        f"ratio {number(defect.ratio)}"
    )
    if defect.words:
        lines.append(f"- Smallest case: {_short(defect.words)}")
    lines += [f"- {_short(step)}" for step in defect.steps]
    for noun, names in (("Variants", defect.variants), ("Layers", defect.layers), ("Dtypes", defect.dtypes)):
        if names:
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            lines.append(f"- {noun}: {', '.join(map(code, names[:12]))}{more}")
    if defect.repair:
        lines.append(f"- Instead: {_short(defect.repair)}")
    if defect.issue:
        lines.append(f"- Issue: {_address(defect.issue)}")
    if defect.token:
        lines += ["", escape.block(escape.replay(defect.token), "sh")]
    for title, text, language in (
        ("Full message", defect.message, ""),
        ("Standalone script", defect.script, "python"),
    ):
        if text:
            lines += [
                "",
                f"<details><summary>{title}</summary>",
                "",
                escape.block(_cut(escape.plain(text), 6000), language),
                "",
                "</details>",
            ]
    return "\n".join(lines)


def _laws(record: Record) -> str:
    rows = []
    for law, fold in summary.by_law(record).items():
        holding = fold.holding
        rows.append(
            (
                code(law, True),
                f"{fold.run:,}",
                f"{fold.count('pass'):,}",
                f"{fold.count('known'):,}",
                f"{fold.count('violation', 'error', 'fixed', 'vacuous'):,}",
                number(holding.ratio if holding else None),
            )
        )
    return _table(("law", "run", "pass", "known", "failing", "worst ratio that holds"), rows)


def _combinations(found: report_combinations.Combinations) -> Iterable[str]:
    if found.remedies:
        yield "### Combining adapters today\n\n" + _table(
            ("kind asked for", "cells broken", "given by", "in cells", "at a cost of", "largest relative error"),
            (
                (
                    code(remedy.kind, True),
                    f"{remedy.broken:,}",
                    code(remedy.exact, True) if remedy.exact else "no kind that was tried",
                    f"{remedy.cells:,}" if remedy.cells else "–",
                    markdown(report_combinations.cost(remedy)),
                    number(remedy.error),
                )
                for remedy in found.remedies
            ),
        )
    rows = (
        (
            code(line.kind, True),
            markdown(escape.line(line.layer)),
            *(f"{fold.status} {report_combinations.square(fold)}".strip() if fold else "" for fold in line.folds),
        )
        for line in found.lines
    )
    yield "### Kinds of combination by layer and law\n\n" + _table(
        ("kind", "layer", *(code(law.partition(".")[2] or law, True) for law in found.laws)), rows
    )


def _ledger(entries: Iterable[LedgerRecord]) -> str:
    return _table(
        ("entry", "law", "verdict", "kind", "reason", "versions", "cells"),
        (
            (
                code(entry.id, True),
                code(entry.law, True),
                markdown(entry.verdict),
                markdown(entry.kind),
                _short(entry.reason) + (f" {_address(entry.url)}" if entry.url else ""),
                _short(entry.versions or "all"),
                f"{len(entry.cells):,}",
            )
            for entry in entries
        ),
    )


def _measurement(table: Table) -> str:
    note = f"\n\n{markdown(table.note)}" if table.note else ""
    rows = (
        [number(item) if isinstance(item, float) else "–" if item is None else _short(item) for item in row]
        for row in table.rows
    )
    return f"### {_short(table.title)}{note}\n\n{_table([markdown(column) for column in table.columns], rows)}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = tuple(columns)
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _address(url: str | None) -> str:
    return f"<{address}>" if (address := escape.link(url)) else markdown(url or "")


def _more(names: tuple[str, ...]) -> str:
    return f" and {len(names)} more" if names else ""


def _short(text: object) -> str:
    return markdown(_cut(escape.line(text), _TEXT))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
