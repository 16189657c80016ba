"""Generate the index of a folder of published records: `reports/README.md`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from packaging.version import InvalidVersion, Version

from peftcheck import record as records
from peftcheck import summary
from peftcheck.errors import UsageError
from peftcheck.escape import markdown
from peftcheck.record import Record

FORMATS = (".html", ".md", ".json")
_COLUMNS = (
    "library",
    "verdict",
    "cells run",
    "new defects",
    "known issues",
    "unsupported",
    "absent",
    "report",
)
_HEAD = """# Published records

One record for each version of a library. The JSON is the source; the other files are derived from it, and so is
this page.
"""


def render(folder: str | Path) -> str:
    """Return the index of the records `*.json` in a folder, the newest version of each library first.

    Raise UsageError where a file is not a record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the one that holds the records")
    found = [(path, records.read(path)) for path in sorted(folder.glob("*.json"))]
    if not found:
        return f"{_HEAD}\nThere are no records yet.\n"
    # Two stable sorts: versions downwards within names upwards.
    found.sort(key=lambda item: _version(item[1].implementation.version), reverse=True)
    found.sort(key=lambda item: item[1].implementation.name)
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
    return _HEAD + "\n" + "\n".join(lines + [_row(path, record) for path, record in found]) + "\n"


def write(folder: str | Path) -> Path:
    """Write the index into the folder and return its path."""
    path = Path(folder) / "README.md"
    records.write_text(path, render(folder))
    return path


def _row(path: Path, record: Record) -> str:
    totals = record.totals
    statuses = [defect.status for defect in summary.defects(record)]
    fresh = len(statuses) - statuses.count("known")
    links = ", ".join(
        f"[{suffix[1:]}]({quote(path.with_suffix(suffix).name)})"
        for suffix in FORMATS
        if path.with_suffix(suffix).exists()
    )
    name = markdown(f"{record.implementation.name} {record.implementation.version}")
    cells = (
        f"{totals['run']:,} of {totals['cells']:,}",
        f"{fresh:,}",
        f"{len(summary.known_issues(record)):,}",
        f"{totals['unsupported']:,}",
        f"{totals['absent']:,}",
    )
    return f"| {name} | {summary.verdict(record).title} | {' | '.join(cells)} | {links} |"


def _version(text: str) -> tuple[bool, Version, str]:
    try:
        return True, Version(text), text
    except InvalidVersion:
        return False, Version("0"), text
