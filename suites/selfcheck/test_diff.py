"""A comparison of two records says what broke, what is lost and what was repaired, and no more."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from sample_record import cell, defect, record, sample

from peftcheck.diff import diff, render_markdown, render_text, sentence
from peftcheck.errors import UsageError

HOLDS = cell("merge.oracle", "lora", "linear", ratio=0.4)
BREAKS = cell("merge.oracle", "lora", "linear", status="violation", ratio=90.0)
OTHER = cell("merge.drift", "lora", "linear", ratio=0.2)


def shown(found) -> str:
    """Return what a terminal shows."""
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(render_text(found))
    return console.file.getvalue()


def test_a_record_does_not_differ_from_itself():
    found = diff(sample(), sample())
    assert found.clean and found.exit_code == 0
    assert not (found.new or found.lost or found.worse or found.spread or found.fixed or found.halved or found.gained)
    assert "nothing got worse" in sentence(found)


def test_a_new_defect_is_told_once_not_once_a_cell():
    cells = [replace(BREAKS, id=f"c{i}", layer=f"l{i}") for i in range(5)]
    found = diff(record([replace(c, status="pass", ratio=0.4, fingerprint=None) for c in cells]), record(cells))
    assert [d.fingerprint for d in found.new] == [BREAKS.fingerprint]
    assert not found.worse and not found.spread and found.exit_code == 1


@pytest.mark.parametrize("status", ["violation", "error"])
def test_a_failing_cell_without_a_defect_is_new_too(status):
    bare = replace(BREAKS, status=status, fingerprint=None)
    found = diff(record([HOLDS]), record([bare]))
    (told,) = found.new
    assert told.cells == (bare.id,) and told.headline.endswith(bare.message) and not found.clean


def test_a_second_defect_in_a_cell_that_already_fails_is_new():
    other = defect([replace(BREAKS, fingerprint="merge.oracle/lora/crash")])
    found = diff(record([BREAKS]), record([BREAKS], [defect([BREAKS]), other]))
    assert [d.fingerprint for d in found.new] == ["merge.oracle/lora/crash"] and not found.clean


def test_a_known_issue_that_leaves_the_ledger_is_new_and_one_that_enters_is_listed():
    known = record([replace(BREAKS, status="known")])
    assert [d.status for d in diff(known, record([BREAKS])).new] == ["violation"]
    entered = diff(record([BREAKS]), known)
    assert entered.clean and len(entered.listed) == 1 and not entered.fixed
    assert diff(record([HOLDS]), known).clean


@pytest.mark.parametrize("before", ["violation", "known", "error"])
@pytest.mark.parametrize("after", ["pass", "fixed"])
def test_a_defect_whose_cells_hold_is_fixed(before, after):
    fixed = replace(BREAKS, status=after, ratio=0.5, fingerprint=BREAKS.fingerprint if after == "fixed" else None)
    found = diff(record([replace(BREAKS, status=before)]), record([fixed]))
    assert len(found.fixed) == 1 and found.clean


def test_listed_but_holding_that_breaks_again_is_new():
    assert diff(record([replace(BREAKS, status="fixed", ratio=0.4)]), record([BREAKS])).new


def test_what_is_no_longer_run_is_lost_and_not_fixed():
    old = record([BREAKS, OTHER])
    gone = diff(old, record([OTHER]))
    assert [c.cell for c in gone.lost] == [BREAKS.id] and not gone.fixed and gone.exit_code == 1
    for status in ("absent", "unsupported", "vacuous"):
        dropped = diff(old, record([replace(BREAKS, status=status, ratio=None, fingerprint=None), OTHER]))
        assert [(c.old, c.new) for c in dropped.lost] == [("violation", status)]
        assert not dropped.fixed and not dropped.clean


def test_another_symptom_is_a_new_defect_and_does_not_count_as_a_repair():
    found = diff(record([BREAKS]), record([replace(BREAKS, fingerprint="merge.oracle/lora/crash")]))
    assert [d.fingerprint for d in found.new] == ["merge.oracle/lora/crash"] and not found.fixed


def test_an_old_defect_in_a_cell_that_held_is_told():
    more = replace(BREAKS, id="more", layer="conv2d")
    held = replace(more, status="pass", ratio=0.3, fingerprint=None)
    found = diff(record([BREAKS, held]), record([BREAKS, more]))
    assert not found.new and [c.cell for c in found.spread] == ["more"] and not found.clean
    assert not found.worse


@pytest.mark.parametrize(
    "old, new, worse",
    [
        (0.4, 0.8, True),
        (0.4, 0.79, False),
        (0.0, 1e-9, True),
        (0.0, 0.0, False),
        (0.8, 0.4, False),
        (None, 0.9, False),
        (0.9, None, False),
    ],
)
def test_worse_is_twice_the_ratio(old, new, worse):
    found = diff(record([replace(HOLDS, ratio=old)]), record([replace(HOLDS, ratio=new)]))
    assert bool(found.worse) is worse and found.clean is not worse


def test_a_known_defect_that_grows_is_worse_up_to_nan():
    old = record([replace(BREAKS, status="known")])
    for ratio in (1e6, math.inf, math.nan):
        assert diff(old, record([replace(BREAKS, status="known", ratio=ratio)])).worse
    assert not diff(record([replace(BREAKS, ratio=math.nan)]), record([replace(BREAKS, ratio=math.nan)])).worse


@pytest.mark.parametrize("change", [dict(seed=5), dict(profile="full"), dict(peftcheck="9.9")])
def test_growth_decides_nothing_where_other_cases_were_drawn(change):
    old, new = record([HOLDS]), record([replace(HOLDS, ratio=0.9)], **change)
    found = diff(old, new)
    assert found.worse and found.clean and "other cases were drawn" in render_markdown(found)
    assert not diff(old, record([BREAKS], **change)).clean


def test_halved_headroom_is_told_and_is_no_failure():
    found = diff(record([cell("a.b", "v", "l", ratio=0.6)]), record([cell("a.b", "v", "l", ratio=0.81)]))
    assert [c.cell for c in found.halved] == ["a.b-v-l-float32"] and found.clean
    assert not diff(record([cell("a.b", "v", "l", ratio=0.6)]), record([cell("a.b", "v", "l", ratio=0.79)])).halved


def test_new_cells_are_counted():
    found = diff(record([HOLDS]), record([HOLDS, OTHER]))
    assert found.gained == (OTHER.id,) and found.clean and "1 cell not in the old record" in shown(found)


def test_two_libraries_are_not_compared():
    other = replace(record([HOLDS]).implementation, name="lycoris")
    with pytest.raises(UsageError, match="lycoris"):
        diff(record([HOLDS]), record([HOLDS], implementation=other))


def test_both_renderings_say_it_in_order():
    gone = replace(OTHER, id="was-here")
    found = diff(record([HOLDS, gone]), record([BREAKS]))
    for text in (shown(found), render_markdown(found)):
        assert text.index("New defects (1)") < text.index("Lost cells (1)")
        assert "was-here" in text
    assert "peft 0.21.2 to peft 0.21.2: 1 new defect, 1 lost cell." in shown(found)


def test_long_lists_are_cut_and_counted():
    cells = [replace(HOLDS, id=f"c{i:04}") for i in range(500)]
    found = diff(record(cells), record([]))
    assert len(found.lost) == 500
    for text in (shown(found), render_markdown(found)):
        assert "and 480 more" in text and "c0019" in text and "c0020" not in text


def test_names_steer_neither_terminal_nor_markdown():
    evil = replace(BREAKS, id="a|b`c\n[d](javascript:1)\x1b[2J[bold]", message="[red]x\x1b]0;t\x07 <script> @all | *b*",
                   fingerprint=None)  # fmt: skip
    found = diff(record([]), record([evil]))
    assert "\x1b" not in shown(found) and "[red]x" in shown(found)
    text = render_markdown(found)
    assert "<script>" not in text and "@all" not in text and "\x1b" not in text
    row = next(row for row in text.splitlines() if "x" in row and row.startswith("| `"))
    assert row.replace("\\|", "").count("|") == 5
