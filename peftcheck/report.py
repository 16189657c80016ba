"""Render a record in the format that a file's name asks for."""

from __future__ import annotations

from pathlib import Path

from peftcheck import record as records
from peftcheck import report_html, report_junit, report_markdown
from peftcheck.errors import UsageError
from peftcheck.record import Record

RENDERERS = {
    ".html": report_html.render,
    ".md": report_markdown.render,
    ".xml": report_junit.render,
    ".json": records.dumps,
}


def render(record: Record, suffix: str) -> str:
    """Return the report for `.html`, `.md`, `.xml` (JUnit) or `.json`; raise UsageError for the rest."""
    if suffix.lower() not in RENDERERS:
        raise UsageError(
            f"no report is written as {suffix or 'a file without suffix'}; "
            f"name a file that ends in {', '.join(RENDERERS)}"
        )
    return RENDERERS[suffix.lower()](record)


def write(record: Record, path: str | Path) -> None:
    """Write the report in the format of the path's suffix, all of it or nothing."""
    records.write_text(path, render(record, Path(path).suffix))
