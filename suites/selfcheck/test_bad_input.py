"""Errors for people: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peftcheck.cli import main

REFERENCE = "peftcheck.implementations.reference:Reference"


def inside(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """Run a command in this process: for what must fail before any worker starts."""
    monkeypatch.chdir(folder)
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("run", REFERENCE, "--variant", "nonsense"), "unknown variant"),
        (("run", REFERENCE, "--law", "merge.nothing"), "unknown law"),
        (("run", REFERENCE, "--layer", "conv9d"), "unknown layer"),
        (("run", REFERENCE, "--dtype", "int3"), "unknown dtype"),
        (("run", REFERENCE, "--profile", "eager"), "unknown profile"),
        (("run", REFERENCE, "--shard", "3/2"), "shard"),
        (("run", "nosuchlibrary"), "unknown implementation"),
        (("run", "nosuchmodule:Thing"), "nosuchmodule"),
        (("run", REFERENCE, "--ledger", "nowhere.toml"), "no ledger"),
        (("run", REFERENCE, "--record", "record.txt"), ".json"),
        (("replay", "pc1.broken"), "broken token"),
        (("replay", "hello"), "not a token"),
        (("report", "nowhere.json", "-o", "x.html"), "nowhere.json"),
        (("diff", "nowhere.json", "nowhere.json"), "nowhere.json"),
        (("ledger", "add"), "give a token"),
        (("ledger", "check", "nosuchlibrary"), "unknown implementation"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(tmp_path, monkeypatch, arguments, word):
    found = inside(tmp_path, monkeypatch, *arguments)
    assert found.exit_code == 2
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1 and word in lines[0], found.stderr
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_malformed_ledger_is_exit_2(tmp_path, monkeypatch):
    (tmp_path / "ledger.toml").write_text("[[issue]]\nid = 'x'\nnonsense = 1\n")
    found = inside(tmp_path, monkeypatch, "run", REFERENCE, "--ledger", "ledger.toml")
    assert found.exit_code == 2
    assert "ledger.toml" in found.stderr and len(found.stderr.strip().splitlines()) == 1


def test_record_of_another_schema_is_exit_2(tmp_path, monkeypatch):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 99}))
    found = inside(tmp_path, monkeypatch, "report", str(path), "-o", str(tmp_path / "x.html"))
    assert found.exit_code == 2 and "schema" in found.stderr
    assert not (tmp_path / "x.html").exists()
