"""The port fits a library of hooks that never merges."""

from __future__ import annotations

import pytest
import torch

from peftcheck import engine, generator
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.implementation import Absent, Attached, Claim, Implementation, Op, load
from peftcheck.implementations.hooks import Hooks
from peftcheck.law import laws
from peftcheck.models import build
from peftcheck.outcome import PASS, SKIP
from peftcheck.rounding import DTYPES

HOOKS = Hooks()
CELLS = [(name, layer) for name, variant in HOOKS.variants().items() for layer in sorted(variant.layers)]
SLOW = {"forward.compiled"}


@pytest.mark.parametrize(("variant", "layer"), CELLS, ids=lambda value: value)
def test_keeps_the_laws_that_concern_it(variant: str, layer: str) -> None:
    offered, passed = HOOKS.variants()[variant], set()
    chosen = [law for law in laws() if law.name not in SLOW and law.concerns(offered)]
    run = {"forward.oracle", "forward.targets", "forward.checkpointed", "merge.disable", "merge.unload"}
    run |= {
        "train.identity_at_init",
        "train.live_gradients",
        "train.base_frozen",
        "state.delete",
        "state.tied",
        "state.sequence",
    }
    run |= {"attach.names"}
    run |= {"train.dropout"} if "dropout" in offered.options else set()
    for dtype in DTYPES:
        for index in range(4):
            case = generator.draw(offered, Sweep("hooks", variant, layer, dtype), 3, index, index % 2 == 0)
            for outcome in engine.check(HOOKS, case, chosen):
                assert not outcome.failed, f"{outcome.law}: {outcome.message} on {case.words()}"
                if outcome.status == PASS:
                    passed.add(outcome.law)
                if outcome.law not in run:
                    assert outcome.status == SKIP, f"{outcome.law} needs an operation that hooks lack"
    assert passed == run


def attached(variant: str, kind: str = "linear") -> tuple:
    spec = LayerSpec("proj", kind, 4, 3, bias=kind == "linear")
    options = tuple((key, values[0]) for key, values in HOOKS.variants()[variant].options.items())
    case = Case(
        Sweep("hooks", variant, kind, "float64"),
        0,
        0,
        (spec,),
        (AdapterSpec("a", (0,), 2, 2.0, options),),
        "float64",
        "normal",
    )
    model = build(case)
    return HOOKS.attach(model, case), model, case


def test_is_an_implementation_and_loads_by_name() -> None:
    assert isinstance(load("peftcheck.implementations.hooks:Hooks"), Implementation)
    assert isinstance(attached("lora")[0], Attached)


def test_claims_no_merge_and_raises_absent_when_merged_all_the_same() -> None:
    port, _, case = attached("lora")
    claim = HOOKS.variants()["lora"].claim
    for op in (Op.MERGE, Op.SAFE_MERGE, Op.UNMERGE, Op.EXPORT, Op.DELTA):
        assert claim(op, case.layers[0], case.adapters[0]) is Claim.ABSENT
    for call in (port.merge, port.unmerge, port.merge_and_unload, lambda: port.delta("proj", "a")):
        with pytest.raises(Absent):
            call()


def test_the_model_keeps_its_modules_and_its_parameters() -> None:
    port, model, case = attached("lora")
    bare = build(case)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in bare.named_modules()]
    assert model.state_dict().keys() == bare.state_dict().keys()
    port.unload()
    assert not model.proj._forward_hooks
    assert not model.proj._forward_pre_hooks


def test_a_gated_input_is_recorded_as_it_came() -> None:
    """A library's pre-hook changes the input: judged on the changed one, the gate would count twice."""
    case = attached("ia3.feedforward")[2]
    (outcome,) = engine.check(HOOKS, case, laws("forward.oracle"))
    assert outcome.status == PASS
    assert outcome.effect > 0


def test_a_deleted_adapter_no_longer_acts() -> None:
    port, model, case = attached("lora")
    x = torch.ones(1, 4, dtype=torch.float64)
    with torch.no_grad():
        plain = build(case)(x)[0]
        for tensor in port.adapter_tensors("a").values():
            tensor.fill_(1.0)
        assert not torch.equal(model(x)[0], plain)
        port.delete("a")
        assert torch.equal(model(x)[0], plain)
