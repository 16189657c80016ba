"""Values: functions of seed, role and coordinates; profiles that are what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcheck import values
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.rounding import DTYPES, precision, quantum_of

SPEC = LayerSpec("l", "linear", 64, 48)
HINTS = ("factor", "scale", "rotation", "magnitude", "projection")
# a single element, and a density that fits the fan-in, look at the whole shape
SHAPED = {"onehot"}


def case(profile: str, dtype: str = "float32", seed: int = 1, adapter_dtype: str | None = None) -> Case:
    adapters = (AdapterSpec("a", (0,), 4), AdapterSpec("b", (0,), 4))
    return Case(Sweep("none", "lora", "linear", dtype), 0, 0, (SPEC,), adapters, adapter_dtype or dtype, profile, seed)


PROFILES = sorted({*values.PROFILES, *getattr(values, "PROFILES_OF_SEVERAL", {})})
shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=150)
@given(
    profile=st.sampled_from(PROFILES),
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=shapes,
    more=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    hint=st.sampled_from(HINTS),
)
def test_a_smaller_shape_keeps_the_values_that_it_still_has(profile, dtype, shape, more, seed, hint):
    larger, here = tuple(extent + more for extent in shape), case(profile, dtype, seed)
    corner = tuple(slice(0, extent) for extent in shape)
    assert torch.equal(values.base(here, SPEC, "weight", larger)[corner], values.base(here, SPEC, "weight", shape))
    assert torch.equal(values.activations(here, SPEC, larger)[corner], values.activations(here, SPEC, shape))
    assert torch.equal(values.indices(here, SPEC, larger)[corner], values.indices(here, SPEC, shape))
    if profile not in SHAPED:
        whole = values.adapter(here, 0, "l", "x", larger, hint)
        assert torch.equal(whole[corner], values.adapter(here, 0, "l", "x", shape, hint))


@pytest.mark.parametrize("profile", PROFILES)
def test_values_do_not_depend_on_where_in_memory_they_stand(profile):
    """Vectorized functions may round the tail of an array otherwise than its body: a shrunk case would change."""
    if profile not in SHAPED:
        for hint in HINTS:
            whole = values.adapter(case(profile), 0, "l", "x", (70,), hint)
            for size in range(1, 70):
                assert torch.equal(whole[:size], values.adapter(case(profile), 0, "l", "x", (size,), hint)), hint


def test_values_differ_by_seed_adapter_site_and_role():
    def of(seed=1, index=0, site="l", role="A"):
        return values.adapter(case("normal", seed=seed), index, site, role, (4, 4), "factor")

    tensors = [of(), of(seed=2), of(index=1), of(site="l1"), of(role="B"), of(index=11), of(site="l|A", role="")]
    for i, a in enumerate(tensors):
        assert torch.equal(a, tensors[i]) and all(not torch.equal(a, b) for b in tensors[:i])
    base = values.base(case("normal"), SPEC, "weight", (4, 4))
    assert not torch.equal(base, values.base(case("normal"), SPEC, "bias", (4, 4)))
    assert not torch.equal(base, values.base(case("normal"), replace(SPEC, name="m"), "weight", (4, 4)))


def test_a_tied_layer_has_the_values_of_the_one_that_it_shares():
    tied = replace(SPEC, name="m", tied="l")
    assert torch.equal(*(values.base(case("normal"), spec, "weight", (4, 4)) for spec in (SPEC, tied)))


def test_uniform_values_are_uniform_and_unrelated_to_their_neighbours():
    x = values.uniform("k", (200, 100))
    assert bool(((x > 0) & (x < 1)).all())
    assert len(x.unique()) == x.numel()
    counts = torch.histc(x, bins=20, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi-square with 19 degrees of freedom, p = 0.0007
    centred = x - 0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[1:, 1:], centred[:-1, :-1])):
        assert abs(float((a * b).mean()) * 12) < 4 / math.sqrt(a.numel())


def test_normal_values_are_normal():
    x = values.normal("k", (200, 100))
    assert abs(float(x.mean())) < 0.03 and abs(float(x.var()) - 1) < 0.05
    assert abs(float((x**4).mean()) - 3) < 0.3
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("profile", PROFILES)
def test_all_values_are_finite_when_stored(profile, dtype):
    here = case(profile, dtype)
    tensors = [values.base(here, SPEC, "weight", (48, 64)), values.activations(here, SPEC, (8, 64))]
    tensors += [values.adapter(here, 0, "l", hint, (16, 64), hint) for hint in HINTS]
    for tensor in tensors:
        assert tensor.dtype == torch.float64
        assert bool(tensor.to(DTYPES[dtype]).isfinite().all())


def factor(profile: str, hint: str = "factor", dtype: str = "float32", index: int = 0) -> torch.Tensor:
    return values.adapter(case(profile, dtype), index, "l", "x", (16, 24), hint)


def test_the_zero_profile_does_nothing():
    assert not factor("zero").any() and not factor("zero", "rotation").any()
    assert bool((factor("zero", "scale") == 1).all())


def test_every_other_profile_does_something():
    for profile in set(values.PROFILES) - values.NO_EFFECT:
        assert factor(profile).any(), profile
        assert bool((factor(profile, "scale") != 1).any()), profile
        assert bool((factor(profile, "magnitude") > 0).all()), profile


def test_one_hot_is_one_element():
    assert int((factor("onehot") != 0).sum()) == 1
    assert int((factor("onehot", "scale") != 1).sum()) == 1
    assert values.adapter(case("onehot"), 0, "l", "x", (0, 4), "factor").shape == (0, 4)


def test_duplicated_adapters_are_equal_and_others_not():
    assert torch.equal(factor("duplicated", index=0), factor("duplicated", index=1))
    assert not torch.equal(factor("normal", index=0), factor("normal", index=1))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_profiles_reach_the_ends_of_the_range(dtype):
    numbers = precision(DTYPES[dtype])
    huge = values.base(case("huge", dtype), SPEC, "weight", (48, 64)).abs().max()
    assert numbers.largest / 2**14 < float(huge) < numbers.largest / 16
    tiny = values.base(case("subnormal", dtype), SPEC, "weight", (48, 64)).to(DTYPES[dtype]).abs()
    smallest = torch.finfo(DTYPES[dtype]).tiny
    assert bool((tiny < smallest).any()) and bool((tiny > smallest).any())
    graded = values.base(case("graded", dtype), SPEC, "weight", (48, 64)).abs().amax(1)
    assert float(graded.max() / graded.min()) > (1e2 if dtype == "float16" else 1e6)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_small_deltas_are_below_half_a_unit_in_the_last_place(dtype):
    a = values.adapter(case("small", dtype), 0, "l", "A", (1, 24), "factor")
    b = values.adapter(case("small", dtype), 0, "l", "B", (16, 1), "factor")
    delta, weight = (b @ a).abs().median(), values.base(case("small", dtype), SPEC, "weight", (16, 24)).abs().median()
    assert float(delta) < precision(DTYPES[dtype]).u * float(weight)
    large = values.adapter(case("large", dtype), 0, "l", "A", (1, 24), "factor")
    assert float(large.abs().median()) > 2 * float(weight)


def test_extreme_scales_come_near_zero_in_both_signs_and_never_reach_it():
    scales = values.adapter(case("extreme"), 0, "l", "x", (400,), "scale")
    assert float(scales.abs().min()) < 3e-3 and bool((scales < 0).any()) and bool((scales > 0).any())
    assert bool((scales.half() != 0).all())


def test_dyadic_values_are_small_integers_and_powers_of_two():
    weight = values.base(case("dyadic"), SPEC, "weight", (48, 64))
    assert quantum_of(weight) == 1 and float(weight.abs().max()) == 3
    assert set(factor("dyadic").unique().tolist()) == {-1.0, 0.0, 1.0}
    exponents = torch.frexp(factor("dyadic", "scale"))[0].abs()
    assert bool((exponents == 0.5).all())
    inputs = values.activations(case("dyadic"), SPEC, (50, 64))
    assert set(inputs.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert 2 < float(inputs.abs().sum(1).mean()) < 6  # so few products that bf16 can hold their sum


def test_indices_are_those_of_the_table():
    ids = values.indices(case("normal"), replace(SPEC, kind="embedding", n_in=7), (400,))
    assert ids.dtype == torch.int64 and set(ids.tolist()) == set(range(7))
