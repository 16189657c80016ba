"""Lists of what there is: laws, variants, cells, implementations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from peftcheck import escape, suite
from peftcheck import implementation as port
from peftcheck.errors import UsageError
from peftcheck.law import Law, laws
from peftcheck.oracle import FORMULAS


def show(what: str, target: str, filters: dict[str, tuple[str, ...]]) -> None:
    """Print a list as a table."""
    console = Console()
    if what == "implementations":
        console.print(_table(("implementation",), [(name,) for name in port.names()]))
    elif what == "laws":
        console.print(
            _table(("law", "what holds", "where it comes from"), [(w.name, w.formula, w.source) for w in laws()])
        )
    elif what == "variants":
        console.print(_table(("variant", "layers", "family", "closed form"), _variants(target)))
    elif what == "cells":
        _cells(console, target, suite.Filters(**filters))
    else:
        raise UsageError(f"cannot list '{what}'")


def laws_markdown(found: Sequence[Law]) -> str:
    """Return the laws as a Markdown table, a row per group of the README."""
    rows = [f"| `{one.name}` | {escape.code(one.formula, in_table=True)} |" for one in found]
    return "\n".join(["| law | what holds |", "|---|---|", *rows])


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    return table


def _variants(target: str) -> list[tuple[str, ...]]:
    rows = []
    for name, variant in port.load(target).variants().items():
        form = FORMULAS[variant.formula]
        rows.append((name, ", ".join(sorted(variant.layers)), form.family.value, form.source))
    return rows


def _cells(console: Console, target: str, filters: suite.Filters) -> None:
    implementation = port.load(target)
    found = suite.cells(implementation, laws(), suite.validated(filters, implementation, laws()))
    for cell in found:
        console.print(cell.id, highlight=False, markup=False)
    sweeps = Counter(cell.sweep.variant for cell in found)
    console.print(f"{len(found)} cells in {len({c.sweep for c in found})} sweeps of {len(sweeps)} variants")
