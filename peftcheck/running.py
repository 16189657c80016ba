"""What the commands do: run, replay, the ledger's commands, the kill matrix."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from peftcheck import implementation as port
from peftcheck import record as records
from peftcheck import terminal
from peftcheck.errors import UsageError
from peftcheck.plugin import COLLECTOR
from peftcheck.tokens import NO_LAW

if TYPE_CHECKING:
    from peftcheck.session import Session

_FILTERS = ("law", "variant", "layer", "dtype", "quantizer", "kind")


class _Keep:
    """A pytest plugin that hands the run's session to its collector, and keeps that for the caller."""

    def __init__(self, key: tuple[str, str], session: Session) -> None:
        self._key, self._session = key, session
        self.collector: Any = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.collector = session.config.stash[COLLECTOR]
        self.collector.sessions[self._key] = self._session


def run(target: str, pytest_args: tuple[str, ...], **options: Any) -> int:
    """Run the conformance suite through pytest, write record and reports, return the exit code."""
    from peftcheck.session import Session, Settings, parse_shard
    from peftcheck.suite import Filters

    seed = options["seed"]
    if seed is None:
        seed = secrets.randbelow(2**31) if options["profile"] == "nightly" else 0
        if options["profile"] == "nightly":
            click.echo(f"seed {seed}")
    filters = Filters(*(tuple(options[name]) for name in _FILTERS))
    ledger = "none" if options["no_ledger"] else options["ledger"]
    if ledger not in (None, "none") and not Path(ledger).exists():
        raise UsageError(f"no ledger at {ledger}")
    with tempfile.TemporaryDirectory(prefix="peftcheck-") as journal:
        # everything that can be wrong with the request is found here, before a worker starts or a file is written
        session = Session(
            Settings(
                target,
                options["profile"],
                seed,
                None if ledger == "none" else ledger or "",
                filters,
                parse_shard(options["shard"]),
                journal,
            )
        )
        paths = _outputs(options, session.implementation.name, session.implementation.version)
        keep = _Keep((target, ledger or ""), session)
        code = pytest.main(_arguments(target, options, seed, ledger, journal, pytest_args), plugins=[keep])
    collector = keep.collector
    finished = collector.record if collector else None
    if code == pytest.ExitCode.USAGE_ERROR:
        return 2
    if code == pytest.ExitCode.INTERRUPTED or finished is None:
        return 3
    from peftcheck import report

    for path in paths:
        report.write(finished, path)
        click.echo(f"wrote {os.path.relpath(path)}")
    return terminal.exit_code(finished, collector.unvouched)


def _arguments(
    target: str, options: dict[str, Any], seed: int, ledger: str | None, journal: str, more: tuple[str, ...]
) -> list[str]:
    """Return what pytest is called with: our own test module, and of the plugins that are installed only what it uses."""
    folder = Path(__file__).parent
    return [
        str(folder / "conformance.py"),
        f"--rootdir={folder}",
        "-c",
        str(folder / "conformance.ini"),
        "-q",
        "--no-header",
        "--tb=no",
        "-rN",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:logging",
        "-p",
        "no:anyio",
        "-p",
        "no:hypothesispytest",
        "-p",
        "no:unraisableexception",
        "-p",
        "no:threadexception",
        "-p",
        "peftcheck.protocol",
        "-n",
        options["workers"] if options["workers"] != "0" else "1",
        f"--peftcheck-implementation={target}",
        f"--peftcheck-profile={options['profile']}",
        f"--peftcheck-seed={seed}",
        f"--peftcheck-journal={journal}",
        *([f"--peftcheck-ledger={ledger}"] if ledger else []),
        *([f"--peftcheck-shard={options['shard']}"] if options["shard"] else []),
        *(f"--peftcheck-{name}={pattern}" for name in _FILTERS for pattern in options[name]),
        *more,
    ]


def _outputs(options: dict[str, Any], name: str, version: str) -> list[Path]:
    """Return where record and reports go: what was asked for, else record and HTML under reports/."""
    asked = [Path(options[key]) for key in ("record", "html", "markdown", "junit") if options[key]]
    folder = Path("reports")
    stem = f"{name}-{version}".replace("/", "_")
    if not options["record"]:
        asked.append(folder / f"{stem}.json")
    if not options["html"]:
        asked.append(folder / f"{stem}.html")
    for path in asked:
        if path.suffix not in (".json", ".html", ".md", ".xml"):
            raise UsageError(f"cannot write {path}: the name must end in .json, .html, .md or .xml")
        path.parent.mkdir(parents=True, exist_ok=True)
    return asked


def replay(token: str, law: str | None, target: str | None, script: str | None, issue: bool) -> int:
    """Run the case of a token; print FIXED, VIOLATION or ERROR; return 0 only where the law holds.

    `law` stands in for the token's own: the tokens of a record's table of cases have none.
    """
    from peftcheck import engine, repro
    from peftcheck.case import decode
    from peftcheck.law import laws
    from peftcheck.outcome import PASS, SKIP

    case, own = decode(token)
    name = own if law is None else law
    if name == NO_LAW:
        raise UsageError("the token holds a case and no law; give one with --law")
    implementation = port.load(target or case.sweep.implementation)
    found = {law.name: law for law in laws()}
    if name not in found:
        hint = " in the token: was it made by a newer peftcheck?" if law is None else ": see peftcheck list laws"
        raise UsageError(f"unknown law '{name}'{hint}")
    if case.sweep.variant not in implementation.variants():
        raise UsageError(f"{implementation.name} has no variant '{case.sweep.variant}'")
    (outcome,) = engine.check(implementation, case, [found[name]])
    word = {PASS: "FIXED", SKIP: "NOT APPLICABLE"}.get(outcome.status, outcome.status.upper())
    click.echo(f"{word}: {name} on {implementation.name} {implementation.version}")
    click.echo(f"law: {found[name].formula}")
    click.echo(f"case: {case.words()}")
    if outcome.message:
        click.echo(outcome.message)
    elif outcome.measurement:
        click.echo(f"ratio {outcome.measurement.ratio:.3g}")
    if script:
        records.write_text(Path(script), repro.script(implementation, case, found[name]))
        click.echo(f"wrote {script}")
    if issue:
        click.echo(repro.issue(implementation, case, found[name], outcome))
    return 0 if outcome.status == PASS else 1


def ledger_check(target: str, path: Path | None) -> int:
    """Run every witness and print the verdicts; return 1 if an entry does not stand."""
    from peftcheck import ledger
    from peftcheck.law import laws

    implementation = port.load(target)
    source = path or implementation.ledger
    if source is None or not source.exists():
        raise UsageError(f"no ledger at {source}")
    court = ledger.Court(ledger.load(source), implementation, laws())
    wrong = 0
    for entry in court.entries():
        verdict = court.verdict(entry.id)
        click.echo(f"{verdict:8} {entry.id} ({entry.kind}): {entry.reason}")
        wrong += verdict not in ("known", "inactive")
    return 1 if wrong else 0


def ledger_add(token: str | None, path: Path | None) -> None:
    """Print entries to paste; raises UsageError unless given a token or a record."""
    from peftcheck import engine, ledger
    from peftcheck.case import decode
    from peftcheck.law import laws

    if (token is None) == (path is None):
        raise UsageError("give a token, or a record with --from")
    tokens = [token] if token else [d.token for d in records.read(path).defects if d.status != "known" and d.token]
    found = {law.name: law for law in laws()}
    for one in tokens:
        case, name = decode(one)
        implementation = port.load(case.sweep.implementation)
        (outcome,) = engine.check(implementation, case, [found[name]])
        if not outcome.failed:
            raise UsageError(f"{name} holds on this case: there is nothing to list")
        click.echo(ledger.entry_text(case, name, outcome, implementation.version))


def kill_matrix(target: str, path: Path | None) -> int:
    """Plant every fault, print which law kills it; return 3 if a fault survives or a law kills nothing."""
    from dataclasses import replace

    from peftcheck import faults
    from peftcheck.law import laws

    implementation, found = port.load(target), laws()
    results = faults.kill_matrix(implementation, faults.FAULTS, found)
    for result in results:
        word = "untried " if not result.tried else "SURVIVES" if result.survived else "killed  "
        click.echo(f"{word} {result.fault.name}: {', '.join(result.laws) or '-'}")
    nothing = faults.idle(results, found)
    for name in nothing:
        click.echo(f"KILLS NOTHING {name}")
    tried = [result for result in results if result.tried]
    survivors = [result for result in tried if result.survived]
    click.echo(
        f"{len(tried) - len(survivors)} of {len(tried)} faults killed; {len(results) - len(tried)} found nothing that suits them"
    )
    if path:
        records.write(replace(records.read(path), faults=faults.records(results)), path)
    return 3 if survivors or nothing else 0
