"""The pytest plugin: one item per cell, sweeps kept together on a worker, the record at the end.

Nothing here imports torch; that waits until a check is collected.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from peftcheck.record import Record
    from peftcheck.session import Session

_OPTIONS = {
    "implementation": "library under test: an entry-point name or module:attribute",
    "profile": "how far to search: quick, full or nightly",
    "ledger": "path of the ledger of known issues ('none' for no ledger)",
    "record": "write the record of the run to this path",
    "case": "check the case of this token only",
    "seed": "seed of the generator",
}
_FILTERS = ("law", "variant", "layer", "dtype", "quantizer", "kind")
_KEY = "peftcheck"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftcheck", "conformance of adapter libraries")
    for name, text in _OPTIONS.items():
        group.addoption(f"--peftcheck-{name}", default=None, help=text)
        parser.addini(f"peftcheck_{name}", text, default=None)
    for name in _FILTERS:
        group.addoption(f"--peftcheck-{name}", action="append", default=None, help=f"only cells whose {name} matches")
    group.addoption("--peftcheck-shard", default=None, help="i/n: only every n-th sweep")
    group.addoption("--peftcheck-watchdog", type=float, default=60.0, help="seconds before a case counts as hung")
    group.addoption("--peftcheck-journal", default=None, help="folder for the crash journal, shared by the workers")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "peftcheck(law, variant, layer, dtype): a cell of a conformance run")
    config.addinivalue_line("markers", "peftcheck_suite(target, ledger): a test that receives every cell as `check`")
    config.stash[COLLECTOR] = Collector()
    config.pluginmanager.register(config.stash[COLLECTOR], "peftcheck-collector")


class Collector:
    """What one pytest process knows: sessions by target, results by cell id, expected cell ids, and the record.

    Workers attach results to their reports; the controller gathers them here.
    """

    def __init__(self) -> None:
        self.sessions: dict[tuple[str, str], Session] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.expected: dict[str, None] = {}
        self.died: set[str] = set()
        self.calibration: dict[str, Any] = {}
        self.started = time.time()
        self.record: Record | None = None
        self.unvouched: frozenset[str] = frozenset()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = [value for key, value in report.user_properties if key == _KEY]
        if report.when == "call":
            for value in properties:
                self.results[value["id"]] = value
        elif report.when not in ("setup", "teardown") and (found := _CELL.search(report.nodeid)):
            self.died.add(found[1])  # the worker died over this item


COLLECTOR = pytest.StashKey[Collector]()


def parametrize(implementation: str | None = None, ledger: str | None = None) -> Callable[[Callable], Callable]:
    """Mark a test function to receive one `check` per cell of the implementation.

    The test calls the check it is handed. `implementation`: an entry-point name or 'module:attribute' (default: the
    option `--peftcheck-implementation`); `ledger`: a path (default: the option, else the implementation's own).
    """
    return pytest.mark.peftcheck_suite(implementation, ledger)


def _option(config: pytest.Config, name: str) -> str | None:
    value = config.getoption(f"--peftcheck-{name}")
    return value if value is not None else (config.getini(f"peftcheck_{name}") or None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("peftcheck_suite")
    if marker is None:
        return
    target = marker.args[0] or _option(metafunc.config, "implementation")
    if target is None:
        raise pytest.UsageError("name a library: --peftcheck-implementation peft, or parametrize('peft')")
    session = _session(metafunc.config, target, marker.args[1])
    parameters = [
        pytest.param(
            (session, cell),
            id=cell.id,
            marks=pytest.mark.peftcheck(cell.law, cell.sweep.variant, cell.sweep.layer, cell.sweep.dtype),
        )
        for cell in session.cells
    ]
    metafunc.parametrize("check", parameters, indirect=True)


def _session(config: pytest.Config, target: str, path: str | None) -> Session:
    from peftcheck.errors import UsageError
    from peftcheck.session import Session, Settings, parse_shard
    from peftcheck.suite import Filters

    collector = config.stash[COLLECTOR]
    chosen = _option(config, "ledger") or path or ""
    key = (target, chosen)
    if key not in collector.sessions:
        try:
            settings = Settings(
                target,
                _option(config, "profile") or "quick",
                _seed(_option(config, "seed")),
                None if chosen == "none" else chosen,
                Filters(*(tuple(config.getoption(f"--peftcheck-{name}") or ()) for name in _FILTERS)),
                parse_shard(config.getoption("--peftcheck-shard")),
                config.getoption("--peftcheck-journal"),
                config.getoption("--peftcheck-watchdog"),
            )
            collector.sessions[key] = Session(settings)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error
    return collector.sessions[key]


def _seed(text: str | None) -> int:
    from peftcheck.errors import UsageError

    try:
        return int(text or 0)
    except ValueError:
        raise UsageError(f"the seed must be a whole number, not '{text}'") from None


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Hand out the check of one cell: calling it runs the law and passes, fails, skips or xfails."""

    def run() -> None:
        _announce(verdict(request.node))

    return run


def verdict(item: pytest.Item) -> dict[str, Any]:
    """Return the plain verdict on an item's cell, and leave it (and what a dead worker left) in the item's properties."""
    session, cell = item.callspec.params["check"]
    plain = session.verdict(cell).as_plain()
    recovered = [other.as_plain() for other in session.recovered(cell)]
    item.user_properties += [(_KEY, one) for one in (plain, *recovered)]
    item.config.stash[COLLECTOR].calibration = session.calibration
    return plain


def _announce(plain: dict[str, Any]) -> None:
    status, message = plain["status"], plain["message"] or ""
    if status in ("pass", "unsupported"):
        return
    if status == "known":
        pytest.xfail(f"{plain['issue']}: {message}")
    if status == "absent":
        pytest.skip(message)
    pytest.fail(failure_text(plain), pytrace=False)


def failure_text(plain: dict[str, Any]) -> str:
    """Return what a failed cell says: what was found, the case in words, and how to see it again."""
    lines = [f"{plain['status']}: {plain['message'] or ''}"]
    if plain["words"]:
        lines.append(f"case: {plain['words']}")
    if plain["token"]:
        lines.append(f"reproduce with: peftcheck replay {plain['token']}")
    return "\n".join(lines)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    collector = session.config.stash[COLLECTOR]
    selected: dict[Session, list] = {}
    for item in session.items:
        if hasattr(item, "callspec") and item.get_closest_marker("peftcheck_suite"):
            own, cell = item.callspec.params["check"]
            selected.setdefault(own, []).append(cell)
            collector.expected[cell.id] = None
    for own, cells in selected.items():
        own.select(cells)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    collector = node.config.stash[COLLECTOR]
    for nodeid in ids:
        found = _CELL.search(nodeid)
        if found:
            collector.expected[found[1]] = None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    output = getattr(node, "workeroutput", {})
    if output.get(_KEY):
        node.config.stash[COLLECTOR].calibration = output[_KEY]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    collector = session.config.stash[COLLECTOR]
    if output is not None:
        output[_KEY] = collector.calibration


_CELL = re.compile(r"\[([a-z_]+\.[a-z_]+-[^\]]+)\]$")
_LAW = re.compile(r"\[[a-z_]+\.[a-z_]+-")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the laws of a sweep on one worker: the scope of an item is its id without the law."""
    if config.getoption("dist", "no") not in ("load", "no"):
        return None
    from xdist.scheduler import LoadScopeScheduling

    class SweepScheduling(LoadScopeScheduling):
        """Sweeps as scopes, and a run that goes on after a worker died.

        What a dead worker had finished must not be handed out again: a scope without items never reports, and the
        worker that holds it waits for ever. Nor may a worker be left with a single item, since it runs an item only
        when it knows the next one or that there is none.
        """

        def _split_scope(self, nodeid: str) -> str:
            return _LAW.sub("[", nodeid)

        def remove_node(self, node: Any) -> str | None:
            work = self.assigned_work.get(node, {})
            for scope in [scope for scope, items in work.items() if all(items.values())]:
                del work[scope]
            return super().remove_node(node)

        def _reschedule(self, node: Any) -> None:
            if node.shutting_down:
                return
            while self.workqueue and self._pending_of(self.assigned_work[node]) <= 2:
                self._assign_work_unit(node)
            if not self.workqueue:
                node.shutdown()

    return SweepScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    collector = config.stash[COLLECTOR]
    if not collector.expected or hasattr(config, "workerinput"):
        return
    from pathlib import Path

    from peftcheck import closing, record, terminal

    if not collector.sessions:  # the workers collected; the controller needs the library to shrink with
        for target, path in _targets(config):
            _session(config, target, path)
    session = next(iter(collector.sessions.values()), None)
    if session is None:
        return
    run, collector.unvouched = closing.assemble(
        session, collector.results, list(collector.expected), collector.died, collector.calibration, collector.started
    )
    path = _option(config, "record")
    if path:
        record.write(run, Path(path))  # before shrinking, which runs the library again
    collector.record = closing.with_shrunk(session, run)
    if path:
        record.write(collector.record, Path(path))
    for line in terminal.summary(collector.record):
        terminalreporter.write_line(line)


def _targets(config: pytest.Config) -> list[tuple[str, str | None]]:
    target = _option(config, "implementation")
    return [(target, None)] if target else []
