"""Every law catches a fault, and every fault is caught."""

from __future__ import annotations

import pytest
import torch

from peftcheck import engine, generator
from peftcheck.case import Case, Sweep, decode
from peftcheck.errors import HarnessError
from peftcheck.faults import FAULTS, Fault, FaultResult, Faulty, idle, kill_matrix, records, replacing
from peftcheck.faults.matrix import suitable
from peftcheck.faults.tensors import next_up
from peftcheck.implementations.reference import Reference
from peftcheck.law import laws
from peftcheck.memento import Memento
from peftcheck.outcome import VIOLATION
from peftcheck.rounding import DTYPES, precision

REFERENCE = Reference()
BY_NAME = {fault.name: fault for fault in FAULTS}


def test_names_are_unique_and_every_fault_says_what_it_models() -> None:
    assert len(BY_NAME) == len(FAULTS)
    for fault in FAULTS:
        assert fault.description and fault.models and fault.laws, fault.name


def test_every_law_is_expected_to_catch_a_fault() -> None:
    covered = {law for fault in FAULTS for law in fault.laws}
    missing = {law.name for law in laws()} - covered
    assert not missing, f"laws that no fault of peftcheck.faults is expected to break: {sorted(missing)}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_is_caught_by_every_law_that_must_catch_it(fault: Fault) -> None:
    (result,) = kill_matrix(REFERENCE, [fault], laws(*fault.laws), cases=5)
    if not result.tried:  # the reference has nothing of the kind: it prunes no combinations
        peft = pytest.importorskip("peftcheck.implementations.peft").Peft()
        (result,) = kill_matrix(peft, [fault], laws(*fault.laws), cases=5)
    assert result.tried
    assert set(result.laws) == set(fault.laws)
    assert decode(result.token)[1] in fault.laws


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_ulp_is_caught_in_the_exact_regime(dtype: str) -> None:
    fault, caught, changed = BY_NAME["merge.one-ulp"], 0, 0
    variant = REFERENCE.variants()["lora"]
    for index in range(12):
        case = generator.draw(variant, Sweep("reference", "lora", "linear", dtype), 5, index, exact=True)
        before, after = (
            engine.check(one, case, laws("merge.oracle"))[0] for one in (REFERENCE, Faulty(REFERENCE, fault))
        )
        if before.effect > 0:
            changed += 1
            caught += after.status == VIOLATION
    assert changed >= 8
    assert caught == changed


@pytest.mark.parametrize("dtype", DTYPES)
def test_next_up_is_one_unit_in_the_last_place_of_the_largest_element(dtype: str) -> None:
    tensor = torch.tensor([0.5, -1.0, 0.25], dtype=DTYPES[dtype])
    next_up(tensor)
    assert tensor.tolist() == [0.5, -(1 + 2 * precision(DTYPES[dtype]).u), 0.25]


def test_a_fault_that_changes_nothing_survives_and_is_recorded_so() -> None:
    harmless = Fault("none", "nothing", "control", ("merge.oracle",), replacing(), layers=("linear",))
    (result,) = kill_matrix(REFERENCE, [harmless], laws("merge.*"), cases=3)
    assert result.survived
    assert records([result])[0].killed is False
    assert idle([result], laws("merge.oracle")) == ("merge.oracle",)


def test_a_fault_that_nothing_suits_is_untried_rather_than_killed() -> None:
    (result,) = kill_matrix(
        REFERENCE,
        [Fault("none", "", "control", ("merge.oracle",), replacing(), variants=("absent",))],
        laws(),
        3,
    )
    assert not result.tried
    assert not result.survived
    assert records([result]) == ()
    assert idle([result], laws("merge.oracle", "merge.drift")) == ("merge.drift",)


def test_a_law_that_fails_anyway_kills_nothing() -> None:
    """The implementation itself breaks the law here: failing with a harmless fault on top proves nothing."""
    broken = Faulty(REFERENCE, BY_NAME["merge.neighbour"])
    harmless = Fault("none", "", "control", ("merge.isolated",), replacing(), suits=BY_NAME["merge.neighbour"].suits)
    (result,) = kill_matrix(broken, [harmless], laws("merge.isolated"), cases=4)
    assert result.tried
    assert result.kills == ()
    assert result.masked == ("merge.isolated",)
    assert not result.survived
    assert idle([result], laws("merge.isolated")) == ()


def test_a_crash_of_the_fault_itself_is_the_harness_at_fault() -> None:
    def crash(port, adapters=None, safe=False) -> None:
        next_up(None)

    clumsy = Fault("clumsy", "", "control", ("merge.oracle",), replacing(merge=crash), layers=("linear",))
    with pytest.raises(HarnessError, match="clumsy itself crashes"):
        kill_matrix(REFERENCE, [clumsy], laws("merge.oracle"), cases=3)


def test_a_port_is_put_back_by_a_memento() -> None:
    case = next(suitable(REFERENCE, BY_NAME["unmerge.drifts"], 1))
    stage = engine.Scene(Faulty(REFERENCE, BY_NAME["unmerge.drifts"]), case)
    stage.attach()
    port = stage.stage.attached
    memento = Memento(port.roots())
    port.merge()
    port.unmerge()
    assert port.notes
    memento.restore()
    assert not port.notes


def test_the_matrix_over_all_laws_names_those_that_are_idle() -> None:
    chosen = laws("merge.*")
    results = kill_matrix(REFERENCE, [BY_NAME["export.hook-left"], BY_NAME["delta.unscaled"]], chosen, cases=4)
    assert all(isinstance(result, FaultResult) and not result.survived for result in results)
    assert set(idle(results, chosen)) == {law.name for law in chosen} - {
        "merge.export",
        "merge.unload",
        "merge.delta",
    }


def test_cases_suit_the_fault_and_depend_on_the_seed_alone() -> None:
    fault = BY_NAME["merge.cast-early"]
    first, again = (list(suitable(REFERENCE, fault, 6, seed=1)) for _ in range(2))
    assert first == again
    assert all(isinstance(case, Case) and case.adapter_dtype == "float32" != case.sweep.dtype for case in first)
    assert list(suitable(REFERENCE, fault, 6, seed=2)) != first


def test_every_law_says_what_it_does_and_which_defect_stands_behind_it() -> None:
    for law in laws():
        assert law.source and law.formula, law.name
        assert (law.measure.__doc__ or "").strip(), law.name
