"""Quantized merges: budgets from both sides, decoding, the published table, and laws that real defects break."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peftcheck import engine, generator, quantizers, suite
from peftcheck.budgets import grids
from peftcheck.case import LayerSpec, Sweep, decode, encode
from peftcheck.errors import UsageError
from peftcheck.implementation import Claim
from peftcheck.law import laws
from peftcheck.rounding import DTYPES, precision
from peftcheck.walk import Walk

torch.set_num_threads(1)
BITSANDBYTES = [name for name in quantizers.DECLARED if name.startswith("bitsandbytes.")]
OTHERS = [name for name in quantizers.DECLARED if name not in BITSANDBYTES]
SAFE = ("quantize.rejects", "quantize.atomic")
FLAT = ["bitsandbytes.nf4", "bitsandbytes.fp4"]


def quantizer_of(name: str) -> quantizers.Quantizer:
    """Return a quantizer; only those outside the extras of development may be missing."""
    if name in OTHERS:
        pytest.importorskip(quantizers.DECLARED[name].package)
    return quantizers.load(name)


def choices(name: str, index: int) -> dict:
    return {key: values[index % len(values)] for key, values in quantizers.DECLARED[name].options.items()}


def held(name: str, weight: torch.Tensor, setting: dict) -> nn.Module:
    """Return a quantized layer made from the weight (n, k)."""
    model, (n, k) = nn.Module(), weight.shape
    model.layer = nn.Linear(k, n, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        model.layer.weight.copy_(weight)
    quantizers.load(name).quantize(model, "layer", setting)
    return model.layer


def weights(family: int, n: int, k: int, seed: int) -> torch.Tensor:
    """Return fp64 weights of one of six families."""
    torch.manual_seed(seed)
    normal = torch.randn(n, k, dtype=torch.float64)
    return (
        normal,
        normal * 10.0 ** (4 * torch.rand(n, 1, dtype=torch.float64) - 3),
        normal.abs() + 1,
        (normal * 3).round() / 4,
        normal.sign() * torch.rand(n, k, dtype=torch.float64),
        normal * 1e-3,
    )[family]


def shape(name: str, setting: dict) -> tuple[int, int]:
    """Return a shape (n, k) of whole blocks."""
    return 32, max(64, setting.get("blocksize", 64))


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in quantizers.GRIDS for d in quantizers.DECLARED[n].dtypes])
def test_budget_is_not_exceeded_and_not_loose(name: str, dtype: str) -> None:
    quantizer = quantizer_of(name)
    worst = 0.0
    for index in range(36):
        setting = choices(name, index)
        n, k = shape(name, setting)
        weight = weights(index % 6, n, k, index).to(DTYPES[dtype])
        layer = held(name, weight, setting)
        dense = quantizer.values(layer).double()
        store = precision(quantizer.values(layer).dtype)
        exact = torch.zeros(n, k, dtype=torch.float64)
        bound = quantizer.budget(weight.double(), exact, setting, store, quantizer.chosen(layer))
        ratio = torch.where(dense == weight.double(), 0.0, (dense - weight.double()).abs() / bound)
        assert bool((ratio <= 1).all()), (index, float(ratio.max()))
        worst = max(worst, float(ratio.max()))
    assert worst > 0.9


@pytest.mark.parametrize("name", quantizers.GRIDS)
def test_budget_with_an_error_covers_every_weight_within_it(name: str) -> None:
    quantizer, setting = quantizer_of(name), choices(name, 0)
    n, k = shape(name, setting)
    store = precision(torch.float32)
    for seed in range(6):
        weight = weights(0, n, k, seed)
        chosen = quantizer.chosen(held(name, weight.float(), setting))
        error = 0.05 * torch.rand(n, k, dtype=torch.float64)
        wide = quantizer.budget(weight, error, setting, store, chosen)
        for _ in range(4):
            near = weight + error * (2 * torch.rand(n, k, dtype=torch.float64) - 1)
            own = quantizer.budget(near, torch.zeros_like(near), setting, store, chosen)
            assert bool((own <= wide * (1 + 1e-12)).all())


@pytest.mark.parametrize("name", quantizers.GRIDS)
def test_own_dequantization_is_what_codes_and_scales_say(name: str) -> None:
    quantizer = quantizer_of(name)
    for index in range(6):
        setting = choices(name, index)
        layer = held(name, weights(index, *shape(name, setting), seed=index).float(), setting)
        form = quantizer.decoded(layer)
        assert bool(((quantizer.values(layer).double() - form.value).abs() <= form.bound).all())
        assert bool((form.bound <= 1e-3 * form.value.abs().amax()).all())


@pytest.mark.parametrize("name", quantizers.GRIDS)
def test_a_proved_fixpoint_is_one(name: str) -> None:
    quantizer = quantizer_of(name)
    flat = name in ("bitsandbytes.int8", *FLAT)
    for index in range(12):
        setting = choices(name, index)
        layer = held(name, weights(index % 5, *shape(name, setting), seed=index).float(), setting)
        before = quantizer.values(layer)
        after = quantizer.values(held(name, before.detach(), setting))
        proved = quantizer.proved(layer, torch.float32)
        assert bool(proved.any()) is flat
        assert torch.equal(before[proved], after[proved])


def test_a_scale_made_for_half_a_code_too_few_inflates_what_it_requantizes() -> None:
    """The largest magnitude m of a group, where negative, may come back as -8 m / 7.5: merging nothing blows up."""
    quantizer, setting = quantizer_of("torchao.intx4"), choices("torchao.intx4", 0)
    start = weight = weights(0, *shape("torchao.intx4", setting), seed=0).float()
    for _ in range(40):
        weight = quantizer.values(held("torchao.intx4", weight, setting)).detach()
    assert float(weight.abs().max() / start.abs().max()) > 4


# The table of bitsandbytes' own tests for N(0, 1): mean absolute and mean relative error, as published, rounded.
PUBLISHED = {
    ("nf4", 64): (0.0728, 0.203),
    ("nf4", 128): (0.0768, 0.2153),
    ("nf4", 256): (0.0803, 0.2260),
    ("nf4", 512): (0.0835, 0.2360),
    ("fp4", 64): (0.0965, 0.2601),
}


@pytest.mark.parametrize(("kind", "block"), PUBLISHED)
def test_published_table_is_reproduced(kind: str, block: int) -> None:
    found, samples = torch.zeros(2, dtype=torch.float64), 30
    torch.manual_seed(0)
    for _ in range(samples):
        weight = torch.randn(1024, 1024)
        dense = (
            quantizers.load(f"bitsandbytes.{kind}")
            .decoded(held(f"bitsandbytes.{kind}", weight, {"blocksize": block}))
            .value
        )
        miss = (dense - weight.double()).abs()
        found += torch.stack([miss.mean(), (miss / (weight.abs().double() + 1e-8)).mean()]) / samples
    absolute, relative = PUBLISHED[kind, block]
    assert float(found[0]) == pytest.approx(absolute, abs=2e-4)
    assert float(found[1]) == pytest.approx(relative, abs=5e-4 if relative == 0.203 else 2e-4)  # three digits published


def test_double_quantization_costs_an_eighth_of_a_bit_more_than_half_a_byte() -> None:
    weight = torch.randn(512, 512)
    plain, double = (
        {
            key: t.numel() * t.element_size() * 8
            for key, t in quantizers.load(name).tensors(held(name, weight, {"blocksize": 64})).items()
        }
        for name in ("bitsandbytes.nf4", "bitsandbytes.nf4.double")
    )
    scales = sum(bits for key, bits in double.items() if key.startswith("weight.scale")) / weight.numel()
    assert plain["weight.scale"] / weight.numel() == 0.5
    assert scales == pytest.approx(0.127, abs=2e-4)
    assert plain["weight"] / weight.numel() == double["weight"] / weight.numel() == 4


def test_the_dynamic_map_is_the_librarys() -> None:
    import bitsandbytes

    ours, theirs = grids.dynamic_map(), bitsandbytes.functional.create_dynamic_map().double()
    assert len(ours) == 256
    assert float((ours - theirs).abs().max()) < 1e-7
    assert pytest.approx(0.00703125) == grids.HALF_GAP


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=70), st.integers(-20, 20), st.sampled_from(["nf4", "fp4"]))
def test_codebook_budget_against_the_nearest_code_in_exact_arithmetic(
    values: list[float], exponent: int, kind: str
) -> None:
    from fractions import Fraction

    from peftcheck.quantizers.bitsandbytes import _sorted

    code = _sorted(kind)
    tensor = torch.tensor([v * 2.0**exponent for v in values], dtype=torch.float64).reshape(1, -1)
    bound = grids.codebook(tensor, torch.zeros_like(tensor), code, 64, precision(torch.float32)).reshape(-1)
    exact = [Fraction(float(c)) for c in code]
    for start in range(0, len(values), 64):
        block = [Fraction(float(v)) for v in tensor.reshape(-1)[start : start + 64]]
        scale = max(abs(v) for v in block)
        for offset, value in enumerate(block):
            nearest = min(abs(value - c * scale) for c in exact)
            assert nearest <= Fraction(float(bound[start + offset]))


def test_a_coarser_grid_costs_more() -> None:
    weight, zero = weights(0, 32, 64, 0), torch.zeros(32, 64, dtype=torch.float64)
    costs = []
    for name in ("bitsandbytes.int8", "bitsandbytes.nf4", "bitsandbytes.fp4"):
        setting = {"blocksize": 64}
        costs.append(float(quantizers.load(name).budget(weight, zero, setting, precision(torch.float32)).mean()))
    assert costs == sorted(costs)
    assert 8 < costs[1] / costs[0] < 20


# the laws on PEFT


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peftcheck.implementations.peft").Peft()


def case_of(implementation, variant: str, quantizer: str, dtype: str = "float32", index: int = 0):
    return generator.draw(
        implementation.variants()[variant], Sweep("peft", variant, "linear", dtype, quantizer), 0, index
    )


NUMBERS = laws(
    "quantize.merge_budget", "quantize.roundtrip_budget", "quantize.drift", "quantize.zero_delta", "quantize.effect"
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantizer", BITSANDBYTES)
def test_lora_merges_within_the_grids_budget(peft, quantizer: str, dtype: str) -> None:
    worst = {}
    for index in range(6):
        for outcome in engine.check(peft, case_of(peft, "lora", quantizer, dtype, index), NUMBERS):
            assert not outcome.failed, (outcome.law, outcome.message)
            if outcome.measurement:
                worst[outcome.law] = max(worst.get(outcome.law, 0.0), outcome.measurement.ratio)
    assert worst["quantize.merge_budget"] > 0.75


def test_a_quantized_case_survives_its_token(peft) -> None:
    case = case_of(peft, "lora", "bitsandbytes.nf4")
    assert decode(encode(case, "quantize.drift")) == (case, "quantize.drift")
    assert quantizers.settings_of(case)["blocksize"] in (64, 128, 256, 512)


def test_a_quantized_base_is_put_back_between_laws(peft) -> None:
    case = case_of(peft, "lora", "bitsandbytes.nf4")
    alone = engine.check(peft, case, laws("quantize.merge_budget"))
    among = engine.check(peft, case, laws("quantize.*"))
    assert repr(alone[0].measurement) == repr(next(o for o in among if o.law == "quantize.merge_budget").measurement)


def test_cells_of_quantizers_hold_the_quantize_group_only(peft) -> None:
    found = suite.cells(peft, laws(), suite.Filters(variant=("lora", "loha")))
    coded = [cell for cell in found if cell.sweep.quantizer]
    assert {cell.law.partition(".")[0] for cell in coded} == {"quantize"}
    assert not [cell for cell in found if cell.law.startswith("quantize.") and not cell.sweep.quantizer]
    assert {c.law for c in coded if c.sweep.variant == "loha"} == {"quantize.refuses"}
    merged = {c.sweep.quantizer for c in coded if c.sweep.variant == "lora" and c.law == "quantize.merge_budget"}
    assert merged == {name for name in quantizers.GRIDS if not name.startswith("quanto.")}


def test_what_is_not_installed_is_absent(peft, monkeypatch) -> None:
    monkeypatch.setattr(quantizers, "absence", lambda name: "not installed: hqq")
    (law,) = laws("quantize.drift")
    walk = Walk(peft, Sweep("peft", "lora", "linear", "float32", "hqq.4"), {law.name: law}, suite.PROFILES["quick"], 0)
    result = walk.run()[law.name]
    assert result.state == "absent"
    assert "hqq" in result.message
    with pytest.raises(UsageError, match="needs the package 'hqq'"):
        quantizers.load("hqq.4")


def test_an_unknown_quantizer_is_named() -> None:
    with pytest.raises(UsageError, match="unknown quantizer 'gguf'"):
        quantizers.load("gguf")


def test_declaring_quantizers_imports_none_of_them() -> None:
    code = (
        "import sys, peftcheck.suite, peftcheck.quantizers, peftcheck.laws;"
        "print([m for m in ('bitsandbytes', 'torchao', 'hqq', 'optimum') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_method_that_adds_to_codes_violates(peft) -> None:
    (outcome,) = engine.check(peft, case_of(peft, "supertuning", "bitsandbytes.int8"), laws("quantize.refuses"))
    assert outcome.failed
    assert "by way of its codes" in outcome.message


def test_a_discarded_merge_is_named_as_that(peft) -> None:
    quantizer_of("quanto.qint8")
    (outcome,) = engine.check(peft, case_of(peft, "lora", "quanto.qint8"), laws("quantize.refuses"))
    assert outcome.failed
    assert "discarded" in outcome.message


def test_a_method_that_refuses_holds(peft) -> None:
    (outcome,) = engine.check(peft, case_of(peft, "glora", "bitsandbytes.int8"), laws("quantize.refuses"))
    assert outcome.measurement.holds


def test_overflow_inside_the_quantizers_own_cast_is_found(peft) -> None:
    """A merged value of 1e5 is finite in float32, not in the half precision that int8 weights go through."""
    found = []
    for index in range(40):
        case = case_of(peft, "lora", "bitsandbytes.int8", index=index)
        case = replace(case, poison=replace(case.poison, value="overflow"), profile="normal")
        (outcome,) = engine.check(peft, case, laws("quantize.rejects"))
        found.append(outcome.measurement is not None and outcome.measurement.symptom == "accepted overflow")
    assert any(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_mixed_merge_is_seen_to_change_the_state(peft, dtype: str) -> None:
    symptoms = set()
    for index in range(8):
        case = replace(case_of(peft, "lora", "bitsandbytes.nf4", dtype, index), adapter_dtype="float32")
        (outcome,) = engine.check(peft, case, laws("quantize.state_kept"))
        symptoms.add(outcome.measurement.role.partition(":")[2])
    assert symptoms == {"dtype of the state"}


def test_shapes_that_run_everywhere() -> None:
    wide = LayerSpec("a", "linear", 128, 64)
    assert quantizers.forwards("bitsandbytes.nf4", wide, {"blocksize": 128})
    assert not quantizers.forwards("bitsandbytes.nf4", wide, {"blocksize": 256})
    assert not quantizers.forwards("bitsandbytes.nf4", replace(wide, n_out=6), {"blocksize": 64})
    assert quantizers.forwards("bitsandbytes.int8", replace(wide, n_in=5, n_out=3), {})
    assert not quantizers.fits("hqq.4", replace(wide, n_in=40), {"group": 32})


def test_every_quantizer_draws_cases_that_it_takes(peft) -> None:
    variant = peft.variants()["lora"]
    for name in quantizers.DECLARED:
        for index in range(20):
            case = generator.draw(variant, Sweep("peft", "lora", "linear", "float32", name), 3, index)
            assert all(quantizers.fits(name, spec, quantizers.settings_of(case)) for spec in case.layers)
            assert case.setting("blocksize", 64) >= 64 and not math.isnan(case.poison.element)


def test_claims_cover_every_declared_quantizer(peft) -> None:
    for name, variant in peft.variants().items():
        if variant.quantizers:
            missing = set(quantizers.DECLARED) - set(variant.quantizers)
            assert not missing or name in ("beft", "ln_tuning", "trainable_tokens"), name
            assert set(variant.quantizers.values()) <= {Claim.YES, Claim.REFUSES}


def test_quick_takes_two_quantizers_and_any_that_is_asked_for(peft) -> None:
    found = suite.cells(peft, laws(), suite.Filters(variant=("lora",)))
    quick, full = suite.PROFILES["quick"], suite.PROFILES["full"]

    def taken(profile: suite.Profile, **filters: tuple[str, ...]) -> set[str | None]:
        wanted = suite.Filters(**filters)
        return {c.sweep.quantizer for c in found if wanted.admits(c) and profile.takes(c, wanted)}

    assert taken(quick) == {None, "bitsandbytes.int8", "bitsandbytes.nf4"}
    assert taken(quick, quantizer=("hqq.[842]",)) == {"hqq.8", "hqq.4", "hqq.2"}
    assert taken(quick, quantizer=("hqq.*.optimised",)) == {"hqq.8.optimised", "hqq.4.optimised", "hqq.2.optimised"}
    assert taken(quick, law=("quantize.drift",)) >= {"torchao.int8", "bitsandbytes.fp4"}
    assert taken(full) == {None, *quantizers.DECLARED}


def test_an_overflow_that_a_wider_dtype_holds_is_none(peft) -> None:
    """A float32 adapter turns a half-precision 4-bit layer into float32: what is finite there was not to be refused."""
    found = []
    for index in range(12):
        case = case_of(peft, "lora", "bitsandbytes.fp4", "float16", index)
        poison = replace(case.poison, value="overflow")
        case = replace(case, poison=poison, profile="normal", adapter_dtype="float32", safe=True)
        (outcome,) = engine.check(peft, case, laws("quantize.rejects"))
        found.append(outcome.failed)
    assert not any(found)


def test_gradients_of_large_outputs_are_no_overflow_of_the_law(peft) -> None:
    for index in range(6):
        case = replace(case_of(peft, "lora", "bitsandbytes.nf4", "float16", index), profile="normal")
        case = replace(case, adapters=tuple(replace(a, alpha=64.0 * a.rank) for a in case.adapters))
        (outcome,) = engine.check(peft, case, laws("quantize.backward"))
        assert not outcome.failed, outcome.message


def test_laws_that_merely_merge_leave_a_right_refusal_to_the_law_of_refusals(peft) -> None:
    """The first adapter overflows in the quantizer's own cast, the second safe merge finds infinities and refuses."""
    variant, merging = peft.variants()["lora"], [law for law in laws("quantize.*") if law.name not in SAFE]
    speaks = set()
    for index in range(40):
        case = case_of(peft, "lora", "bitsandbytes.int8", "bfloat16", index)
        if len(case.adapters) < 2:
            continue
        for alpha in (1.0, 2.0**30):
            adapters = tuple(replace(a, alpha=alpha) for a in case.adapters)
            loud = replace(case, safe=True, profile="normal", adapters=adapters)
            for outcome in engine.check(peft, loud, [law for law in merging if law.concerns(variant)]):
                assert not outcome.failed, outcome.message
                if outcome.measurement is not None:
                    speaks.add((outcome.law, alpha))
    merges = {"merge_budget", "roundtrip_budget", "drift", "effect", "warns", "state_kept", "after_forward"}
    assert {law for law, alpha in speaks if alpha == 1.0} >= {f"quantize.{name}" for name in merges}
    assert not {law for law, alpha in speaks if alpha != 1.0} & {f"quantize.{name}" for name in merges}


def test_a_safe_drift_goes_on_where_the_first_merge_drops_the_bias(peft) -> None:
    pytest.importorskip("hqq")
    case = replace(case_of(peft, "vera", "hqq.4"), safe=True, cycles=3)
    case = replace(case, layers=tuple(replace(spec, bias=True) for spec in case.layers))
    outcomes = engine.check(peft, case, [*laws("quantize.drift"), *laws("quantize.effect")])
    assert not any(outcome.failed for outcome in outcomes)
