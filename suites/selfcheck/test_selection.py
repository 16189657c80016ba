"""Which cells a profile takes: what takes turns, so that a few seeds together visit every cell."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from peftcheck import law, quantizers, selection, suite
from peftcheck.case import LAYERS, MODELS, Sweep
from peftcheck.implementation import load
from peftcheck.implementations.reference import Reference
from peftcheck.rounding import DTYPES
from peftcheck.selection import PROFILES
from peftcheck.session import Session, Settings
from peftcheck.suite import Cell

REFERENCE = Reference()
LOGIC = frozenset(one.name for one in law.laws() if one.logic)
COMBINE = frozenset({"combine"})


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("peft")
    return load("peft")


def in_turn(cells, implementation, groups, seed):
    return selection.in_turn(cells, implementation, LOGIC, groups, seed)


def test_variants_and_dtypes_take_turns_and_seeds_in_a_row_visit_every_combination():
    every = suite.cells(REFERENCE, law.laws("combine.single", "merge.oracle"), suite.Filters())
    found = [in_turn(every, REFERENCE, COMBINE, seed) for seed in range(24)]
    kinds = [[cell for cell in one if cell.kind] for one in found]
    assert set().union(*kinds) == {cell for cell in every if cell.kind}
    for one in found:
        assert [cell for cell in one if not cell.kind] == [cell for cell in every if not cell.kind]
    assert {cell.sweep.dtype for cell in kinds[0]} == set(DTYPES)


def test_no_kind_leaves_out_a_layer_for_the_turns_and_few_variants_have_theirs(peft):
    every = [cell for cell in suite.cells(peft, law.laws("combine.single"), suite.Filters()) if cell.kind]
    variants: dict[tuple, set[str]] = {}
    for cell in every:
        variants.setdefault((cell.kind, cell.sweep.layer), set()).add(cell.sweep.variant)
    for seed in range(12):
        counts = Counter((cell.kind, cell.sweep.layer) for cell in in_turn(every, peft, COMBINE, seed))
        assert counts.keys() == variants.keys()
        assert all(count <= math.ceil(len(variants[place]) / 6) for place, count in counts.items())


def test_each_layer_of_a_variant_is_asked_in_a_wide_and_in_a_half_dtype(peft):
    every = suite.cells(peft, law.laws("merge.oracle", "state.save_load"), suite.Filters(layer=("linear", "conv?d")))
    every = [cell for cell in every if cell.sweep.quantizer is None]
    found = [in_turn(every, peft, frozenset({"dtypes"}), seed) for seed in range(8)]
    assert set().union(*found) == set(every)
    for one in found:
        asked = {}
        for cell in one:
            asked.setdefault((cell.law, cell.sweep.variant, cell.sweep.layer), []).append(cell.sweep.dtype)
        for (name, variant, _), dtypes in asked.items():
            own = peft.variants()[variant].dtypes
            wide, half = own & {"float64", "float32"}, own & {"bfloat16", "float16"}
            assert len(dtypes) == (1 if name in LOGIC else bool(wide) + bool(half)), (name, variant)
            assert len(set(dtypes) & wide) <= 1 and len(set(dtypes) & half) <= 1


def test_layers_that_a_variant_must_refuse_take_no_turns(peft):
    every = suite.cells(peft, law.laws("refuse.attach"), suite.Filters(variant=("lora",)))
    every = [cell for cell in every if cell.sweep.layer not in MODELS]
    assert every and in_turn(every, peft, PROFILES["quick"].turns, 3) == every


def test_on_a_quantizer_a_variant_is_asked_in_one_dtype_after_the_other(peft):
    every = suite.cells(
        peft, law.laws("quantize.merge_budget", "quantize.refuses"), suite.Filters(variant=("lora", "boft"))
    )
    every = [cell for cell in every if cell.sweep.quantizer]
    found = [in_turn(every, peft, frozenset({"quantized"}), seed) for seed in range(3)]
    assert set().union(*found) == set(every)
    for one in found:
        places = [(cell.law, cell.sweep.variant, cell.sweep.quantizer) for cell in one]
        assert len(places) == len(set(places))
        assert set(places) == {(cell.law, cell.sweep.variant, cell.sweep.quantizer) for cell in every}
        assert len({cell.sweep.dtype for cell in one}) > 1


def test_who_names_laws_or_a_quantizer_gets_every_dtype(peft):
    for named in (suite.Filters(law=("quantize.drift",)), suite.Filters(quantizer=("bitsandbytes.nf4",))):
        asked = Session(Settings("peft", filters=replace(named, variant=("lora",)))).cells
        dtypes = {cell.sweep.dtype for cell in asked if cell.sweep.quantizer == "bitsandbytes.nf4"}
        assert dtypes == set(quantizers.DECLARED["bitsandbytes.nf4"].dtypes)


def test_the_order_of_cells_hangs_on_no_hash(peft):
    for variant in peft.variants().values():
        assert list(variant.quantizers) == [name for name in quantizers.DECLARED if name in variant.quantizers]


def test_a_filter_moves_no_turn_but_one_on_dtypes_lifts_them():
    laws = law.laws("combine.single")
    every = in_turn(suite.cells(REFERENCE, laws, suite.Filters()), REFERENCE, COMBINE, 0)
    narrow = suite.cells(REFERENCE, laws, suite.Filters(variant=("lora",), layer=("linear",), kind=("cat",)))
    assert in_turn(narrow, REFERENCE, COMBINE, 0) == [cell for cell in every if cell in narrow]
    filters = suite.Filters(law=("combine.single",), layer=("linear",), kind=("cat",))
    assert len(Session(Settings("peftcheck.implementations.reference:Reference", filters=filters)).cells) == 1
    every_dtype = replace(filters, variant=("lora",), dtype=("*",))
    assert len(Session(Settings("peftcheck.implementations.reference:Reference", filters=every_dtype)).cells) == len(
        DTYPES
    )


def test_a_cell_asks_for_the_cases_of_its_law_and_layer():
    named = {one.name: one for one in law.laws("merge.oracle", "state.save_load")}
    plain, whole = Sweep("peft", "lora", "linear", "float32"), Sweep("peft", "lora", "model.llama", "float32")
    full = PROFILES["full"]
    due = {
        (name, sweep.layer): full.cases(Cell(name, sweep), one)
        for name, one in named.items()
        for sweep in (plain, whole)
    }
    assert due["merge.oracle", "linear"] == (full.exact, full.native)
    assert due["merge.oracle", "model.llama"] == (full.heavy, full.heavy)
    assert due["state.save_load", "linear"] == (0, full.logic)
    assert due["state.save_load", "model.llama"] == (0, min(full.logic, full.heavy))
    assert all(sum(profile.cases(Cell(n, plain), one)) > 0 for profile in PROFILES.values() for n, one in named.items())


# variants that are like another


class Alike(Reference):
    """The reference, with five more variants that are like its first."""

    def variants(self):
        own = super().variants()
        first = own["lora"]
        return {**own, **{f"lora.{n}": replace(first, name=f"lora.{n}", like="lora") for n in range(5)}}


LIBRARY = Alike()
EVERY = suite.cells(LIBRARY, law.laws("merge.oracle"), suite.Filters(layer=("linear",), dtype=("float32",)))


def taken(seed: int, groups: frozenset[str]) -> set[str]:
    return {cell.sweep.variant for cell in in_turn(EVERY, LIBRARY, groups, seed)}


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


# whole models


def test_a_variant_is_asked_on_one_whole_model_at_every_second_seed_and_on_each_in_turn(peft):
    every = suite.cells(peft, law.laws("merge.oracle"), suite.Filters(layer=("model.*",), dtype=("float32",)))
    alone = {name for name, variant in peft.variants().items() if variant.layers & set(LAYERS)}
    every = [cell for cell in every if cell.sweep.variant in alone]
    found = [in_turn(every, peft, frozenset({"models"}), seed) for seed in range(2 * len(MODELS))]
    assert set().union(*found) == set(every)
    for one, after in pairwise(found):
        asked = [cell.sweep.variant for cell in one]
        assert len(asked) == len(set(asked)) and 0 < len(asked) < len({cell.sweep.variant for cell in every})
        assert not set(asked) & {cell.sweep.variant for cell in after}


def test_a_variant_that_only_whole_models_have_is_asked_whatever_the_seed():
    class Whole(Reference):
        def variants(self):
            return {"lora": replace(super().variants()["lora"], layers=frozenset(MODELS))}

    library = Whole()
    every = suite.cells(library, law.laws("merge.oracle"), suite.Filters(layer=("model.*",), dtype=("float32",)))
    found = [in_turn(every, library, frozenset({"models"}), seed) for seed in range(len(MODELS))]
    assert [len(one) for one in found] == [1] * len(MODELS) and set().union(*found) == set(every)
