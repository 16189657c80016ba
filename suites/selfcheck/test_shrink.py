"""Shrinking: what is left is small, fails alike, and the steps say only what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from peftcheck import engine, generator, shrink
from peftcheck.case import AdapterSpec, Case, LayerSpec, Poison, Sweep
from peftcheck.errors import HarnessError
from peftcheck.implementation import Variant
from peftcheck.implementations.peft import Peft
from peftcheck.law import Law, laws
from peftcheck.measurement import Measurement
from peftcheck.outcome import PASS, SKIP, VIOLATION, Outcome

LAW = Law("merge.roundtrip", "", (), lambda stage: None, "")
PRINT = "merge.roundtrip|twist|weight|numeric"
LAYERS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "embedding"})


class Library:
    """A library whose defect is a predicate on cases."""

    name, version, folders, ledger = "fake", "1", (), None

    def __init__(self, defect: Callable[[Case], bool], **variant) -> None:
        self.defect = defect
        self.variant = Variant("twist", "lora", LAYERS, **variant)
        self.checked = 0

    def variants(self):
        return {"twist": self.variant}

    def check(self, implementation, case, laws):
        self.checked += 1
        if self.defect(case):
            return [Outcome(LAW.name, VIOLATION, Measurement(9.0, 9.0, "a:weight"), fingerprint=PRINT)]
        return [Outcome(LAW.name, PASS, Measurement(0.5, 0.5, "a:weight"))]


def drawn(library: Library, layer: str, wanted: Callable[[Case], bool]) -> Case:
    """Return the first drawn case that fails and is as large as wanted."""
    sweep = Sweep("fake", "twist", layer, "float32")
    cases = (generator.draw(library.variant, sweep, 0, index) for index in range(4000))
    return next(case for case in cases if library.defect(case) and wanted(case))


def shrunk(library: Library, case: Case, **limit) -> shrink.Shrunk:
    return shrink.shrink(library, case, LAW, PRINT, library.check, **limit)


def targeted(case: Case) -> list[LayerSpec]:
    return [case.layers[target] for adapter in case.adapters for target in adapter.targets]


def large(case: Case) -> bool:
    return len(case.layers) >= 3 and len(case.adapters) >= 2 and shrink.elements(case) > 50


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_a_defect_that_is_everywhere_shrinks_to_one_element(layer):
    library = Library(lambda case: True)
    result = shrunk(library, drawn(library, layer, large))
    (spec,), (adapter,) = result.case.layers, result.case.adapters
    assert result.elements == 1 and result.before > 50
    assert (adapter.rank, adapter.name, spec.name) == (1, "default", "a")
    assert (spec.bias, spec.groups, spec.padding_mode, spec.padding_idx, spec.tied) == (
        False,
        1,
        "zeros",
        None,
        None,
    )
    assert (result.case.safe, result.case.joint, result.case.cycles) == (False, True, 1)
    assert result.case.profile == "dyadic" and result.case.values <= 3
    assert result.steps == (), "everything violates: there is no border to speak of"


@pytest.mark.parametrize(
    ("layer", "defect", "elements", "steps"),
    [
        ("linear", lambda c: any(s.bias for s in targeted(c)), 1, ["without bias it holds"]),
        (
            "linear",
            lambda c: any(s.n_in >= 3 for s in targeted(c)),
            3,
            ["n_in 1 holds; 3 violates", "n_in 2 holds; 3 violates"],
        ),
        (
            "conv2d",
            lambda c: any(min(s.kernel) > 1 for s in targeted(c)),
            4,
            ["kernel 1x1 holds; 2x2 violates"],
        ),
        ("conv2d", lambda c: any(s.kernel[0] != s.kernel[1] for s in targeted(c)), 2, ["kernel 1x1 holds"]),
        (
            "conv1d",
            lambda c: any(s.dilation != (1,) and s.kernel != (1,) for s in targeted(c)),
            2,
            ["dilation 1 holds; 2 violates", "kernel 1 holds; 2 violates"],
        ),
        ("conv3d", lambda c: any(s.groups > 1 for s in targeted(c)), 2, ["groups 1 holds; 2 violates"]),
        (
            "conv2d",
            lambda c: any(s.padding_mode != "zeros" for s in targeted(c)),
            1,
            ["padding with zeros holds"],
        ),
        ("conv2d", lambda c: any(s.stride[0] > 1 for s in targeted(c)), 1, ["stride 1x1 holds"]),
        ("linear", lambda c: any(s.tied for s in c.layers), 1, ["untied it holds"]),
        ("linear", lambda c: len(c.adapters) > 1, 1, ["with adapter 'default' alone it holds"]),
        (
            "linear",
            lambda c: len({t for a in c.adapters for t in a.targets}) > 1,
            2,
            ["with layer 'a' alone it holds"],
        ),
        (
            "linear",
            lambda c: any(a.rank > 2 for a in c.adapters),
            1,
            ["rank 1 holds; 3 violates", "rank 2 holds; 3 violates"],
        ),
        (
            "linear",
            lambda c: any(a.alpha != a.rank for a in c.adapters),
            1,
            ["alpha 1 holds; 2 violates (rank 1)"],
        ),
        (
            "linear",
            lambda c: not c.joint and len(c.adapters) > 1,
            1,
            ["merging all adapters in one call holds"],
        ),
        ("linear", lambda c: c.safe, 1, ["an unsafe merge holds"]),
        (
            "linear",
            lambda c: c.profile == "graded",
            1,
            ["with 'normal' values it holds", "with 'dyadic' values it holds"],
        ),
        ("linear", lambda c: c.poison.value == "inf", 1, ["with a poison of nan it holds; inf violates"]),
        (
            "embedding",
            lambda c: any(s.padding_idx is not None for s in targeted(c)),
            1,
            ["without padding_idx it holds"],
        ),
    ],
)
def test_what_a_defect_needs_is_kept_and_named_and_nothing_else_is(layer, defect, elements, steps):
    library = Library(defect)
    result = shrunk(library, drawn(library, layer, lambda case: shrink.elements(case) > 10))
    assert defect(result.case)
    assert result.elements <= elements
    assert result.checks <= 200
    for step in steps:
        assert any(step in found for found in result.steps), result.steps


def test_the_dtype_stays_and_the_adapters_dtype_is_kept_where_it_matters():
    library = Library(lambda case: case.adapter_dtype != case.sweep.dtype)
    sweep = Sweep("fake", "twist", "linear", "bfloat16")
    cases = (generator.draw(library.variant, sweep, 0, index) for index in range(50))
    result = shrunk(library, next(case for case in cases if library.defect(case)))
    assert (result.case.sweep.dtype, result.case.adapter_dtype) == ("bfloat16", "float32")
    assert "with a bfloat16 adapter it holds" in result.steps


def test_other_values_are_tried_where_a_smaller_case_hides_the_defect():
    """One element fails with one seed in five only: without the seeds the walk would stop at three."""
    library = Library(lambda case: shrink.elements(case) > 2 or case.values == 3)
    result = shrunk(library, drawn(library, "linear", lambda case: shrink.elements(case) > 10))
    assert (result.elements, result.case.values) == (1, 3)


def test_another_fingerprint_is_no_reproduction():
    def check(implementation, case, laws):
        wide = any(spec.n_in > 4 for spec in case.layers)
        name = PRINT if wide else "merge.roundtrip|twist|bias|numeric"
        return [Outcome(LAW.name, VIOLATION, Measurement(9.0, 9.0, "a:weight"), fingerprint=name)]

    library = Library(lambda case: any(spec.n_in > 4 for spec in case.layers))
    case = drawn(library, "linear", large)
    result = shrink.shrink(library, case, LAW, PRINT, check)
    assert max(spec.n_in for spec in result.case.layers) == 5
    assert not any("n_in" in step for step in result.steps), "with n_in 4 nothing holds: it fails otherwise"


def test_what_the_harness_cannot_judge_is_no_reproduction_and_no_border():
    library = Library(lambda case: True)

    def check(implementation, case, laws):
        if min(spec.n_out for spec in case.layers) < 4:
            raise HarnessError("no such layer")
        return library.check(implementation, case, laws)

    case = drawn(library, "linear", lambda case: min(spec.n_out for spec in case.layers) > 6)
    result = shrink.shrink(library, case, LAW, PRINT, check)
    assert min(spec.n_out for spec in result.case.layers) == 4
    assert not any("n_out" in step for step in result.steps)


def test_a_law_that_says_nothing_of_a_smaller_case_is_no_border():
    def check(implementation, case, laws):
        wide = any(spec.n_in > 4 for spec in targeted(case))
        return library.check(implementation, case, laws) if wide else [Outcome(LAW.name, SKIP)]

    library = Library(lambda case: any(spec.n_in > 4 for spec in targeted(case)))
    result = shrink.shrink(library, drawn(library, "linear", large), LAW, PRINT, check)
    assert result.steps == ()


def test_the_variants_conditions_hold_on_every_candidate():
    def fit(adapter, layers, exact):
        return replace(adapter, rank=-(-adapter.rank // 4) * 4)

    def admit(spec):
        return replace(spec, n_out=spec.n_out + spec.n_out % 2)

    def defect(case):
        assert all(adapter.rank % 4 == 0 for adapter in case.adapters)
        assert all(spec.n_out % 2 == 0 and spec.bias for spec in case.layers)
        return True

    library = Library(lambda case: True, fit=fit, admit=admit, bias=True)
    case = drawn(library, "linear", lambda case: len(case.layers) > 1)
    library.defect = defect
    result = shrunk(library, case)
    assert (result.case.adapters[0].rank, result.elements) == (4, 2)


@pytest.mark.parametrize("limit", [1, 2, 7, 40])
def test_the_limit_is_kept_and_the_best_so_far_returned(limit):
    library = Library(lambda case: shrink.elements(case) >= 6)
    case = drawn(library, "linear", large)
    result = shrunk(library, case, limit=limit)
    assert library.checked == result.checks <= limit
    assert 6 <= result.elements <= result.before == shrink.elements(case)
    assert result.outcome.fingerprint == PRINT and result.ratio == 9.0


def test_shrinking_is_deterministic():
    def run():
        library = Library(lambda case: sum(math.prod(spec.weight_shape) for spec in targeted(case)) >= 5)
        return shrunk(library, drawn(library, "conv2d", large))

    assert run() == run()


def test_a_case_that_holds_cannot_be_shrunk():
    library = Library(lambda case: True)
    case = drawn(library, "linear", large)
    library.defect = lambda case: False
    with pytest.raises(ValueError, match="nothing to shrink"):
        shrunk(library, case)


def test_what_single_laws_ask_for_shrinks_too():
    library = Library(lambda case: any(step == "merge" for step in case.setting("sequence", ())))
    case = drawn_with(
        library,
        (("kind", "svd"), ("sequence", ("add", "merge", "merge", "rescale")), ("weights", (0.3, -2.0))),
    )
    result = shrunk(library, case)
    assert result.case.extra == (("sequence", ("merge",)),)
    assert "without sequence it holds" in result.steps


def drawn_with(library: Library, extra: tuple) -> Case:
    case = generator.draw(library.variant, Sweep("fake", "twist", "linear", "float32"), 0, 0)
    return replace(case, extra=extra)


# with the library


def peft_case(variant="lora", layers=(), adapters=None, **fields) -> Case:
    adapters = adapters or (AdapterSpec("x", tuple(range(len(layers))), 4, 8.0),)
    usual = Case(
        Sweep("peft", variant, layers[0].kind, "float64"),
        0,
        0,
        layers,
        adapters,
        "float64",
        "normal",
        batch=(2,),
    )
    return replace(usual, **fields)


DILATED = LayerSpec("mlp.p", "conv2d", 3, 5, True, (3, 2), (2, 1), (1, 0), (2, 2), 1, "zeros", (9, 8))
NARROW = LayerSpec("p", "conv3d", 3, 5, True, (1, 1, 1), (1, 1, 1), (0, 1, 0), (1, 1, 1), 1, "zeros", (2, 2, 2))
IA3 = (AdapterSpec("x", (0, 1), options=(("feedforward", False),)),)


@pytest.mark.parametrize(
    ("name", "fingerprint", "case", "most"),
    [
        (
            "merge.roundtrip",
            "merge.roundtrip|ia3|ia3.epsilon",
            peft_case("ia3", (LayerSpec("q", "linear", 12, 7, True), LayerSpec("k", "linear", 5, 5)), IA3),
            1,
        ),
        ("forward.oracle", "crash|lora|RuntimeError in layer.py:forward", peft_case(layers=(DILATED,)), 2),
        (
            "merge.oracle",
            "crash|lora|RuntimeError in layer.py:get_delta_weight",
            peft_case(layers=(NARROW, replace(NARROW, name="q"))),
            2,
        ),
        (
            "safe_merge.all_or_nothing",
            "safe_merge.all_or_nothing|lora|model|half merged",
            peft_case(layers=tuple(LayerSpec(n, "linear", 6, 4) for n in "abc"), poison=Poison("nan", 0, 2, 1, 3)),
            2,
        ),
    ],
    ids=["epsilon", "dilation", "narrow kernel", "half merged"],
)
def test_real_defects_shrink_to_a_handful_of_elements(name, fingerprint, case, most):
    library, (one,) = Peft(), laws(name)
    (outcome,) = engine.check(library, case, [one])
    assert outcome.fingerprint == fingerprint
    result = shrink.shrink(library, case, one, fingerprint, engine.check)
    assert result.elements <= most < result.before
    assert result.checks <= 200
    (again,) = engine.check(library, result.case, [one])
    assert again.fingerprint == fingerprint


def test_the_border_of_the_dilation_defect_is_told():
    library, (one,) = Peft(), laws("forward.oracle")
    case = peft_case(layers=(DILATED,))
    (outcome,) = engine.check(library, case, [one])
    steps = shrink.shrink(library, case, one, outcome.fingerprint, engine.check).steps
    assert any(step.startswith("dilation 1x1 holds") for step in steps), steps
    assert any(step.startswith("kernel 1x1 holds") for step in steps), steps


def test_the_ratios_over_the_dtypes_tell_a_logic_error():
    """The epsilon of (IA)^3 shows in fp64 alone: 1e-8 is below the rounding of every other dtype."""
    library, (one,) = Peft(), laws("merge.roundtrip")
    case = peft_case("ia3", (LayerSpec("q", "linear", 3, 3),), (replace(IA3[0], targets=(0,)),), profile="dyadic")
    ratios = shrink.over_dtypes(library, case, one, engine.check)
    assert list(ratios) == ["float64", "float32", "bfloat16", "float16"]
    assert ratios["float64"] == math.inf
    assert all(ratios[dtype] <= 1 for dtype in ("float32", "bfloat16", "float16"))


def test_an_adapter_in_single_precision_stays_so_on_half_bases_only():
    seen = []

    def check(implementation, case, laws):
        seen.append((case.sweep.dtype, case.adapter_dtype))
        return [Outcome(LAW.name, SKIP)]

    library = Library(lambda case: True, dtypes=frozenset({"float64", "bfloat16", "float16"}))
    case = generator.draw(library.variant, Sweep("fake", "twist", "linear", "bfloat16"), 0, 0)
    ratios = shrink.over_dtypes(library, replace(case, adapter_dtype="float32"), LAW, check)
    assert seen == [("float64", "float64"), ("bfloat16", "float32"), ("float16", "float32")]
    assert ratios == {"float64": None, "bfloat16": None, "float16": None}
