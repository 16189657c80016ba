"""Weighted combinations: definitions, budgets, laws; and the figures that a hand computation gives of PEFT."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
import torch

from peftcheck import combination as combining
from peftcheck import engine, generator, law, values
from peftcheck.budgets import combine as budgets
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep, decode, encode
from peftcheck.errors import UsageError
from peftcheck.generator_combine import combination_case
from peftcheck.implementation import Claim, Op, Promise
from peftcheck.implementations.reference import Reference
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.combination import (
    DENSE,
    KINDS,
    cross_share,
    crossing,
    definition,
    drops,
    elected_mean,
    tail,
    trimmed,
)
from peftcheck.outcome import PASS, SKIP, VIOLATION
from peftcheck.rounding import EXACT_FP64, Arithmetic, Bounded, leaf

AR = Arithmetic(EXACT_FP64)
REFERENCE = Reference()


def row(*numbers: float, error: float = 0.0) -> Bounded:
    value = torch.tensor(numbers, dtype=torch.float64)
    return Bounded(value, torch.full_like(value, error) if error else None)


def the_case(kind: str, weights, dtype="float32", layer=None, profile="normal", seed=7, ranks=None, **extra) -> Case:
    """Return a case of adapters of rank 4 on one layer."""
    spec = layer or LayerSpec("proj", "linear", 12, 12)
    names = ("a", "b", "c", "d", "e")[: len(weights)]
    ranks = ranks or (4,) * len(weights)
    adapters = tuple(AdapterSpec(n, (0,), r, float(r)) for n, r in zip(names, ranks, strict=True))
    settings = {"kind": kind, "weights": tuple(weights), "members": tuple(range(len(weights))), **extra}
    sweep = Sweep("peft", "lora", spec.kind, dtype)
    return Case(sweep, 0, 0, (spec,), adapters, dtype, profile, seed, extra=tuple(sorted(settings.items())))


def check(implementation, case: Case, name: str):
    [outcome] = engine.check(implementation, case, law.laws(name))
    return outcome


# definitions


def test_trimming_keeps_the_largest_and_bounds_what_ties():
    kept = trimmed(row(3.0, -5.0, 1.0, 2.0), 0.5)
    assert kept.value.tolist() == [3.0, -5.0, 0.0, 0.0]
    assert float(kept.bound.max()) == 0.0
    tied = trimmed(row(2.0, -2.0, 1.0), 1 / 3)
    assert bool((tied.bound[:2] >= 2).all()) and tied.bound[2] == 0 and tied.value[2] == 0


def test_trimming_allows_either_rounding_of_the_number_kept():
    either = trimmed(row(4.0, 3.0, 2.0), 0.5)  # 1.5 elements: one or two
    assert either.bound.tolist() == [0.0, 3.0, 0.0]


def test_ties_elects_the_heavier_sign_and_averages_those_that_agree():
    deltas = [row(1.0, -3.0, 2.0), row(2.0, 1.0, -2.5), row(-1.0, 1.0, 0.0)]
    mean = elected_mean(AR, deltas, [1.0, 1.0, 1.0], "total")
    assert mean.value.tolist() == [1.5, -3.0, -2.5]
    by_number = elected_mean(AR, deltas, [1.0, 1.0, 1.0], "frequency")
    assert by_number.value[:2].tolist() == [1.5, 1.0]
    assert by_number.bound[2] >= 2.5  # one against one: either is right


def test_weights_multiply_what_is_averaged_so_that_opposite_weights_cancel():
    mean = elected_mean(AR, [row(2.0, -1.0)] * 2, [1.0, -1.0], "total")
    assert mean.value.tolist() == [0.0, 0.0]


def test_a_vote_that_hangs_on_rounding_is_bounded_by_both_answers():
    mean = elected_mean(AR, [row(1.0, error=0.2), row(-1.1, error=0.2)], [1.0, 1.0], "total")
    for right in (1.0, -1.1):
        assert abs(right - float(mean.value)) <= float(mean.bound)


def test_a_random_drop_leaves_one_of_the_subsets():
    found = {
        kept: form.value.tolist()
        for kept, form in drops(AR, KINDS["dare_linear"], [row(1.0), row(2.0)], [1.0, -1.0], 0.5, "total")
    }
    assert found == {(True, True): [-2.0], (True, False): [2.0], (False, True): [-4.0], (False, False): [0.0]}


@pytest.mark.parametrize("pruning, dense", DENSE.items())
def test_at_density_one_a_kind_is_its_dense_kind(pruning, dense):
    deltas = [row(1.0, -2.0), row(0.5, 4.0)]
    one, other = (definition(AR, KINDS[k], deltas, [1.0, 2.0], 1.0, "total") for k in (pruning, dense))
    assert torch.equal(one.value, other.value)


def test_the_tail_is_that_of_the_singular_values():
    assert tail(torch.diag(torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64)), 1) == pytest.approx(5.0)
    assert tail(torch.ones(2, 3, dtype=torch.float64), 2) == 0.0


def test_cross_terms_of_probes_lie_where_nothing_is_due():
    one, other = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    one[0, 0], other[3, 2] = 1.0, 2.0
    assert crossing([one, other]).nonzero().tolist() == [[0, 2], [3, 0]]
    assert crossing([one, one]) is None


def test_half_of_the_energy_of_a_product_of_sums_is_in_cross_terms():
    b = [torch.eye(4, dtype=torch.float64)[:, [i]] for i in range(2)]
    a = [torch.eye(4, dtype=torch.float64)[[i]] for i in range(2)]
    pairs = [[left @ right for right in a] for left in b]
    assert cross_share(pairs, (b[0] + b[1]) @ (a[0] + a[1])) == pytest.approx(0.5)
    assert cross_share(pairs, b[0] @ a[0] + b[1] @ a[1]) == pytest.approx(0.0)
    assert cross_share([[pairs[0][0], pairs[0][0]], [pairs[0][0]] * 2], pairs[0][0]) is None  # nothing tells them apart


# budgets, from both sides


def _site(a: float, b: float, dtype: torch.dtype, scale: float = 1.0) -> Site:
    tensors = {"A": leaf(torch.tensor([[a]], dtype=dtype)), "B": leaf(torch.tensor([[b]], dtype=dtype))}
    return Site(LayerSpec("proj", "linear", 1, 1), AdapterSpec("a", (0,), 1, scale), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_exact_budget_is_never_exceeded_and_not_loose(dtype):
    rng, worst = Random(1), 0.0
    for _ in range(400):
        a, b = (float(torch.tensor(rng.uniform(0.5, 2.0), dtype=dtype)) for _ in range(2))
        weight, scale = rng.uniform(0.5, 2.0), rng.uniform(0.5, 2.0)
        site, m = _site(a, b, dtype, scale), machine(dtype, dtype, False)
        bound = float(budgets.exact(m, FORMULAS["lora"], [scale], [site], [weight], False)["weight"])
        root = math.sqrt(weight * scale)
        one_side = torch.tensor(a, dtype=dtype) * weight * scale, torch.tensor(b, dtype=dtype)
        both = torch.tensor(a, dtype=dtype) * root, torch.tensor(b, dtype=dtype) * root
        for left, right in (one_side, both):
            found = Fraction(float(left)) * Fraction(float(right))
            due = Fraction(weight) * Fraction(scale) * Fraction(a) * Fraction(b)
            worst = max(worst, float(abs(found - due)) / bound)
    assert worst <= 1
    assert worst >= 0.25


def test_the_exact_budget_is_zero_where_nothing_rounds():
    site = _site(3.0, 5.0, torch.bfloat16)
    exact = {role: leaf(form.value, exact=True) for role, form in site.tensors.items()}
    m = machine(torch.bfloat16, torch.bfloat16, True)
    bound = budgets.exact(m, FORMULAS["lora"], [2.0], [replace(site, tensors=exact)], [-3.0], False)
    assert float(bound["weight"]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_truncation_budget_holds_for_lapack_with_tied_singular_values(dtype):
    q = torch.linalg.qr(values.normal("q", (9, 9)))[0]
    r = torch.linalg.qr(values.normal("r", (7, 7)))[0]
    target = q[:, :7] @ torch.diag(torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)) @ r
    u, s, vh = torch.linalg.svd(target.to(dtype))
    for rank in (1, 2, 3, 5, 7):
        found = (u[:, :rank] @ torch.diag(s[:rank])).double() @ vh[:rank].double()
        least = tail(target, rank)
        bound = budgets.truncation(
            machine(dtype, dtype, False),
            Bounded(target, 2.0**-23 * target.abs() if dtype == torch.float32 else None),
            least,
        )
        assert float(torch.linalg.vector_norm(found - target)) <= bound
        assert bound <= least + 1e-3


# cases


def test_cases_are_functions_of_their_index_and_survive_a_token():
    variant = REFERENCE.variants()["lora"]
    sweep = Sweep("reference", "lora", "conv2d", "float32")
    for index in range(40):
        case = combination_case(variant, sweep, "svd", 3, index, exact=index % 2 == 0)
        assert case == combination_case(variant, sweep, "svd", 3, index, exact=index % 2 == 0)
        assert decode(encode(case, "combine.rank")) == (case, "combine.rank")
        assert len(case.setting("weights")) == len(case.setting("members"))


def test_cases_reach_what_real_defects_needed():
    variant = REFERENCE.variants()["lora"]
    drawn = [
        combination_case(variant, Sweep("reference", "lora", "linear", "float32"), k, 0, i, i % 3 == 0)
        for k in ("cat", "linear", "svd")
        for i in range(150)
    ]
    counts = {len(case.adapters) for case in drawn}
    assert counts == {1, 2, 3, 4, 5}
    assert {case.profile for case in drawn} >= {"probe", "parallel", "duplicated", "dyadic", "zero"}
    weights = {weight for case in drawn for weight in case.setting("weights")}
    assert min(weights) < -1e5 and 0.0 in weights and 1e-12 in weights
    assert any(len(set(case.setting("members"))) < len(case.setting("members")) for case in drawn)
    assert any(case.setting("merged") is not None for case in drawn)
    assert any(len({a.rank for a in case.adapters}) > 1 for case in drawn)
    assert any(len({a.targets for a in case.adapters}) > 1 for case in drawn)


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv3d", "embedding.scaled"])
@pytest.mark.parametrize("exact", [True, False])
def test_every_law_can_judge_every_fourth_case_so_that_chance_leaves_no_cell_vacuous(kind, layer, exact):
    for name in ("lora", "lora.bias"):
        variant = REFERENCE.variants()[name]
        if layer not in variant.layers:
            continue
        for seed in range(3):
            case = combination_case(
                variant, Sweep("reference", name, layer, "float16"), kind, seed, 10 if exact else 11, exact
            )
            silent = {o.law for o in engine.check(REFERENCE, case, law.laws("combine.*")) if o.status == SKIP}
            due = {one.name for one in law.laws("combine.*") if not one.of_kind(kind, variant.combinations[kind])}
            assert silent == due | ({"combine.cross_term_free"} if exact else set()), case.words()


def test_what_is_asked_for_once_is_made_once():
    case = the_case("cat", (1.0, -1.0))
    with engine.pinned():
        scene = engine.Scene(REFERENCE, case)
        scene.attach()
        asked, stage = combining.requested(case), scene.stage
        first = combining.made(stage, asked)
        assert first is combining.made(stage, asked.having(svd_rank=None))  # equal requests, not the same object
        for other in (asked.but(weights=(1.0, 1.0)), asked.having(svd_rank=2)):
            assert first is not combining.made(stage, other)
        assert tuple(stage.attached.adapters()) == tuple(stage.names)  # and the stage is as it was


@pytest.mark.parametrize("variant, asked", [("lora", True), ("ia3", False)])
def test_unequal_ranks_are_a_request_of_those_that_have_ranks(variant: str, asked: bool) -> None:
    """A gate has none: that its adapters combine, whatever rank their specification carries, is right."""
    peft = pytest.importorskip("peftcheck.implementations.peft").Peft()
    case = the_case("linear", (1.0, 1.0), ranks=(2, 1), request="unequal ranks")
    case = replace(case, sweep=replace(case.sweep, variant=variant))
    if variant == "ia3":
        case = replace(case, adapters=tuple(replace(a, options=(("feedforward", False),)) for a in case.adapters))
    outcome = check(peft, case, "combine.refuses")
    assert (outcome.status != SKIP) is asked, outcome


def test_a_request_that_the_library_crashes_on_is_put_once_and_crashes_for_all_who_ask(monkeypatch):
    case, calls = the_case("cat", (1.0, -1.0)), []

    def crash(stage, asked):
        calls.append(asked)
        raise KeyError("r")

    with engine.pinned():
        scene = engine.Scene(REFERENCE, case)
        scene.attach()
        monkeypatch.setattr(combining, "combine", crash)
        for _ in range(2):
            with pytest.raises(KeyError, match="r"):
                combining.made(scene.stage, combining.requested(case))
    assert len(calls) == 1


def test_probes_have_disjoint_supports():
    case = the_case("cat", (1.0, -1.0), profile="probe")
    b = [values.adapter(case, i, "proj", "B", (12, 4), "factor") for i in range(2)]
    a = [values.adapter(case, i, "proj", "A", (4, 12), "factor") for i in range(2)]
    assert bool((b[0] @ a[0]).any()) and crossing([b[i] @ a[i] for i in range(2)]) is not None


def test_an_unknown_kind_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown combination kind 'sum'"):
        combining.requested(the_case("sum", (1.0,)))


# laws on the reference implementation: they hold, and each says something


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "embedding"])
def test_the_reference_keeps_every_law(kind, layer):
    variant = REFERENCE.variants()["lora"]
    laws = law.laws("combine.*")
    for dtype in ("float64", "bfloat16"):
        sweep = Sweep("reference", "lora", layer, dtype)
        for index in range(4):
            case = combination_case(variant, sweep, kind, 1, index, exact=index % 2 == 0)
            failed = [o for o in engine.check(REFERENCE, case, laws) if o.failed]
            assert not failed, f"{failed[0].law}: {failed[0].message} on {case.words()}"


def test_a_law_of_combinations_says_nothing_of_a_case_without():
    case = replace(the_case("cat", (1.0, 1.0)), extra=())
    outcomes = engine.check(REFERENCE, case, law.laws("combine.*"))
    assert {outcome.status for outcome in outcomes} == {SKIP}


def test_the_reference_is_exact_in_the_exact_regime():
    outcome = check(REFERENCE, the_case("cat", (3.0, -2.0), "bfloat16", profile="dyadic"), "combine.linear")
    assert outcome.status == PASS and outcome.measurement.residual == 0.0 and outcome.measurement.bound == 0.0


def test_every_law_has_a_kind_that_it_judges():
    for one in law.laws("combine.*"):
        assert any(one.of_kind(kind, p) for kind in KINDS for p in Promise), one.name


# PEFT: hand tests and their figures


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("peft")
    from peftcheck.implementations.peft import Peft

    return Peft()


def relative_error(implementation, case: Case) -> float:
    """Return the relative error of the combined delta against sum w_i D_i, by fp64."""
    from peftcheck.staging import set_up

    with engine.pinned():
        stage = set_up(implementation, case)
        asked = combining.requested(case)
        made = combining.snapshot(stage, combining.combine(stage, asked))
        due = combining.total(stage, asked, "proj", plain=True)["weight"].value
        found = combining.outcome(stage, made, "proj")["weight"].value
    return float((found - due).norm() / due.norm()) if bool(due.any()) else float(found.norm())


def test_peft_a_single_adapter_at_minus_one(peft):
    for kind in KINDS:
        options = {"density": 1.0} if KINDS[kind].prunes else {}
        case = the_case(kind, (-1.0,), **options)
        assert relative_error(peft, case) < 1e-6
        assert check(peft, case, "combine.single").status == PASS


def test_peft_two_identical_adapters_cancel(peft):
    for kind in KINDS:
        case = the_case(kind, (1.0, -1.0), profile="duplicated", **({"density": 1.0} if KINDS[kind].prunes else {}))
        assert relative_error(peft, case) < 1e-6
        assert check(peft, case, "combine.cancel").status == PASS


HAND = {
    "single": (-1.0,),
    "two": (1.0, -1.0),
    "three": (2.0, -1.0, 0.5),
    "identical": (1.0, -1.0),
    "probes": (1.0, 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_keeps_what_each_kind_promises_of_the_hand_tests_and_breaks_what_is_known(peft, kind):
    promised = law.laws("combine.linear", "combine.best_rank", "combine.definition", "combine.single", "combine.cancel")
    for name, weights in HAND.items():
        profile = {"identical": "duplicated", "probes": "probe"}.get(name, "normal")
        options = {"density": 1.0} if KINDS[kind].prunes else {}
        if KINDS[kind].rank == "chosen":
            options["svd_rank"] = 12
        outcomes = engine.check(peft, the_case(kind, weights, profile=profile, **options), promised)
        broken = {o.fingerprint for o in outcomes if o.failed}
        due = set()
        if name in ("two", "three", "probes") and kind == "linear":
            due = {"combine.linear|lora|weight|cross terms"}
        elif name in ("two", "three", "probes") and KINDS[kind].rank == "common":
            due = {"combine.definition|lora|weight|factors"}
        assert broken == due, name
        assert sum(o.status == PASS for o in outcomes) >= 2


@pytest.mark.parametrize("weights", [(1.0, -1.0), (2.0, -1.0, 0.5)])
def test_peft_linear_is_off_by_about_one(peft, weights):
    case = the_case("linear", weights)
    assert 0.7 < relative_error(peft, case) < 1.4
    outcome = check(peft, case, "combine.linear")
    assert outcome.status == VIOLATION and outcome.fingerprint == "combine.linear|lora|weight|cross terms"
    assert "of the combined delta lies in B_i A_j" in outcome.message
    assert f"'cat' gives it at rank {4 * len(weights)} instead of 4" in outcome.message


def test_peft_linear_puts_half_of_the_energy_of_probes_into_cross_terms(peft):
    outcome = check(peft, the_case("linear", (1.0, 1.0), profile="probe"), "combine.cross_term_free")
    assert outcome.status == VIOLATION
    share = float(outcome.message.split(" % of the combined delta lies in B_a A_b")[0].split()[-1])
    assert 35 < share < 65


def test_peft_svd_is_the_best_of_its_rank(peft):
    short = the_case("svd", (1.0, -1.0), svd_rank=4)
    assert 0.28 < relative_error(peft, short) < 0.36
    assert check(peft, short, "combine.best_rank").status == PASS
    whole = the_case("svd", (1.0, -1.0), svd_rank=8)
    assert relative_error(peft, whole) <= 1e-5
    assert check(peft, whole, "combine.best_rank").status == PASS


@pytest.mark.parametrize("weights", [(1.0, -1.0), (2.0, -1.0, 0.5)])
def test_peft_cat_is_exact(peft, weights):
    case = the_case("cat", weights, "float64")
    assert relative_error(peft, case) < 1e-14
    assert check(peft, case, "combine.linear").status == PASS
    dyadic = check(peft, replace(case, profile="dyadic"), "combine.linear")
    assert dyadic.status == PASS and dyadic.measurement.bound == 0.0


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "linear" and "dare" not in k])
def test_peft_keeps_the_definition_where_it_is_computed_on_deltas(peft, kind):
    case = the_case(kind, (1.0, -1.0), svd_rank=12, **({"density": 0.5} if KINDS[kind].prunes else {}))
    outcomes = {
        o.law: o
        for o in engine.check(peft, case, law.laws("combine.definition", "combine.best_rank", "combine.linear"))
    }
    broken = {name for name, outcome in outcomes.items() if outcome.failed}
    assert broken == ({"combine.definition"} if KINDS[kind].rank == "common" else set())


def test_peft_combines_what_its_variants_say_and_refuses_the_rest(peft):
    """Fails when PEFT has an add_weighted_adapter that no variant knows of."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    offering = {
        t.value.lower() for t, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if hasattr(tuner, "add_weighted_adapter")
    }
    variants = {name: v for name, v in peft.variants().items() if not name.startswith("mixed.")}
    known = {name.partition(".")[0] for name, v in variants.items() if v.combinations}
    spec, adapter = LayerSpec("proj", "linear", 4, 4), AdapterSpec("a", (0,), 2, 2.0)
    refusing = {name for name, v in variants.items() if v.claim(Op.COMBINE, spec, adapter) is Claim.REFUSES}
    assert known == {"lora", "ia3"} and refusing == {"adalora"}
    assert offering == known | refusing
    assert law.laws("refuse.combine")[0].refuses is Op.COMBINE


@pytest.mark.parametrize("name", ["adalora", "mixed.lora-loha", "mixed.oft-lora"])
def test_peft_refuses_to_combine_what_does_not_add_up(peft, name):
    sweep = Sweep("peft", name, "linear", "float32")
    cases = (generator.draw(peft.variants()[name], sweep, 0, index) for index in range(40))
    case = next(case for case in cases if len(case.layers) == 1)
    assert check(peft, case, "refuse.combine").status == PASS


# laws that a method has no meaning for, and false alarms that must not come back


def test_normalized_changes_are_not_asked_to_add_up(peft):
    dora = peft.variants()["lora.dora"]
    concerned = {one.name for one in law.laws("combine.*") if one.concerns(dora)}
    silent = {"cancel", "homogeneous", "permutation", "activated", "definition", "expectation", "cross_term_free"}
    assert not concerned & {f"combine.{name}" for name in silent}
    assert {"combine.single", "combine.rank", "combine.reload", "combine.merge"} <= concerned
    case = combination_case(dora, Sweep("peft", "lora.dora", "conv2d", "float32"), "cat", 0, 1)
    spec = LayerSpec(
        "proj", "conv2d", 4, 4, kernel=(1, 1), stride=(1, 1), dilation=(1, 1), padding=(0, 0), groups=2, size=(3, 3)
    )
    grouped = replace(case, layers=(spec,), adapters=tuple(replace(a, targets=(0,), rank=2) for a in case.adapters))
    assert {o.status for o in engine.check(peft, grouped, law.laws("combine.single", "combine.merge"))} == {SKIP}


def test_a_first_step_may_be_off_by_its_own_rounding(peft):
    case = the_case("svd", (0.0, -1.0, 1.0), svd_rank=4, members=(0, 1, 1))
    case = replace(case, adapters=case.adapters[:2])
    assert check(peft, case, "combine.additive").status == PASS


def test_a_kind_that_adds_may_add_deltas_that_underflow():
    layer = LayerSpec("proj", "linear", 12, 12)
    adapter = AdapterSpec("a", (0,), 4, 4.0, (("bias", True), ("dropout", 0.0)))
    settings = {"kind": "linear", "weights": (1.0, 1.0, 1.0, 1000.0, 1.0), "members": (0,) * 5}
    for seed in range(6):
        sweep = Sweep("reference", "lora.bias", "linear", "float16")
        case = Case(sweep, 0, 0, (layer,), (adapter,), "float16", "small", seed, extra=tuple(sorted(settings.items())))
        assert {o.status for o in engine.check(REFERENCE, case, law.laws("combine.linear", "combine.additive"))} == {
            PASS
        }


def test_a_twin_that_makes_no_adapter_is_no_repair(peft):
    layer = LayerSpec("proj", "conv1d", 3, 4, kernel=(3,), stride=(1,), padding=(0,), dilation=(1,), size=(8,))
    for ranks in ((1, 1), (1, 1, 1)):
        weights = (1.0, -1.0, 0.5)[: len(ranks)]
        outcome = check(peft, the_case("ties", weights, layer=layer, ranks=ranks, density=1.0), "combine.definition")
        assert outcome.fingerprint == "combine.definition|lora|weight|factors" and outcome.measurement.repairs == ()


def test_a_forward_that_writes_into_an_adapter_is_not_blamed_on_combining(peft):
    layer = LayerSpec("proj", "embedding", 24, 3, max_norm=4.0)
    case = the_case("cat", (0.5, 0.5), layer=layer, profile="large")
    with engine.pinned():
        scene = engine.Scene(peft, case)
        scene.attach()
        stage = scene.stage
        with torch.no_grad():
            stage.attached.forward([stage.inputs["proj"]])
        written = [
            not torch.equal(t, stage.start_adapters["a"][key]) for key, t in stage.attached.adapter_tensors("a").items()
        ]
    assert any(written)  # PEFT hands max_norm to the lookup of its own factor
    assert check(peft, case, "combine.sources_untouched").status == PASS


# what repairs a violation


def test_repairs_are_measured_on_the_violating_case(peft):
    for weights in ((1.0, -1.0), (2.0, -1.0, 0.5)):
        cat, svd = check(peft, the_case("linear", weights), "combine.linear").measurement.repairs
        assert (cat.kind, cat.rank, cat.instead) == ("cat", 4 * len(weights), 4) and cat.error < 1e-15
        assert (svd.kind, svd.rank, svd.instead) == ("svd", 4 * len(weights), 4) and 1e-9 < svd.error < 1e-5
    (twin,) = check(peft, the_case("ties", (1.0, -1.0), density=0.5), "combine.definition").measurement.repairs
    assert (twin.kind, twin.rank) == ("ties_svd", 12) and twin.error < 1e-5
    assert check(peft, the_case("cat", (1.0, -1.0)), "combine.linear").measurement.repairs == ()
    precision = check(peft, the_case("linear", (0.3,), "float64"), "combine.single").measurement
    assert precision.symptom == "single precision" and precision.repairs == ()


# low-rank adapters with something between, in or beside the factors


def test_packed_blocks_are_the_matrix_that_they_stand_for():
    spec, adapter = LayerSpec("proj", "linear", 6, 2), AdapterSpec("a", (0,), 2, 2.0, (("blocks", 2), ("factor", "A")))
    a, b = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double(), torch.tensor([[1.0, 10.0], [0.0, 1.0]]).double()
    site, double = Site(spec, adapter, {"A": leaf(a), "B": leaf(b)}), machine(torch.float64, torch.float64, False)
    dense = combining.ungrouped(site)
    assert dense.tensors["A"].value.tolist() == [[1, 2, 3, 0, 0, 0], [0, 0, 0, 4, 5, 6]]
    assert combining.ungrouped(dense) is dense, "written out once"
    due = [[1.0, 2.0, 3.0, 40.0, 50.0, 60.0], [0.0, 0.0, 0.0, 4.0, 5.0, 6.0]]
    for one in (site, dense):
        assert FORMULAS["lora.bdlora"].delta(double, one)["weight"].value.tolist() == due


def test_what_is_kept_beside_the_factors_has_no_part_in_a_budget():
    spec, double = LayerSpec("proj", "linear", 6, 2), machine(torch.float64, torch.float64, False)
    own = {"A": leaf(torch.ones(2, 6).double()), "B": leaf(torch.ones(2, 2).double())}
    sites = [
        Site(spec, AdapterSpec(name, (0,), 2, 2.0), {**own, "embed": leaf(torch.ones(n).double())})
        for name, n in (("a", 6), ("b", 2))  # as many as their groups are wide: no two adapters' need be alike
    ]
    plain = [replace(site, tensors=own) for site in sites]
    for rule in (
        lambda given: budgets.factorwise(double, FORMULAS["lora.velora"], [1.0, 1.0], given, [1.0, 2.0], 1.0),
        lambda given: budgets.exact(double, FORMULAS["lora.velora"], [1.0, 1.0], given, [1.0, 2.0], True),
    ):
        assert torch.equal(rule(sites)["weight"], rule(plain)["weight"])
