"""Adoption in three lines: a small downstream project made and run here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "downstream"
PORT = """
from peftcheck.implementations.reference import Reference


class MyLibrary(Reference):
    name = "mylib"

    def variants(self):
        return {name: v for name, v in super().variants().items() if name in ("ia3", "lora")}
"""
BROKEN = """

    def attach(self, model, case):
        attached = super().attach(model, case)
        attached.unmerge = lambda: None
        return attached
"""


def project(folder: Path, broken: bool) -> Path:
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    (folder / "mylib").mkdir()
    (folder / "mylib" / "__init__.py").touch()
    (folder / "mylib" / "port.py").write_text(PORT + (BROKEN if broken else ""))
    (folder / "ledger.toml").touch()
    (folder / "tests" / "test_own.py").write_text(
        "import torch\n\ndef test_host_state():\n    assert torch.get_default_dtype() == torch.float32\n"
    )
    return folder


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_three_lines_adopt_the_suite(tmp_path, workers):
    found = pytest_in(project(tmp_path, False), "-n", workers, "-k", "linear-float32 or test_own")
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_broken_library_fails_with_law_case_and_token(tmp_path):
    folder = project(tmp_path, True)
    found = pytest_in(folder, "-k", "merge.roundtrip-ia3-linear-float64", "--peftcheck-record", "record.json")
    assert found.returncode == 1
    assert "peftcheck replay pc1." in found.stdout
    assert "merge.roundtrip-ia3-linear-float64" in found.stdout
    assert (folder / "record.json").exists()


def test_collecting_nothing_imports_no_torch(tmp_path):
    (tmp_path / "test_plain.py").write_text("import sys\n\ndef test_it():\n    assert 'torch' not in sys.modules\n")
    found = pytest_in(tmp_path)
    assert found.returncode == 0, found.stdout
