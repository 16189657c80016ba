"""Standalone scripts of the laws of sequences: the steps as a short program, and what is due after the last of them."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from scripts import execute

from peftcheck import repro
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep, decode
from peftcheck.implementations.peft import Peft
from peftcheck.law import laws

LIBRARY = Peft()
LAYERS = (LayerSpec("a", "linear", 2, 3, bias=True), LayerSpec("ab", "linear", 2, 2))
ADAPTERS = (AdapterSpec("x", (0,), 1, 2.0), AdapterSpec("x-1", (0, 1), 2, 3.0))


def case(*steps: tuple, adapters: int = 2, dtype: str = "float64") -> Case:
    """Return a LoRA case on two layers; with `steps`, their program."""
    extra = (("steps", steps),) if steps else ()
    return Case(
        Sweep("peft", "lora", "linear", dtype),
        0,
        0,
        LAYERS,
        ADAPTERS[:adapters],
        dtype,
        "normal",
        values=5,
        extra=extra,
    )


def written(one: Case, name: str) -> str:
    text = repro.standalone(LIBRARY, one, laws(name)[0])
    assert text is not None, f"no script for {name}"
    return text


def off_in_another_order(unmerge):
    """Return an unmerge that is right where adapters were merged as they were added, and off elsewhere."""

    def planted(self) -> None:
        backwards = self.merged_adapters == ["x-1", "x"]
        unmerge(self)
        self.get_base_layer().weight.data += 1e-3 * backwards

    return planted


def scale_unless_merged(self, adapter, scale) -> None:
    if adapter in self.scaling and not self.merged:
        self.scaling[adapter] = scale * self.lora_alpha[adapter] / self.r[adapter]


# Real defects of PEFT 0.21.2 in one operation after another
REAL = {
    "merge.guarded": (case(adapters=1), "set_scale"),
    "merge.subset": (case(), 'merge_adapter(["x"]'),
    "state.sequence": (case(("merge", (0,), False), ("forward",), ("unload",)), "exported = model.unload()"),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_defect_is_shown_by_a_short_program(name):
    one, call = REAL[name]
    text = written(one, name)
    assert len(text.splitlines()) < 40
    imports = {
        line.split()[1].partition(".")[0].rstrip(",")
        for line in text.splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imports <= {"torch", "peft"}
    assert call in text
    code, said = execute(text)
    assert code == 1 and "found" in said and "expected" in said


def test_a_program_passes_where_the_defect_is_gone(monkeypatch):
    text = written(REAL["merge.guarded"][0], "merge.guarded")
    monkeypatch.setattr(LoraLayer, "set_scale", scale_unless_merged)
    assert execute(text)[0] == 0


def test_the_order_of_merges_is_shown_by_a_short_program(monkeypatch):
    with monkeypatch.context() as planted:
        planted.setattr(Linear, "unmerge", off_in_another_order(Linear.unmerge))
        text = written(case(), "merge.order")
        assert execute(text)[0] == 1
    assert len(text.splitlines()) < 40
    assert execute(text)[0] == 0


STEPS = {
    "rescale": (("rescale", 0, 2.0), ("forward",)),
    "add": (("delete", 0), ("add", 0), ("activate", (0, 1)), ("forward",)),
    "load": (("save", 1), ("delete", 1), ("load", 1), ("activate", (0, 1)), ("forward",)),
    "train": (("activate", (0,)), ("train",), ("forward", True)),
    "disable": (("disable",), ("forward",), ("enable",), ("forward",)),
    "merge": (("merge", (), True), ("unmerge",), ("forward",)),
}


@pytest.mark.parametrize("kind", STEPS)
def test_every_operation_has_a_spelling_that_does_what_the_law_did(kind, monkeypatch):
    """An output that is off after the last step, and there alone, shows in the script; with the defect gone it passes."""
    plain = Linear.forward
    with monkeypatch.context() as planted:
        off = {"by": 0.0}
        planted.setattr(
            Linear, "forward", lambda self, x, *args, **options: plain(self, x, *args, **options) + off["by"]
        )
        one = case(*STEPS[kind], adapters=1 if kind == "train" else 2)
        play = repro.sequencing.do

        def last_is_off(own, step):
            off["by"] = 1e-3 if tuple(own.done) == STEPS[kind][:-1] else 0.0
            try:
                return play(own, step)
            finally:
                off["by"] = 0.0

        planted.setattr(repro.sequencing, "do", last_is_off)
        planted.setattr("peftcheck.operations.do", last_is_off)
        text = written(one, "state.sequence")
        off["by"] = 1e-3
        assert execute(text)[0] == 1
    assert len(text.splitlines()) < 40
    code, said = execute(text)
    assert code == 0, said


def test_a_crash_is_shown_by_the_steps_that_lead_to_it(monkeypatch):
    def broken(self, adapter_name):
        return {}[adapter_name]

    one = case(("merge", (0,), False), ("unmerge",), ("delete", 1))
    with monkeypatch.context() as planted:
        planted.setattr(BaseTuner, "delete_adapter", broken)
        text = written(one, "state.sequence")
        assert "delete_adapter" in text and execute(text)[0] == 1
    assert execute(text)[0] == 0


def test_a_sequence_that_holds_has_no_script():
    one = replace(case(("merge", (0,), False), ("unmerge",)))
    assert repro.standalone(LIBRARY, one, laws("state.sequence")[0]) is None


WITNESSES = (
    ("dotted-adapter-name", "attach.names"),
    ("mixed-model-mixed-batch", "refuse.mixed_batch"),
    ("lora-variant-refused-after-mha-changed", "refuse.attach"),
    ("hra-gram-schmidt-start", "train.live_gradients"),
    ("monteclora-checkpoint-state", "forward.checkpointed"),
    ("merge-inference-tensor", "merge.under_inference_mode"),
)


def witness(issue: str, name: str) -> Case:
    """Return the first witness that an entry of PEFT's ledger has for a law."""
    entries = [
        entry for path in sorted(LIBRARY.ledger.glob("*.toml")) for entry in tomllib.loads(path.read_text())["issue"]
    ]
    tokens = next(entry["witness"] for entry in entries if entry["id"] == issue)
    return next(one for one, law in map(decode, tokens) if law == name)


@pytest.mark.parametrize(("issue", "name"), WITNESSES)
def test_laws_of_names_refusals_and_paths_have_short_programs(issue, name):
    text = written(witness(issue, name), name)
    assert len(text.splitlines()) < 40 and "peftcheck" not in text.split("\n", 2)[2]
    code, said = execute(text)
    assert code == 1 and "found" in said
