"""What the README says is true: its table of laws, its commands, its map of the code."""

from __future__ import annotations

import re
from pathlib import Path

from peftcheck.cli import main
from peftcheck.law import laws
from peftcheck.listing import laws_markdown

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_laws_is_that_of_the_code():
    found = re.search(r"<!-- laws -->\n(.*?)\n<!-- /laws -->", README, re.S)
    assert found, "the README has no table of laws"
    assert found[1].strip() == laws_markdown(laws()).strip()


def test_first_mention_of_the_main_job_is_the_whole_command():
    line = next(line for line in README.splitlines() if "peftcheck run peft" in line)
    assert line.startswith("python3 -m venv") and "pip install" in line


def test_every_command_named_exists():
    for name in re.findall(r"^\| `peftcheck ([a-z]+)", README, re.M):
        assert name in main.commands, name


def test_every_module_on_the_map_exists():
    table = README[README.index("## A map of the code") :]
    for name in re.findall(r"`([a-z_/]+(?:\.py|/))`", table):
        assert (ROOT / "peftcheck" / name).exists() or (ROOT / name).exists(), name


def test_picture_of_the_report_exists():
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).exists(), name
