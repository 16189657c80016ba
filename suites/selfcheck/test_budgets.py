"""Round-trip budgets from both sides, by hand-made merges; `round_trips.py 10000` walks further by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from round_trips import LAYERS, Trip, cases, trips, twins

from peftcheck import budgets
from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.rounding import DTYPES, Bounded, leaf, precision

torch.set_num_threads(1)
HALF = ("bfloat16", "float16")


@cache
def walk(family: str, dtype: str, count: int) -> list[Trip]:
    drawn = (twin for case in cases(family, dtype, count) for twin in twins(family, case))
    return [trip for case in drawn for trip in trips(family, case)]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("family", sorted(LAYERS))
def test_round_trips_use_most_of_their_budgets_and_never_more(family, dtype):
    found = walk(family, dtype, 280)
    assert {trip.layer for trip in found} == set(LAYERS[family])
    for mixed in {trip.mixed for trip in found}:
        worst = max(trip.ratio for trip in found if trip.mixed is mixed and not trip.exact)
        assert 0.5 < worst <= 1
    exact = [trip for trip in found if trip.exact]
    assert len(exact) > 40 and all(trip.ratio == 0 for trip in exact)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_documented_divisor_stays_within_what_its_bound_adds(dtype):
    found = walk("scaling", dtype, 280)
    worst = max(trip.documented for trip in found)
    assert worst <= 1
    if dtype in ("float32", "float64"):  # where 1e-8 shows
        assert worst > 0.5


@settings(deadline=None, max_examples=40)
@given(
    family=st.sampled_from(sorted(LAYERS)),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(1, 2**30),
    index=st.integers(0, 27),
)
def test_no_seed_exceeds_a_round_trip_budget(family, dtype, seed, index):
    *_, case = cases(family, dtype, index + 1, seed)
    for twin in twins(family, case):
        for trip in trips(family, twin):
            assert trip.ratio <= 1 and trip.documented <= 1


def one(a: float, b: float, base_dtype: str, adapter_dtype: str) -> tuple:
    """Return machine, sites and base of a 1x1 layer with delta b a."""
    store, own = DTYPES[base_dtype], DTYPES[adapter_dtype]
    m = machine(store, own, False)
    tensors = {role: leaf(torch.tensor([[value]], dtype=own)) for role, value in (("A", a), ("B", b))}
    return m, [Site(LayerSpec("l", "linear", 1, 1), AdapterSpec("a", (0,), 1, 1.0), tensors)]


def test_a_mixed_round_trip_needs_the_rounding_of_the_delta():
    """W = -1, D = 1 + 2^-9 in fp32: M is what bf16 cannot subtract again, and the same-dtype budget is too small."""
    m, sites = one(1 + 2.0**-9, 1.0, "bfloat16", "float32")
    base = {"weight": leaf(torch.tensor([[-1.0]]))}
    delta = torch.tensor([[1 + 2.0**-9]])
    merged = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    merged += delta
    merged -= delta.to(torch.bfloat16)
    error = float((merged.double() + 1).abs())
    budget = float(budgets.roundtrip(m, FORMULAS["lora"], sites, base)["weight"])
    u = precision(torch.bfloat16).u
    apart = float(budgets.roundtrip(replace(m, adapter=m.base), FORMULAS["lora"], sites, base)["weight"])
    assert error <= budget <= u * (1 + 1.05 * (1 + 2.0**-9)) * 1.1
    assert apart < budget


def test_a_round_trip_through_a_far_larger_delta_may_lose_the_weight():
    m, sites = one(2.0**12, 2.0**12, "float32", "float32")
    weight = torch.tensor([[1.49]])
    merged = weight + 2.0**24
    lost = float(((merged - 2.0**24).double() - weight.double()).abs())
    budget = float(budgets.roundtrip(m, FORMULAS["lora"], sites, {"weight": leaf(weight)})["weight"])
    assert lost > 0.4
    assert 0.25 * budget <= lost <= budget


def test_the_bias_has_a_budget_of_its_own_where_the_adapter_has_one():
    m, sites = one(1.0, 0.3, "float32", "float32")
    tensors = {**sites[0].tensors, "B.bias": leaf(torch.tensor([0.7]))}
    sites = [replace(sites[0], tensors=tensors)]
    base = {"weight": leaf(torch.tensor([[1.1]])), "bias": leaf(torch.tensor([5.0]))}
    budget = budgets.roundtrip(m, FORMULAS["lora"], sites, base)
    assert set(budget) == {"weight", "bias"}
    assert float(budget["bias"]) == pytest.approx(2.0**-24 * (5.7 + 5.0), rel=1e-5)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_subnormal_product_needs_the_eta_terms(dtype):
    numbers = precision(DTYPES[dtype])
    m = machine(numbers.dtype, numbers.dtype, False)
    s, weight = 2.0**-10, torch.tensor([[1.25 * 2.0**9 * numbers.eta]], dtype=numbers.dtype)
    gain = {"scale": leaf(torch.tensor([s], dtype=numbers.dtype))}
    sites = [Site(LayerSpec("l", "linear", 1, 1), AdapterSpec("a", (0,)), gain)]
    budget = float(budgets.roundtrip(m, FORMULAS["ia3"], sites, {"weight": leaf(weight)})["weight"])
    back = (weight * s) / s
    error = float((back.double() - weight.double()).abs())
    relative = 2.1 * numbers.u * float(weight.double().abs())
    assert relative < error <= budget
    assert error >= 0.25 * budget


def test_a_zero_scale_has_no_way_back():
    m = machine(torch.float32, torch.float32, False)
    sites = [Site(LayerSpec("l", "linear", 1, 1), AdapterSpec("a", (0,)), {"scale": leaf(torch.zeros(1))})]
    budget = budgets.roundtrip(m, FORMULAS["ia3"], sites, {"weight": leaf(torch.ones(1, 1))})["weight"]
    assert bool(budget.isinf().all())


def test_budgets_are_zero_where_nothing_rounds_and_only_there():
    m = machine(torch.bfloat16, torch.bfloat16, True)
    factor = {"A": leaf(torch.tensor([[2.0]]), True), "B": leaf(torch.tensor([[1.0]]), True)}
    sites = [Site(LayerSpec("l", "linear", 1, 1), AdapterSpec("a", (0,)), factor)]
    exact = {"weight": leaf(torch.tensor([[3.0]]), True)}
    assert float(budgets.roundtrip(m, FORMULAS["lora"], sites, exact)["weight"]) == 0
    wide = {"weight": leaf(torch.tensor([[255.0]]), True)}  # 257 needs nine bits
    assert float(budgets.roundtrip(m, FORMULAS["lora"], sites, wide)["weight"]) > 0
    unproved = {"weight": Bounded(torch.tensor([[3.0]], dtype=torch.float64))}
    assert float(budgets.roundtrip(m, FORMULAS["lora"], sites, unproved)["weight"]) > 0
