"""Variants that are like another take turns in the quick profile, and are asked whenever they are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peftcheck import law, selection, suite
from peftcheck.implementations.reference import Reference
from peftcheck.session import Session, Settings


class Alike(Reference):
    """The reference, with five more variants that are like its first."""

    def variants(self):
        own = super().variants()
        first = own["lora"]
        return {**own, **{f"lora.{n}": replace(first, name=f"lora.{n}", like="lora") for n in range(5)}}


LIBRARY = Alike()
EVERY = suite.cells(LIBRARY, law.laws("merge.oracle"), suite.Filters(layer=("linear",), dtype=("float32",)))


def taken(seed: int, groups: frozenset[str]) -> set[str]:
    return {cell.sweep.variant for cell in selection.in_turn(EVERY, LIBRARY, groups, seed)}


def test_all_others_are_always_asked_and_three_seeds_in_a_row_ask_all():
    own, likes = set(Reference().variants()), {f"lora.{n}" for n in range(5)}
    runs = [taken(seed, frozenset({"likes"})) for seed in (4, 5, 6)]
    assert all(own <= run for run in runs)
    assert [len(run & likes) for run in runs] != [5, 5, 5] and set().union(*runs) == own | likes
    assert sum(len(run & likes) for run in runs) == len(likes), "none of them twice"


def test_without_turns_all_are_asked():
    assert taken(0, frozenset()) == set(LIBRARY.variants())


def test_a_variant_that_is_named_is_asked_whatever_the_seed():
    pytest.importorskip("peft")
    named = suite.Filters(law=("merge.oracle",), variant=("hira.pattern",), layer=("linear",))
    for seed in range(3):
        assert len(Session(Settings("peft", filters=named, seed=seed)).cells) == 1
