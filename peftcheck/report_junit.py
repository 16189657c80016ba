"""Render a record as JUnit XML: a suite for each law, a test case for each cell."""

from __future__ import annotations

from xml.etree import ElementTree

from peftcheck import summary
from peftcheck.escape import plain, replay
from peftcheck.record import CellRecord, Record
from peftcheck.summary import number

# `fixed` fails as in pytest: the ledger says what is no longer so. `unsupported` passes: the refusal was
# checked.
_RESULTS = {
    "violation": "failure",
    "fixed": "failure",
    "error": "error",
    "vacuous": "error",
    "known": "skipped",
    "absent": "skipped",
}


def render(record: Record) -> str:
    """Return the XML; characters that XML cannot hold are replaced."""
    name = f"{record.implementation.name} {record.implementation.version}"
    root = ElementTree.Element("testsuites", name=plain(f"peftcheck {name}"), **_counts(record.cells))
    for law, fold in summary.by_law(record).items():
        suite = ElementTree.SubElement(root, "testsuite", name=plain(law), **_counts(fold.cells))
        for cell in fold.cells:
            _testcase(suite, cell)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counts(cells: tuple[CellRecord, ...]) -> dict[str, str]:
    results = [_RESULTS.get(cell.status) for cell in cells]
    return {
        "tests": str(len(cells)),
        "failures": str(results.count("failure")),
        "errors": str(results.count("error")),
        "skipped": str(results.count("skipped")),
        "time": f"{sum(cell.seconds for cell in cells):.3f}",
    }


def _testcase(suite: ElementTree.Element, cell: CellRecord) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=plain(cell.law), name=plain(cell.id), time=f"{cell.seconds:.3f}"
    )
    properties = ElementTree.SubElement(case, "properties")
    for key, value in (
        ("status", cell.status),
        ("ratio", number(cell.ratio)),
        ("cases", cell.cases),
        ("fingerprint", cell.fingerprint),
        ("issue", cell.issue),
    ):
        if value is not None:
            ElementTree.SubElement(properties, "property", name=key, value=plain(value))
    if result := _RESULTS.get(cell.status):
        first = plain(cell.message or cell.status).strip().partition("\n")[0]
        element = ElementTree.SubElement(case, result, type=cell.status, message=f"{cell.status}: {first}")
        told = [cell.message] + ([cell.worst.words, replay(cell.worst.token)] if cell.worst else [])
        element.text = plain("\n".join(text for text in told if text))
