"""The code is formatted and linted as pyproject.toml says."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff comes with the extra 'dev'")
@pytest.mark.parametrize(
    "asked", [("check", "--no-cache", "-q"), ("format", "--check", "--no-cache", "-q")], ids=["lint", "format"]
)
def test_nothing_is_found(asked):
    command = [sys.executable, "-m", "ruff", *asked, "peftcheck", "suites"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
