"""The generator: a pure function, every case valid, every dimension that real defects needed drawn."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from peftcheck import engine, generator, models, values
from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, LAYERS, Case, Sweep, decode, encode
from peftcheck.implementation import Variant, load
from peftcheck.rounding import DTYPES

VARIANT = Variant("lora", "lora", frozenset(LAYERS), options={"rslora": (False, True), "init": ("a", "b")})
COUNT = 400


def draw(layer: str, index: int, dtype: str = "float32", exact: bool = False, seed: int = 0) -> Case:
    return generator.draw(VARIANT, Sweep("none", "lora", layer, dtype), seed, index, exact)


@cache
def drawn(layer: str, dtype: str = "float32") -> tuple[Case, ...]:
    return tuple(draw(layer, index, dtype) for index in range(COUNT))


def digest() -> str:
    """Return a hash of cases and of every number in them."""
    state = hashlib.sha256()
    for layer in ("linear", "conv2d", "embedding"):
        for index in range(6):
            case = draw(layer, index, "bfloat16", exact=index % 2 == 1)
            state.update(encode(case, "merge.roundtrip").encode())
            for name, tensor in sorted(models.build(case).state_dict().items()):
                state.update(name.encode() + tensor.double().numpy().tobytes())
            for name, tensor in sorted(models.inputs(case).items()):
                state.update(name.encode() + tensor.double().numpy().tobytes())
    return state.hexdigest()


def test_cases_and_values_are_the_same_in_every_process():
    code = "import test_generator; print(test_generator.digest())"
    here = str(Path(__file__).parent)
    digests = {digest()}
    for salt in ("0", "4711"):
        paths = os.pathsep.join([here, *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_a_case_depends_on_its_own_index_and_seed_alone():
    alone = draw("conv2d", 17)
    assert [draw("conv2d", index) for index in range(18)][17] == alone
    torch.manual_seed(3)
    assert draw("conv2d", 17) == alone
    assert draw("conv2d", 18) != alone
    assert draw("conv2d", 17, seed=1) != alone
    assert draw("conv2d", 17, "float64") != alone


def test_values_do_not_depend_on_the_random_state_of_torch():
    case = draw("linear", 3)
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append({**models.build(case).state_dict(), **models.inputs(case)})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("layer", LAYERS)
def test_every_case_builds_runs_and_survives_its_token(layer, dtype):
    if layer == "conv1d-transformers":
        pytest.importorskip("transformers")
    with engine.pinned(), torch.no_grad():
        for index in range(60):
            case = draw(layer, index, dtype, exact=index % 4 == 3)
            assert decode(encode(case, "a.b")) == (case, "a.b")
            model, inputs = models.build(case), models.inputs(case)
            for spec in case.layers:
                weight = model.get_parameter(f"{spec.name}.in_proj_weight" if layer == "mha" else f"{spec.name}.weight")
                assert tuple(weight.shape) == spec.weight_shape and weight.dtype == DTYPES[dtype]
                assert bool(weight.isfinite().all())
            outputs = model(*(inputs[spec.name] for spec in case.layers))
            for output in outputs:
                assert output.numel() > 0 and output.dtype == DTYPES[dtype]
                assert bool(output.isfinite().all()), case.words()


@pytest.mark.parametrize("layer", LAYERS)
def test_adapters_stand_on_layers_that_exist_and_own_their_weight(layer):
    for case in drawn(layer):
        assert len({spec.name for spec in case.layers}) == len(case.layers)
        assert len({adapter.name for adapter in case.adapters}) == len(case.adapters) >= 1
        for adapter in case.adapters:
            assert adapter.targets and adapter.rank >= 1 and adapter.alpha != 0
            assert all(case.layers[target].tied is None for target in adapter.targets)
            assert {key for key, _ in adapter.options} == set(VARIANT.options)


def everywhere(kinds, predicate) -> None:
    for kind in kinds:
        assert any(predicate(case) for case in drawn(kind)), kind


def any_layer(predicate):
    return lambda case: any(predicate(spec) for spec in case.layers)


@pytest.mark.parametrize(
    "predicate",
    [
        lambda s: s.groups > 1,
        lambda s: s.groups == s.n_in == s.n_out > 1,  # depthwise
        lambda s: max(s.dilation) > 1,
        lambda s: any(t > k for t, k in zip(s.stride, s.kernel, strict=True)),
        lambda s: s.padding == "same" and max(s.kernel) > 1,
        lambda s: s.padding == "valid",
        lambda s: isinstance(s.padding, tuple) and max(s.padding) > 0,
        lambda s: s.padding_mode == "circular",
        lambda s: s.padding_mode == "reflect",
        lambda s: s.padding_mode == "replicate",
        lambda s: set(s.kernel) == {1},
        lambda s: all(e == (k - 1) * d + 1 for e, k, d in zip(s.size, s.kernel, s.dilation, strict=True)),
        lambda s: all(e > (k - 1) * d + 1 for e, k, d in zip(s.size, s.kernel, s.dilation, strict=True)),
        lambda s: s.bias,
        lambda s: not s.bias,
        lambda s: s.n_in == 1,
        lambda s: s.n_out == 1,
    ],
    ids=(
        "groups depthwise dilation stride same valid padded circular reflect replicate pointwise tight roomy bias bare "
        "one-in one-out"
    ).split(),
)
def test_convolutions_vary_in_all_that_they_have(predicate):
    everywhere(CONVOLUTIONS, any_layer(predicate))


def test_kernels_strides_and_dilations_are_not_always_square():
    def uneven(value) -> bool:
        return not isinstance(value, str) and len(set(value)) > 1

    for field in ("kernel", "stride", "dilation", "padding"):
        everywhere(("conv2d", "conv3d"), any_layer(lambda s, f=field: uneven(getattr(s, f))))


def test_linear_layers_reach_from_one_feature_to_a_fan_in_of_512():
    everywhere(["linear"], any_layer(lambda s: s.n_in == 512))
    for kind in ("linear", "conv1d-transformers", *EMBEDDINGS):
        everywhere([kind], any_layer(lambda s: s.n_in == 1))
        everywhere([kind], any_layer(lambda s: s.n_out == 1))
        everywhere([kind], any_layer(lambda s: s.n_in != s.n_out))
    everywhere(["linear"], any_layer(lambda s: s.bias))
    everywhere(["linear"], any_layer(lambda s: not s.bias))


def test_embeddings_are_padded_scaled_and_tied():
    everywhere(EMBEDDINGS, any_layer(lambda s: s.padding_idx is not None))
    everywhere(["embedding.scaled"], any_layer(lambda s: s.scale == 3.7))
    everywhere(("linear", *EMBEDDINGS), any_layer(lambda s: s.tied is not None))


def test_parameters_come_plain_and_stacked():
    everywhere(["parameter"], any_layer(lambda s: s.depth == 0))
    everywhere(["parameter"], any_layer(lambda s: s.depth > 1))


def prefixed(names: list[str]) -> bool:
    return any(a != b and b.startswith(a) for a in names for b in names)


@pytest.mark.parametrize(
    "predicate",
    [
        lambda c: prefixed([s.name for s in c.layers]),
        lambda c: prefixed([a.name for a in c.adapters]),
        lambda c: any("." in s.name for s in c.layers),
        lambda c: any(s.name.isdigit() for s in c.layers),
        lambda c: len(c.adapters) == 3,
        lambda c: len({a.targets for a in c.adapters}) > 1,
        lambda c: len(c.adapters) > 1 and not set(c.adapters[0].targets) & set(c.adapters[1].targets),
        lambda c: len({a.rank for a in c.adapters}) > 1,
        lambda c: len({a.options for a in c.adapters}) > 1,
        lambda c: any(a.alpha not in (a.rank, 1) for a in c.adapters),
        lambda c: len({t for a in c.adapters for t in a.targets}) < len(c.layers),
        lambda c: len({t for a in c.adapters for t in a.targets}) == len(c.layers) > 1,
        lambda c: any(a.rank > min(c.layers[t].n_in, c.layers[t].n_out) for a in c.adapters for t in a.targets),
        lambda c: c.safe and not c.joint,
        lambda c: c.joint and not c.safe,
        lambda c: c.cycles > 2,
    ],
    ids=(
        "layer-prefix adapter-prefix dotted digits three unlike-targets disjoint unlike-ranks unlike-options scaled "
        "bystander no-bystander overcomplete safe joint cycles"
    ).split(),
)
def test_models_and_adapters_vary_in_all_that_they_have(predicate):
    everywhere(("linear", *CONVOLUTIONS), predicate)


def test_inputs_come_in_every_rank():
    assert {len(case.batch) for case in drawn("linear")} == {0, 1, 2, 3}


def test_every_profile_and_poison_is_drawn_where_it_means_something():
    several = {case.profile for case in drawn("linear") if len(case.adapters) > 1}
    single = {case.profile for case in drawn("linear") if len(case.adapters) == 1}
    assert several | single == set(values.PROFILES) - {"dyadic"}
    assert "cancelling" not in several and "duplicated" not in single
    assert {case.poison.value for case in drawn("linear")} == {"nan", "inf", "-inf", "overflow", "tame"}
    assert len({case.poison.tensor for case in drawn("linear")}) > 30


def test_profiles_that_a_variant_avoids_are_not_drawn():
    shy = Variant("lora", "lora", frozenset(LAYERS), avoids=frozenset({"huge", "normal", "zero"}), most_adapters=1)
    cases = [generator.draw(shy, Sweep("none", "lora", "linear", "float32"), 0, index) for index in range(200)]
    assert not {"huge", "zero"} & {case.profile for case in cases}
    assert {len(case.adapters) for case in cases} == {1}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_bases_get_adapters_of_both_dtypes(dtype):
    assert {case.adapter_dtype for case in drawn("linear", dtype)} == {dtype, "float32"}


def test_other_bases_get_adapters_of_their_own_dtype():
    for dtype in ("float32", "float64"):
        assert {case.adapter_dtype for case in drawn("linear", dtype)} == {dtype}


def test_exact_cases_have_dyadic_values_and_scalings():
    for index in range(100):
        case = draw("conv2d", index, "bfloat16", exact=True)
        assert case.profile == "dyadic"
        for adapter in case.adapters:
            assert adapter.alpha / adapter.rank in (0.5, 1.0, 2.0) and adapter.rank in (1, 4, 16)


def test_a_variant_says_which_layers_and_adapters_it_admits():
    def admit(spec):
        return replace(spec, n_out=spec.n_in)

    def fit(adapter, layers, exact):
        return replace(adapter, rank=2)

    square = Variant("lora", "lora", frozenset(LAYERS), admit=admit, fit=fit, bias=True)
    for index in range(50):
        case = generator.draw(square, Sweep("none", "lora", "linear", "float32"), 0, index)
        assert all(spec.n_in == spec.n_out for spec in case.layers)
        assert {adapter.rank for adapter in case.adapters} == {2}
        assert all(spec.bias for spec in case.layers)


def test_some_embeddings_have_a_max_norm_which_moves_nothing_else():
    cases = [case for index in range(80) for case in [draw("embedding", index)]]
    norms = {spec.max_norm for case in cases for spec in case.layers}
    assert norms == {None, 1.25, 4.0}
    assert all(
        spec.max_norm is None for case in cases if case.profile in ("cancelling", "huge") for spec in case.layers
    )
    assert not any(spec.max_norm for index in range(40) for spec in draw("linear", index).layers)


def test_embeddings_that_share_a_weight_have_no_max_norm():
    """Each lookup would write to what the other has saved for its gradient: torch refuses the backward pass."""
    shared = [case for case in (draw("embedding", index) for index in range(200)) if any(s.tied for s in case.layers)]
    assert len(shared) > 5
    for case in shared:
        ends = {name for spec in case.layers if spec.tied for name in (spec.name, spec.tied)}
        assert all(spec.max_norm is None for spec in case.layers if spec.name in ends)


def test_layers_of_dear_methods_are_narrow_unless_the_block_is_wide():
    pytest.importorskip("peft")
    boft = load("peft").variants()["boft"]
    cases = [
        generator.draw(boft, Sweep("peft", "boft", "linear", "float32", "bitsandbytes.nf4"), 0, i) for i in range(60)
    ]
    assert {case.setting("blocksize") for case in cases} == {64, 128, 256, 512}
    for case in cases:
        assert all(spec.n_in <= max(256, case.setting("blocksize")) for spec in case.layers)
