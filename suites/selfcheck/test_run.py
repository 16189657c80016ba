"""`peftcheck run` end to end: exit codes, crashes and hangs, parallel equals serial, errors for people."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftcheck import record as records

HERE = Path(__file__).parent
REFERENCE = "peftcheck.implementations.reference:Reference"


def peftcheck(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    environment.pop("PYTEST_ADDOPTS", None)
    for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[name]
    command = [sys.executable, "-m", "peftcheck.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def run(folder: Path, target: str, *arguments: str) -> tuple[int, records.Record, str]:
    path = folder / "record.json"
    found = peftcheck(folder, "run", target, "--record", str(path), "--html", str(folder / "report.html"), *arguments)
    assert path.exists(), found.stdout + found.stderr
    return found.returncode, records.read(path), found.stdout


def test_clean_run_is_green_and_writes_record_and_report_under_reports(tmp_path):
    found = peftcheck(tmp_path, "run", REFERENCE, "--variant", "ia3*", "--layer", "linear", "-n", "1")
    assert found.returncode == 0, found.stdout + found.stderr
    written = sorted(path.suffix for path in (tmp_path / "reports").iterdir())
    assert written == [".html", ".json"]
    assert "0 vacuous" in found.stdout


def test_serial_parallel_and_filtered_runs_agree(tmp_path):
    filters = ("--variant", "lora", "--variant", "ia3", "--layer", "linear", "--layer", "conv2d")
    runs = {"serial": ("-n", "1"), "parallel": ("-n", "2"), "filtered": ("-n", "1", "--law", "merge.drift")}
    found = {}
    for name, how in runs.items():
        folder = tmp_path / name
        folder.mkdir()
        found[name] = run(folder, REFERENCE, *filters, *how)[1]
    assert records.comparable(found["serial"]) == records.comparable(found["parallel"])
    assert found["serial"].totals["run"] > 100
    ratios = {cell.id: (cell.ratio, cell.cases) for cell in found["serial"].cells}
    part = {cell.id: (cell.ratio, cell.cases) for cell in found["filtered"].cells}
    assert len(part) > 3 and part.items() <= ratios.items()


@pytest.mark.parametrize("target, symptom", [("Crashing", "interpreter"), ("Hanging", "Hung")])
def test_crash_or_hang_costs_its_own_case_only(tmp_path, target, symptom):
    laws = [part for law in ("merge.roundtrip", "merge.oracle", "forward.oracle") for part in ("--law", law)]
    filters = ("--variant", "lora", "--layer", "linear", "-n", "1", *laws)
    code, found, _ = run(tmp_path, f"hostile:{target}", *filters, "--", "--peftcheck-watchdog=2")
    assert code == 1
    red = {cell.id: cell for cell in found.cells if cell.status == "error"}
    assert red and all(cell.dtype == "float32" for cell in red.values())
    assert all(symptom in (cell.fingerprint or "") + (cell.message or "") for cell in red.values())
    assert "merge.roundtrip-lora-linear-float32" in red
    others = {cell.law: cell.status for cell in found.cells if cell.dtype == "float32" and cell.id not in red}
    assert others["merge.oracle"] == "pass" and others["forward.oracle"] == "pass"


def test_library_that_raises_at_attach_is_an_error_of_the_library(tmp_path):
    code, found, text = run(tmp_path, "hostile:Refusing", "--variant", "lora", "--layer", "linear", "-n", "1")
    assert code == 1
    assert {cell.status for cell in found.cells if cell.dtype == "float32"} <= {"error", "absent"}
    assert {cell.status for cell in found.cells if cell.dtype == "float64"} <= {"pass", "absent"}
    assert "broken at attach" in text


def test_state_that_leaks_between_laws_is_a_fault_of_the_harness_run(tmp_path):
    code, found, _ = run(
        tmp_path, "hostile:Leaking", "--variant", "lora", "--layer", "linear", "--law", "forward.oracle", "-n", "1"
    )
    red = next(cell for cell in found.cells if cell.dtype == "float32")
    assert red.status == "error" and "canary" in red.message
    assert code == 3
