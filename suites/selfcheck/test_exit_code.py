"""Exit codes: what is red is never green, and whose fault it is decides between 1 and 3."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_record import cell, record

from peftcheck.record import STATUSES, Record
from peftcheck.terminal import exit_code

GREEN = replace(cell("merge.oracle", "lora", "linear"), status="pass", fingerprint=None)


def run_of(**fields) -> Record:
    """Return a run of one green cell and one other."""
    return replace(record([GREEN]), cells=(GREEN, replace(GREEN, id="other", **fields)))


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("fingerprint", [None, "merge.oracle|lora|weight|numeric"])
def test_red_cells_of_the_library_are_one(status, fingerprint):
    # an error without fingerprint: a ledger's witness that fails otherwise, or a worker that died
    expected = 1 if status in ("violation", "error", "fixed") else 0
    assert exit_code(run_of(status=status, fingerprint=fingerprint), frozenset()) == expected


@pytest.mark.parametrize("status", ["error", "vacuous"])
def test_faults_of_the_harness_are_three(status):
    assert exit_code(run_of(status=status), frozenset({"other"})) == 3


def test_the_library_outweighs_the_harness():
    run = run_of(status="error")
    both = replace(run, cells=(*run.cells, replace(GREEN, id="third", status="violation")))
    assert exit_code(both, frozenset({"other"})) == 1


def test_nothing_run_is_three():
    assert exit_code(None, frozenset()) == 3
    assert exit_code(replace(run_of(), cells=()), frozenset()) == 3
