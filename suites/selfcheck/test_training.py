"""The laws of training: what they ask, what they leave to others, and that no hash decides a verdict."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from peftcheck import engine, generator
from peftcheck.case import Sweep, decode
from peftcheck.faults import FAULTS, kill_matrix
from peftcheck.faults.fault import Faulty, replacing
from peftcheck.implementations.hooks import Hooks
from peftcheck.implementations.reference import Reference
from peftcheck.law import laws
from peftcheck.outcome import PASS, SKIP
from peftcheck.staging import set_up
from peftcheck.training import feeds, matters, start_fresh

REFERENCE = Reference()
BY_NAME = {fault.name: fault for fault in FAULTS}
# what an (IA)^3 set by hooks got wrong, and the law that convicts it
HOOKED = {
    "forward.gate-wrong-side": "forward.oracle",
    "hooked.dropout-idle": "train.dropout",
    "hooked.gates-dead": "train.live_gradients",
}


@pytest.mark.parametrize(("fault", "law"), HOOKED.items())
def test_each_defect_of_a_hook_based_ia3_is_caught_on_hooks(fault: str, law: str) -> None:
    (result,) = kill_matrix(Hooks(), [BY_NAME[fault]], laws("train.*", "forward.oracle"), cases=4)
    assert law in result.laws


def drawn(name: str, index: int, layer: str = "linear", dtype: str = "float64", library=REFERENCE):
    variant = library.variants()[name]
    return generator.draw(variant, Sweep(library.name, name, layer, dtype), 11, index)


def test_a_dropout_is_drawn_apart_and_moves_nothing_else() -> None:
    offered = REFERENCE.variants()["lora"]
    without = replace(offered, options={key: v for key, v in offered.options.items() if key != "dropout"})
    seen = set()
    for index in range(40):
        case = drawn("lora", index)
        seen.add(case.adapters[0].option("dropout", 0.0))
        assert len({adapter.option("dropout") for adapter in case.adapters}) == 1
        plain = [replace(a, options=tuple(o for o in a.options if o[0] != "dropout")) for a in case.adapters]
        assert replace(case, adapters=tuple(plain)) == generator.draw(without, case.sweep, 11, index)
    assert seen == {0.0, 0.1, 0.5, 0.9}


def test_no_dropout_is_drawn_where_the_library_declares_none() -> None:
    offered = replace(REFERENCE.variants()["lora"], undropped=frozenset({"linear"}))
    cases = [generator.draw(offered, Sweep("reference", "lora", "linear", "float32"), 11, i) for i in range(10)]
    assert all(case.adapters[0].option("dropout") is None for case in cases)


def test_a_gradient_is_due_where_the_closed_form_moves_and_only_there() -> None:
    case = next(c for c in (drawn("lora", i) for i in range(40)) if c.profile == "normal" and c.layers[0].n_in > 1)
    stage = set_up(REFERENCE, case)
    start_fresh(stage)
    data, name = feeds(stage), stage.targeted[0]
    own = stage.adapters_on(name)[0]
    assert matters(stage, own, name, "A", data)  # B is zero, and would move
    assert matters(stage, own, name, "B", data)
    zeros = {key: torch.zeros_like(x) for key, x in data.items()}
    assert not matters(stage, own, name, "A", zeros)


def test_fresh_adapters_are_kept_as_the_library_made_them() -> None:
    case = next(c for c in (drawn("lora", i) for i in range(40)) if c.profile == "normal")
    stage = set_up(REFERENCE, case)
    for name, tensors in stage.fresh.items():
        held = stage.attached.adapter_tensors(name)
        assert all(not t.any() for (_, role), t in tensors.items() if role == "B")
        assert any(not torch.equal(held[key], t) for key, t in tensors.items())


def test_a_law_of_a_special_path_leaves_the_plain_path_to_its_own_law() -> None:
    """A merge that does nothing is the finding of merge.oracle, not of a dozen laws more."""
    fault = BY_NAME["merge.nothing"]
    case = next(c for c in (drawn("lora", i, dtype="float32") for i in range(40)) if c.profile == "normal")
    names = ("merge.in_train_mode", "merge.under_autocast", "merge.after_deepcopy", "merge.oracle")
    found = {o.law: o for o in engine.check(Faulty(REFERENCE, fault), case, laws(*names))}
    assert found["merge.oracle"].failed
    assert all(found[name].status == PASS for name in names[:3])


def test_working_dropout_is_not_taken_for_none_however_often_it_is_drawn() -> None:
    law = laws("train.dropout")
    for index in range(60):
        (outcome,) = engine.check(REFERENCE, drawn("lora", index), law)
        assert not outcome.failed, outcome.message


_VERDICTS = """
from peftcheck import engine, generator
from peftcheck.case import Sweep
from peftcheck.implementation import load
from peftcheck.law import laws
from peftcheck.staging import set_up
chosen = laws(
    "train.*", "merge.isolated", "merge.oracle", "merge.after_deepcopy", "safe_merge.names", "merge.subset", "state.sequence",
    "state.delete", "state.save_load", "attach.names",
)
asked = {
    "peftcheck.implementations.reference:Reference": (("lora", "linear"), ("ia3", "conv2d"), ("lora.dora", "embedding")),
    "peft": (("lora", "linear"), ("vera", "linear"), ("loha", "conv2d")),
}
for target, sweeps in asked.items():
    library = load(target)
    for name, layer in sweeps:
        for index in range(2 if target == "peft" else 6):
            sweep = Sweep(library.name, name, layer, "float32")
            case = generator.draw(library.variants()[name], sweep, 5, index)
            print(case.words(), [(o.law, o.status, repr(o.measurement)) for o in engine.check(library, case, chosen)])
# of two tensors that are equally far off the first is told
library = load("peft")
for index in range(8):
    sweep = Sweep("peft", "lora.bias", "linear", "float32")
    stage = set_up(library, generator.draw(library.variants()["lora.bias"], sweep, 5, index))
    print([list(stage.roundtrip(name)) for name in stage.targeted if stage.spec(name).bias])
"""


def test_verdicts_do_not_depend_on_the_hash_seed() -> None:
    """Names that are prefixes of each other, in sets whose order the hash decides: the same verdict, the same bits.

    In PEFT too, whose configurations keep the names of target modules in sets.
    """
    pytest.importorskip("peft")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _VERDICTS],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (0, 1, 2)
    ]
    told = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    assert told[0].count("\n") == 32 and "['weight', 'bias']" in told[0]
    assert told[0] == told[1] == told[2]


def test_mixed_rows_come_back_to_the_first_adapter_and_pass_the_base() -> None:
    def swapped(port, inputs, adapters=None):
        return port.inner.forward(inputs, adapters and tuple(reversed(adapters)))

    fault = replace(BY_NAME["mixed.first-row"], attach=replacing(forward=swapped))
    (result,) = kill_matrix(REFERENCE, [fault], laws("train.mixed_batch"), cases=3)
    assert result.laws == ("train.mixed_batch",)


def test_an_adapter_without_values_has_nothing_to_train_and_one_that_is_frozen_throughout_is_told() -> None:
    """GLoRA's bias path on a layer without bias holds zeros alone; what holds factors must train some of them."""
    peft = pytest.importorskip("peftcheck.implementations.peft").Peft()
    drawings = [case for case in (drawn("glora.bias", i, library=peft) for i in range(60)) if case.profile == "normal"]
    glora = next(case for case in drawings if not any(spec.bias for spec in case.layers))
    (outcome,) = engine.check(peft, glora, laws("train.live_gradients"))
    assert outcome.status == SKIP
    frozen = replace(BY_NAME["hooked.gates-dead"], attach=replacing(trainable=lambda port, adapter: frozenset()))
    case = next(c for c in (drawn("lora", i) for i in range(40)) if c.profile == "normal")
    (outcome,) = engine.check(Faulty(REFERENCE, frozen), case, laws("train.live_gradients"))
    assert outcome.measurement.symptom == "untrained"


def test_a_start_that_cancels_is_judged_by_the_rounding_of_computing_with_it() -> None:
    """Pairs of equal reflections in float16: the bound of their start has none of its own, and the plain layer's is too small."""
    peft = pytest.importorskip("peftcheck.implementations.peft").Peft()
    case, name = decode(_REFLECTIONS)
    (outcome,) = engine.check(peft, case, laws(name))
    assert outcome.status == PASS, outcome.message


_REFLECTIONS = (
    "pc1.eNplkOFqwzAMhN9Fv01pMhgjr1JC0GIlEXVkY6vtstF3nxzaMtg_i7uTP90JNCPLgT2Jsm4D6sDCCu4H0GNSyoPXLRF0MIWI"
    "2ryDeyoFupPZQloQuo_D0YHgWp2eJrwEWwIxKUepxhPMGdehjMvK3qQJQ6G-d5BRzhZ3oJhn0uo99ncTPlHHxabG3uM2BjKpccDi"
    "6Qu6NwcBtyeE54D1p2p3NXCmLBRsbF1bR0sZ2Bjl2nrjErty3yFDvCh07YsdTU3oPctcSdzR0oW_6bWqaLa2Hh9VzpTjxKFmJeYV"
    "gy0oRH6_qdyIEnQG-K9EXlOg1Wp_gEOiqVa2X_WX9YqZUQwSloxwv_e_2zaNVg"
)
