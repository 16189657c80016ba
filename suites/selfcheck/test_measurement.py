"""Ratios, the worst element, and bit equality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcheck.laws.merge import restored
from peftcheck.measurement import NOTHING, Measurement, broken, compare, identical, ratios, worst
from peftcheck.rounding import DTYPES

NAN, INF = math.nan, math.inf


def tensor(*values: float, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("residual", "budget", "ratio"),
    [
        (0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0),
        (1.0, 0.0, INF),
        (1.0, 2.0, 0.5),
        (0.0, INF, 0.0),
        (5.0, INF, 0),
        (INF, 1.0, INF),
    ],
)
def test_a_ratio_is_residual_over_budget(residual, budget, ratio):
    assert float(ratios(tensor(residual), tensor(budget))) == ratio


@pytest.mark.parametrize(("residual", "budget"), [(NAN, 1.0), (0.0, NAN), (NAN, NAN), (INF, INF), (NAN, 0.0)])
def test_a_ratio_that_means_nothing_is_nan_and_violates(residual, budget):
    assert math.isnan(float(ratios(tensor(residual), tensor(budget))))
    assert not Measurement(NAN, NAN, "w").holds


finite = st.floats(-1e3, 1e3)


@settings(deadline=None)
@given(st.lists(st.tuples(finite, finite, st.floats(0, 10)), min_size=1, max_size=8))
def test_a_comparison_holds_exactly_if_every_element_is_within_its_budget(rows):
    found, expected, budget = (tensor(*column) for column in zip(*rows, strict=True))
    measured = compare("l:weight", found, expected, budget)
    residual = (found - expected).abs()
    assert measured.holds == bool((residual <= budget).all() or (ratios(residual, budget) <= 1).all())
    assert measured.ratio == float(ratios(residual, budget).max())
    (at,) = measured.element
    assert float(ratios(residual, budget)[at]) == measured.ratio
    assert measured.residual == float(residual[at]) and measured.bound == float(budget[at])


def test_nan_is_the_worst_element_wherever_it_stands():
    found = tensor(9.0, NAN, 0.0)
    measured = compare("w", found, tensor(0.0, 0.0, 0.0), tensor(1.0, 1.0, 1.0))
    assert measured.element == (1,) and math.isnan(measured.ratio) and not measured.holds
    assert measured.symptom == "non-finite"


def test_equal_infinities_do_not_differ_and_opposite_ones_do():
    assert compare("w", tensor(INF), tensor(INF), tensor(0.0)).holds
    assert not compare("w", tensor(-INF), tensor(INF), tensor(1.0)).holds
    assert not compare("w", tensor(INF), tensor(1.0), tensor(1.0)).holds
    assert compare("w", tensor(INF), tensor(1.0), tensor(1.0)).symptom == "non-finite"


def test_half_precision_is_compared_in_fp64():
    found, expected = tensor(1.0, dtype=torch.bfloat16), tensor(1.0 + 2.0**-40)
    assert compare("w", found, expected, tensor(0.0)).residual == 2.0**-40


def test_a_budget_may_be_one_number_for_all():
    measured = compare("w", torch.ones(2, 3), torch.zeros(2, 3), tensor(4.0).reshape(()))
    assert measured.ratio == 0.25 and measured.element == (0, 0)
    assert compare("w", torch.ones(()), torch.zeros(()), torch.ones(())).element == ()


def test_shapes_that_differ_are_a_difference_of_shape():
    assert compare("w", torch.zeros(2), torch.zeros(1, 2), torch.ones(())).symptom == "shape"
    assert identical("w", torch.zeros(2), torch.zeros(3)).symptom == "shape"
    assert identical("w", torch.zeros(2), torch.zeros(2, dtype=torch.float16)).symptom == "dtype"


def test_an_empty_tensor_holds():
    measured = compare("l:weight", torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3))
    assert measured.holds and measured.role == "l:weight"


def test_a_negative_budget_is_an_error_of_the_harness():
    with pytest.raises(ValueError, match="negative budget"):
        compare("w", tensor(1.0), tensor(1.0), tensor(-1.0))


def test_what_a_documented_bound_explains_is_told_apart():
    found, due, budget, extra = tensor(3.0, 1.5), tensor(0.0, 0.0), tensor(1.0, 1.0), tensor(5.0, 5.0)
    explained = compare("w", found, due, budget, extra)
    assert explained.ratio == 3 and explained.beyond == 0.5 and explained.element == (0,)
    beyond = compare("w", found, due, budget, tensor(5.0, 0.25))
    assert beyond.ratio == 3 and beyond.beyond == 1.2 and beyond.element == (1,)
    within = compare("w", tensor(0.5, 0.0), due, budget, extra)
    assert within.ratio == within.beyond == 0.5


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.int64, torch.uint8])
def test_identical_means_every_bit(dtype):
    a = torch.arange(6).reshape(2, 3).to(dtype)
    assert identical("w", a, a.clone()).holds
    assert identical("w", a.t(), a.clone().t()).holds  # whatever the strides
    b = a.clone()
    b[1, 2] += 1
    found = identical("w", b, a, "written")
    assert not found.holds and found.element == (1, 2) and found.symptom == "written"


def test_identical_tells_zeros_apart_and_takes_nan_for_nan():
    assert not identical("w", tensor(-0.0), tensor(0.0)).holds
    assert identical("w", tensor(NAN, 1.0), tensor(NAN, 1.0)).holds
    assert not identical("w", tensor(NAN), tensor(1.0)).holds
    assert identical("w", torch.tensor(2.0), torch.tensor(2.0)).holds
    assert not identical("w", torch.tensor(2.0), torch.tensor(3.0)).holds


def test_the_worst_is_nan_then_what_goes_furthest_beyond_what_is_documented():
    small, large = Measurement(0.5, 0.5, "a"), Measurement(9.0, 0.9, "b")
    new, nan = Measurement(2.0, 2.0, "c"), Measurement(NAN, NAN, "d")
    assert worst([small, large]).role == "b"
    assert worst([small, new, large]).role == "c"
    assert worst([nan, new]).role == "d"
    assert worst([new, nan]).role == "d"
    assert worst([]) == NOTHING
    assert worst([broken("e", "shape", "no"), small]).ratio == INF


def test_a_round_trip_is_judged_where_there_is_a_way_back_and_nowhere_else():
    start, infinite = torch.tensor([1.0, 2.0]), torch.tensor([0.5, torch.inf])
    nan = torch.tensor([1.0, torch.nan])
    assert restored("w", nan, start, infinite).holds
    assert restored("w", nan, nan, infinite).holds
    assert not restored("w", nan.flip(0), start, infinite).holds
    assert not restored("w", torch.tensor([1.6, 2.0]), start, infinite).holds
    assert not restored("w", start + 1, start, torch.tensor([torch.nan, torch.inf])).holds
    assert restored("w", nan, start, torch.tensor([torch.inf, torch.inf])) is None
    assert restored("w", start[:1], start, infinite).symptom == "shape"
