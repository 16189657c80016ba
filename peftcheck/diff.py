"""Compare two records of one implementation: what broke, what was repaired, what is no longer looked at."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from peftcheck.errors import UsageError
from peftcheck.escape import code, line, markdown
from peftcheck.record import NOT_RUN, CellRecord, DefectRecord, Record, severity
from peftcheck.summary import count, defects, number

GROWTH = 2.0
# `fixed` is not among them: it is the ledger that is out of date there, the library holds.
BROKEN = ("violation", "error")
_SHOWN = 20


@dataclass(frozen=True)
class Change:
    """Name a cell whose ratio, headroom or status moved, with both values in words."""

    cell: str
    old: str
    new: str


@dataclass(frozen=True)
class Diff:
    """Hold what changed from one record to the next.

    `new`: defects that fail now and did not. `spread`: cells that held and now show a defect that was there
    before.
    `lost`: cells that are gone, or were run and no longer are. `worse`: ratios that grew twofold or more.
    `listed`: defects that are new but declared in the ledger. `fixed`: defects none of whose cells fails any
    more.
    `halved`: cells that hold with half of the headroom or less. `gained`: cells that were not there.
    `same_cases`: both walked the same cases, so that a ratio that grew is the library's doing and not the
    draw's.
    """

    old: str
    new_name: str
    same_cases: bool
    new: tuple[DefectRecord, ...]
    spread: tuple[Change, ...]
    lost: tuple[Change, ...]
    worse: tuple[Change, ...]
    listed: tuple[DefectRecord, ...]
    fixed: tuple[DefectRecord, ...]
    halved: tuple[Change, ...]
    gained: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Tell whether nothing got worse; growth counts only where both records walked the same cases."""
        return not (self.new or self.spread or self.lost or (self.worse and self.same_cases))

    @property
    def exit_code(self) -> int:
        """Return 0 if clean, else 1."""
        return 0 if self.clean else 1


def diff(old: Record, new: Record) -> Diff:
    """Compare two records; raise UsageError where they are not of one implementation."""
    if old.implementation.name != new.implementation.name:
        raise UsageError(
            f"a record of {old.implementation.name} and one of {new.implementation.name} cannot be "
            "compared; give two records of one implementation"
        )
    before, after = ({cell.id: cell for cell in record.cells} for record in (old, new))
    both = [(before[key], after[key]) for key in sorted(before.keys() & after.keys())]
    failed, listed = _failing(old, BROKEN), _failing(old, ("known",))
    fails, knows = _failing(new, BROKEN), _failing(new, ("known",))
    appeared = {key: defect for key, defect in fails.items() if key not in failed}
    entered = {key: defect for key, defect in knows.items() if key not in listed and key not in fails}
    # What is told as a defect is not told again as a broken cell, nor that as a ratio that grew.
    told = {cell for defect in (*appeared.values(), *entered.values()) for cell in defect.cells}
    spread = [(a, b) for a, b in both if b.status in BROKEN and a.status not in BROKEN and b.id not in told]
    told |= {b.id for _, b in spread}
    grown = [(a, b) for a, b in both if _grew(a, b) and b.id not in told]
    moved = {b.id for _, b in grown}
    return Diff(
        old=_name(old),
        new_name=_name(new),
        same_cases=(old.profile, old.seed, old.peftcheck) == (new.profile, new.seed, new.peftcheck),
        new=_ordered(appeared),
        spread=tuple(Change(b.id, a.status, b.status) for a, b in spread),
        lost=_lost(before, after),
        worse=tuple(
            Change(b.id, number(a.ratio), number(b.ratio))
            for a, b in sorted(grown, key=lambda pair: (-severity(pair[1].ratio), pair[1].id))
        ),
        listed=_ordered(entered),
        fixed=_ordered(
            {
                key: defect
                for key, defect in (listed | failed).items()
                if key not in fails and key not in knows and _holds(defect, after)
            }
        ),
        halved=tuple(
            Change(b.id, number(a.headroom), number(b.headroom)) for a, b in both if b.id not in moved and _halved(a, b)
        ),
        gained=tuple(sorted(after.keys() - before.keys())),
    )


def _name(record: Record) -> str:
    return f"{record.implementation.name} {record.implementation.version}"


def _failing(record: Record, statuses: tuple[str, ...]) -> dict[str, DefectRecord]:
    return {defect.fingerprint: defect for defect in defects(record) if defect.status in statuses}


def _holds(defect: DefectRecord, after: dict[str, CellRecord]) -> bool:
    """Tell whether the cells of a defect that are still run all hold, and at least one of them is run.

    A cell that fails for another cause may hide this one, and a cell that is not run says nothing.
    """
    cells = [after[key] for key in defect.cells if key in after]
    judged = [cell for cell in cells if cell.status not in (*NOT_RUN, "vacuous")]
    return bool(judged) and all(cell.status in ("pass", "fixed") for cell in judged)


def _lost(before: dict[str, CellRecord], after: dict[str, CellRecord]) -> tuple[Change, ...]:
    unseen = (*NOT_RUN, "vacuous")
    gone = [Change(key, cell.status, "gone") for key, cell in before.items() if key not in after]
    dropped = [
        Change(key, cell.status, after[key].status)
        for key, cell in before.items()
        if key in after and cell.status not in unseen and after[key].status in unseen
    ]
    return tuple(sorted(gone + dropped, key=lambda change: change.cell))


def _grew(old: CellRecord, new: CellRecord) -> bool:
    if old.ratio is None or new.ratio is None:
        return False
    return severity(new.ratio) >= GROWTH * severity(old.ratio) and severity(new.ratio) > severity(old.ratio)


def _halved(old: CellRecord, new: CellRecord) -> bool:
    return (
        old.status == new.status == "pass"
        and old.headroom is not None
        and new.headroom is not None
        and new.headroom <= old.headroom / 2
        and new.headroom < old.headroom
    )


def _ordered(found: dict[str, DefectRecord]) -> tuple[DefectRecord, ...]:
    return tuple(sorted(found.values(), key=lambda defect: (-len(defect.cells), defect.fingerprint)))


def sentence(diff: Diff) -> str:
    """Say the outcome in one sentence."""
    parts = [
        count(len(found), *noun)
        for found, noun in (
            (diff.new, ("new defect",)),
            (diff.spread, ("cell broken that held", "cells broken that held")),
            (diff.lost, ("lost cell",)),
            (
                diff.worse if diff.same_cases else (),
                ("cell with its ratio doubled", "cells with their ratio doubled"),
            ),
        )
        if found
    ]
    repaired = f"; {count(len(diff.fixed), 'defect')} fixed" if diff.fixed else ""
    return f"{diff.old} to {diff.new_name}: {', '.join(parts) or 'nothing got worse'}{repaired}."


def _sections(diff: Diff) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Return title, column names and rows of every part that has something to say, gravest first."""
    growth = "Worse: ratio doubled or more" + (
        "" if diff.same_cases else " (other cases were drawn, so this alone decides nothing)"
    )
    causes = (("New defects", diff.new), ("New, but in the ledger", diff.listed), ("Fixed", diff.fixed))
    changes = (
        ("Cells broken that held", diff.spread),
        ("Lost cells", diff.lost),
        (growth, diff.worse),
        ("Headroom halved", diff.halved),
    )
    told = {
        title: (
            title,
            ("law", "defect", "cells", "ratio"),
            [(defect.law, defect.headline, f"{len(defect.cells):,}", number(defect.ratio)) for defect in found],
        )
        for title, found in causes
    }
    told |= {
        title: (title, ("cell", "before", "now"), [(change.cell, change.old, change.new) for change in found])
        for title, found in changes
    }
    order = (
        "New defects",
        "Cells broken that held",
        "Lost cells",
        growth,
        "New, but in the ledger",
        "Fixed",
        "Headroom halved",
    )
    return [told[title] for title in order if told[title][2]]


def render_text(diff: Diff) -> Group:
    """Return the comparison for a terminal."""
    parts: list = [Text(line(sentence(diff)), style="bold green" if diff.clean else "bold red")]
    for title, columns, rows in _sections(diff):
        # Text objects, not strings: rich would read markup in a string.
        table = Table(title=Text(f"{title} ({len(rows):,})"), title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold", justify="right" if column in ("cells", "ratio") else "left")
        for row in rows[:_SHOWN]:
            table.add_row(*(Text(line(value)) for value in row))
        parts += [Text(""), table]
        if len(rows) > _SHOWN:
            parts.append(Text(f"and {len(rows) - _SHOWN:,} more"))
    if diff.gained:
        parts += [Text(""), Text(f"{count(len(diff.gained), 'cell')} not in the old record")]
    return Group(*parts)


def render_markdown(diff: Diff) -> str:
    """Return the comparison as Markdown, short enough for a comment on GitHub."""
    parts = [f"### {'✅' if diff.clean else '❌'} {markdown(sentence(diff))}"]
    for title, columns, rows in _sections(diff):
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for row in rows[:_SHOWN]:
            first, *rest = (value if len(value) <= 300 else value[:299] + "…" for value in row)
            lines.append("| " + " | ".join((code(first, in_table=True), *map(markdown, rest))) + " |")
        more = f"\n\nand {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
        parts.append(f"**{title} ({len(rows):,})**\n\n" + "\n".join(lines) + more)
    if diff.gained:
        parts.append(f"{count(len(diff.gained), 'cell')} not in the old record.")
    return "\n\n".join(parts) + "\n"
