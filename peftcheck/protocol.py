"""How `peftcheck run` has pytest run a cell: in one step, with one report.

Its items are all alike and use no fixture but the check itself. Setting up and tearing down each of tens of thousands
of them, with logs captured and three reports sent from worker to controller, would take longer than the checks. In a
suite of its own (`parametrize`) an item goes through pytest's usual protocol.
"""

from __future__ import annotations

from typing import Any

import pytest

from peftcheck import plugin


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool:
    """Reach the verdict on the item's cell and report it; what is raised on the way is reported as pytest does."""
    call = pytest.CallInfo.from_call(lambda: plugin.verdict(item), when="call")
    if call.excinfo is None:
        report = _report(item, call)
    else:
        report = item.ihook.pytest_runtest_makereport(item=item, call=call)
    item.ihook.pytest_runtest_logreport(report=report)
    return True


def _report(item: pytest.Item, call: pytest.CallInfo[dict[str, Any]]) -> pytest.TestReport:
    plain = call.result
    status, message = plain["status"], plain["message"] or ""
    outcome, text = "failed", None
    if status in ("pass", "unsupported"):
        outcome = "passed"
    elif status in ("known", "absent"):
        outcome = "skipped"
        text = (str(item.path), 0, f"Skipped: {message}") if status == "absent" else message
    else:
        text = plugin.failure_text(plain)
    report = pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome=outcome,
        longrepr=text,
        when="call",
        duration=call.duration,
        start=call.start,
        stop=call.stop,
        user_properties=item.user_properties,
    )
    if status == "known":
        report.wasxfail = f"{plain['issue']}: {message}"
    return report
