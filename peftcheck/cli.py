"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peftcheck import __version__
from peftcheck.errors import HarnessError, UsageError

_FILTERS = ("law", "variant", "layer", "dtype", "quantizer", "kind")


def _plainly(command: Callable) -> Callable:
    """Turn bad input into one line and exit code 2, a fault of the harness into exit code 3."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            sys.exit(command(*args, **kwargs) or 0)
        except UsageError as error:
            click.echo(f"peftcheck: {error}", err=True)
            sys.exit(2)
        except HarnessError as error:
            click.echo(f"peftcheck: the harness is at fault: {error}", err=True)
            sys.exit(3)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="peftcheck")
def main() -> None:
    """Check that an adapter library keeps its promises: merge, unmerge, refuse, combine."""


def _filtered(command: Callable) -> Callable:
    for name in reversed(_FILTERS):
        text = f"Only cells whose {name} matches this glob; repeatable."
        command = click.option(f"--{name}", multiple=True, metavar="GLOB", help=text)(command)
    return command


@main.command(context_settings={"ignore_unknown_options": False})
@click.argument("target")
@_filtered
@click.option("--profile", default="quick", show_default=True, help="quick, full or nightly.")
@click.option("--seed", type=int, default=None, help="Seed of the generator (0; fresh and printed in nightly).")
@click.option("--shard", metavar="I/N", default=None, help="Only every n-th sweep.")
@click.option(
    "--ledger", default=None, metavar="PATH", help="Ledger of known issues (default: the implementation's own)."
)
@click.option("--no-ledger", is_flag=True, help="Count known issues as violations.")
@click.option("--record", default=None, metavar="PATH", help="Write the record here.")
@click.option("--html", default=None, metavar="PATH", help="Write the HTML report here.")
@click.option("--markdown", default=None, metavar="PATH", help="Write the Markdown report here.")
@click.option("--junit", default=None, metavar="PATH", help="Write JUnit XML here.")
@click.option("-n", "workers", default="auto", show_default=True, help="Worker processes (at least one).")
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
@_plainly
def run(target: str, pytest_args: tuple[str, ...], **options: Any) -> int:
    """Run every law on every variant of TARGET (an entry-point name or module:attribute)."""
    from peftcheck import running

    return running.run(target, pytest_args, **options)


@main.command()
@click.argument("token")
@click.option("--law", default=None, help="Check this law on the case: a token in a record's table of cases has none.")
@click.option("--implementation", default=None, help="Replay on this implementation instead of the token's own.")
@click.option("--script", default=None, metavar="PATH", help="Write a standalone script that shows the defect.")
@click.option("--issue", is_flag=True, help="Print the text of an issue to file.")
@_plainly
def replay(token: str, law: str | None, implementation: str | None, script: str | None, issue: bool) -> int:
    """Run the case of a TOKEN again: FIXED, VIOLATION or ERROR."""
    from peftcheck import running

    return running.replay(token, law, implementation, script, issue)


@main.command()
@click.argument("record", type=Path)
@click.option("-o", "--output", required=True, type=Path, help="Where to: .html, .md, .xml or .json.")
@_plainly
def report(record: Path, output: Path) -> None:
    """Render a RECORD; the suffix of the output decides how."""
    from peftcheck import record as records
    from peftcheck import report as reports

    reports.write(records.read(record), output)
    click.echo(f"wrote {output}")


@main.command()
@click.argument("old", type=Path)
@click.argument("new", type=Path)
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@_plainly
def diff(old: Path, new: Path, markdown: bool) -> int:
    """Compare two records: new defects, fixed, worse, lost cells, headroom halved."""
    from peftcheck import diff as diffs
    from peftcheck import record as records

    found = diffs.diff(records.read(old), records.read(new))
    if markdown:
        click.echo(diffs.render_markdown(found))
    else:
        Console().print(diffs.render_text(found))
    return 0 if found.clean else 1


@main.command()
@click.argument("records", nargs=-1, required=True, type=Path)
@click.option("-o", "--output", required=True, type=Path)
@_plainly
def join(records: tuple[Path, ...], output: Path) -> None:
    """Join the RECORDS of shards into one; refuses to lose cells."""
    from peftcheck import record as own
    from peftcheck.joining import join as joined

    own.write(joined([own.read(path) for path in records]), output)
    click.echo(f"wrote {output}")


@main.group()
def ledger() -> None:
    """Check the ledger of known issues, or print entries to paste into it."""


@ledger.command("check")
@click.argument("target")
@click.option("--ledger", "path", default=None, type=Path)
@_plainly
def ledger_check(target: str, path: Path | None) -> int:
    """Run every witness of TARGET's ledger and print the verdicts."""
    from peftcheck import running

    return running.ledger_check(target, path)


@ledger.command("add")
@click.argument("token", required=False)
@click.option("--from", "record", default=None, type=Path, help="One entry for each new defect of this record.")
@_plainly
def ledger_add(token: str | None, record: Path | None) -> None:
    """Print ledger entries to paste: for one TOKEN, or for each new defect of a record. Writes nothing."""
    from peftcheck import running

    running.ledger_add(token, record)


@main.command()
@click.argument("target", default="peftcheck.implementations.reference:Reference")
@click.option("--record", default=None, type=Path, help="Add the kill matrix to this record.")
@_plainly
def faults(target: str, record: Path | None) -> int:
    """Plant deliberate defects and show which law kills which (default: in the reference implementation)."""
    from peftcheck import running

    return running.kill_matrix(target, record)


@main.command("list")
@click.argument("what", type=click.Choice(["laws", "variants", "cells", "implementations"]))
@click.argument("target", default="peft")
@_filtered
@_plainly
def listing(what: str, target: str, **filters: tuple[str, ...]) -> None:
    """List what there is; TARGET is the implementation (default: peft)."""
    from peftcheck import listing as lists

    lists.show(what, target, filters)


@main.command()
@click.argument("target", default="peft")
@click.option("--seconds", default=20.0, show_default=True, help="How long to measure.")
@_filtered
@_plainly
def bench(target: str, seconds: float, **filters: tuple[str, ...]) -> None:
    """Print law checks per second on one core, and where the time goes."""
    from peftcheck import bench as measuring

    measuring.show(target, seconds, filters)


if __name__ == "__main__":
    main()
