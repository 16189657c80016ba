"""Sequences: the expectation agrees with a sound library, and names what an unsound one did."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from peftcheck import engine, generator, machine
from peftcheck.case import Case, Sweep, decode, encode
from peftcheck.errors import UsageError
from peftcheck.faults import FAULTS, Faulty
from peftcheck.implementations.reference import Reference
from peftcheck.law import laws
from peftcheck.outcome import PASS
from peftcheck.programs import KINDS, program, words
from peftcheck.shrink import shrink

REFERENCE = Reference()
BY_NAME = {fault.name: fault for fault in FAULTS}
FAST = settings(machine.SETTINGS, max_examples=12, stateful_step_count=10, database=None, derandomize=True)


def case(index: int = 0, variant: str = "lora", dtype: str = "float32", exact: bool = True, adapters: int = 2) -> Case:
    """Return a case on linear layers with at least as many adapters."""
    sweep = Sweep("reference", variant, "linear", dtype)
    found = (generator.draw(REFERENCE.variants()[variant], sweep, 9, number, exact) for number in range(200))
    return [one for one in found if len(one.adapters) >= adapters][index]


def played(library, steps: tuple, number: int = 0):
    """Return the outcome of a program on a case with two adapters or more."""
    one = replace(case(number), extra=(("steps", steps),))
    return engine.check(library, one, laws("state.sequence"))[0]


def test_a_program_is_a_function_of_the_case_and_survives_a_token() -> None:
    one = case()
    assert program(one) == program(decode(encode(one, "state.sequence"))[0])
    fixed = replace(one, extra=(("steps", (("merge", (0, 1), True), ("unmerge",))),))
    again, _ = decode(encode(fixed, "state.sequence"))
    assert program(again) == (("merge", (0, 1), True), ("unmerge",))


def test_programs_use_every_operation() -> None:
    seen = {step[0] for number in range(40) for step in program(replace(case(), values=number))}
    assert seen == set(KINDS)


def test_steps_read_as_calls() -> None:
    assert words(("merge", (1, 0), True), ["a", "b"]) == "merge('b', 'a', safe)"
    assert words(("rescale", 1, 0.5), ["a", "b"]) == "rescale('b', 0.5)"
    assert words(("unmerge",), ["a"]) == "unmerge()"


@pytest.mark.parametrize("variant", sorted(REFERENCE.variants()))
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_reference_implementation_holds(variant: str, dtype: str) -> None:
    for number in range(2):
        outcomes = engine.check(REFERENCE, case(number, variant, dtype, number == 0), laws("state.sequence"))
        assert [o.status for o in outcomes] == [PASS], outcomes


@pytest.mark.parametrize(
    "fault, steps, symptom",
    [
        (
            "sequence.rescale-while-merged",
            (("merge", (0,), False), ("rescale", 0, 2.0), ("unmerge",)),
            "after rescale while merged",
        ),
        ("sequence.delete-while-merged", (("merge", (0, 1), False), ("delete", 1), ("unmerge",)), "after delete"),
        ("sequence.merge-after-delete", (("delete", 1), ("merge", (0,), False)), "after merge"),
    ],
)
def test_a_failure_is_named_after_its_cause(fault: str, steps: tuple, symptom: str) -> None:
    assert played(REFERENCE, steps).status == PASS
    outcome = played(Faulty(REFERENCE, BY_NAME[fault]), steps)
    assert outcome.failed
    assert symptom in outcome.fingerprint
    assert words(steps[0], [a.name for a in case().adapters]) in outcome.message


def test_a_program_shrinks_to_the_steps_that_matter() -> None:
    library = Faulty(REFERENCE, BY_NAME["sequence.merge-after-delete"])
    noise = (("forward",), ("activate", (0,)), ("delete", 1), ("forward",), ("merge", (0,), True), ("unmerge",))
    failing = replace(case(), extra=(("steps", noise),))
    (outcome,) = engine.check(library, failing, laws("state.sequence"))
    small = shrink(library, failing, laws("state.sequence")[0], outcome.fingerprint, engine.check)
    assert small.case.setting("steps") == (("delete", 1), ("merge", (0,), False))


def test_the_machine_passes_a_sound_library() -> None:
    life = machine.life(REFERENCE, "lora", "linear", "float32")
    run_state_machine_as_test(life, settings=FAST)
    assert life.played > 20


def test_the_machine_finds_a_fault_and_prints_what_replays_it() -> None:
    library = Faulty(REFERENCE, BY_NAME["sequence.delete-while-merged"])
    with pytest.raises(machine.Broken, match="peftcheck replay pc1") as caught:
        found = settings(FAST, max_examples=200, stateful_step_count=15, phases=[Phase.generate])
        run_state_machine_as_test(machine.life(library, "lora", "linear", "float32"), settings=found)
    failing, law = decode(str(caught.value).rpartition(" ")[2])
    assert law == "state.sequence"
    assert engine.check(library, failing, laws(law))[0].failed
    assert not engine.check(REFERENCE, failing, laws(law))[0].failed


def test_what_is_known_ends_a_sequence_quietly() -> None:
    library = Faulty(REFERENCE, BY_NAME["sequence.delete-while-merged"])
    run_state_machine_as_test(
        machine.life(library, "lora", "linear", "float32", absorbs=lambda outcome, case: "known"), settings=FAST
    )


def test_a_machine_without_a_sweep_is_refused() -> None:
    with pytest.raises(UsageError, match="has no lora on layernorm"):
        machine.life(REFERENCE, "lora", "layernorm")
