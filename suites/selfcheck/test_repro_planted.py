"""Standalone scripts of laws that PEFT keeps: written for a planted defect they exit 1 with it, and 0 without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.lora.model import LoraModel
from scripts import execute
from torch import nn

from peftcheck import engine, repro
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.implementations.peft import Peft
from peftcheck.law import laws

LIBRARY = Peft()
LAYERS = (LayerSpec("mlp.up", "linear", 3, 2, True), LayerSpec("q", "linear", 2, 2))
ADAPTERS = (AdapterSpec("x-1", (0,), 2, 3.0), AdapterSpec("x", (0, 1), 1, 8.0))
TWO = Case(
    Sweep("peft", "lora", "linear", "float32"), 0, 0, LAYERS, ADAPTERS, "float32", "normal", values=3, joint=False
)
ONE = replace(TWO, adapters=ADAPTERS[1:])
GROUPED = LayerSpec(
    "a", "conv2d", 2, 2, kernel=(2, 2), stride=(1, 1), padding=(0, 0), dilation=(1, 1), size=(4, 4), groups=2
)
REFUSED = replace(
    ONE,
    sweep=replace(ONE.sweep, layer="conv2d"),
    layers=(GROUPED,),
    adapters=(AdapterSpec("x", (0,), 2, 2.0),),
)


def off_when_cast(plant) -> None:
    plain = Linear.get_delta_weight
    plant(Linear, "get_delta_weight", lambda self, adapter: plain(self, adapter) + (self.weight.dtype != torch.float32))


def back_to_single(plant) -> None:
    plain = Linear.merge

    def merge(self, *args, **options) -> None:
        plain(self, *args, **options)
        self.weight.data = self.weight.data.float()

    plant(Linear, "merge", merge)


def copies_scaled(plant) -> None:
    plain = Linear.__setstate__

    def arrive(self, state) -> None:
        plain(self, state)
        self.scaling = {name: 2 * scale for name, scale in self.scaling.items()}

    plant(Linear, "__setstate__", arrive)


def copies_reach_back(plant) -> None:
    left, arrive, merge = Linear.__reduce_ex__, Linear.__setstate__, Linear.merge
    originals = []

    def leaving(self, protocol):
        originals.append(self)
        return left(self, protocol)

    def arriving(self, state) -> None:
        arrive(self, state)
        self.__dict__["twin"] = True

    def merging(self, *args, **options) -> None:
        merge(self, *args, **options)
        for original in originals if "twin" in self.__dict__ else ():
            original.weight.data += 1

    plant(Linear, "__reduce_ex__", leaving)
    plant(Linear, "__setstate__", arriving)
    plant(Linear, "merge", merging)


def not_copied(plant) -> None:
    def refuse(self, *args):
        raise TypeError("not to be copied")

    plant(Linear, "__reduce_ex__", refuse)


def not_apart(plant) -> None:
    plant(nn.Parameter, "__deepcopy__", lambda self, memo: self)


def off_without_gradients(plant) -> None:
    plain = Linear.merge

    def merge(self, *args, **options) -> None:
        off = 0.0 if torch.is_grad_enabled() else 1.0
        plain(self, *args, **options)
        self.weight.data += off

    plant(Linear, "merge", merge)


def unloaded_with_a_change(plant) -> None:
    plain = LoraModel.unload

    def unload(self):
        exported = plain(self)
        exported.get_submodule("a").weight.data += 1
        return exported

    plant(LoraModel, "unload", unload)


def written_on_refusal(plant) -> None:
    def merge(self, *args, **options) -> None:
        self.weight.data += 1
        raise NotImplementedError("groups: no merge")

    plant(Conv2d, "merge", merge)


def base_trains(plant) -> None:
    plain = Linear.forward

    def forward(self, x, *args, **options):
        self.weight.requires_grad_(self.training)
        return plain(self, x, *args, **options)

    plant(Linear, "forward", forward)


def others_move(plant) -> None:
    plain = Linear.forward

    def forward(self, x, *args, **options):
        if self.training:
            self.lora_A["x"].weight.data += 1
        return plain(self, x, *args, **options)

    plant(Linear, "forward", forward)


def needs_the_first(plant) -> None:
    plain = Linear.forward

    def forward(self, x, *args, **options):
        if self.in_features == 3:
            self.lora_A["x-1"]  # on this layer from the first
        return plain(self, x, *args, **options)

    plant(Linear, "forward", forward)


@dataclass(frozen=True)
class Planted:
    """A defect that is planted, the law that catches it on the case, and what the script must do."""

    law: str
    plant: Callable[..., None]
    case: Case = field(default=ONE)
    does: str = ""


PLANTED = (
    Planted("merge.after_to_dtype", off_when_cast, does="model.to("),
    Planted("merge.after_to_dtype", back_to_single, does="model.to("),
    Planted("merge.after_deepcopy", copies_scaled, does="copy.deepcopy(model)"),
    Planted("merge.after_deepcopy", copies_reach_back, does="copy.deepcopy(model)"),
    Planted("merge.after_deepcopy", not_copied, does="copy.deepcopy(model)"),
    Planted("merge.after_deepcopy", not_apart, does="copy.deepcopy(model)"),
    Planted("merge.after_pickle", copies_scaled, does="pickle.loads("),
    Planted("merge.after_pickle", copies_reach_back, does="pickle.loads("),
    Planted("merge.after_pickle", not_copied, does="pickle.loads("),
    Planted("merge.under_no_grad", off_without_gradients, does="torch.no_grad()"),
    Planted("refuse.unload", unloaded_with_a_change, REFUSED, "model.unload()"),
    Planted("refuse.unload", written_on_refusal, REFUSED, "model.unload()"),
    Planted("train.base_frozen", base_trains, does="model.train()"),
    Planted("train.base_frozen", others_move, TWO, 'set_adapter(["x-1"])'),
    Planted("state.delete", needs_the_first, TWO, 'delete_adapter("x-1")'),
)


@pytest.mark.parametrize("defect", PLANTED, ids=lambda one: f"{one.law}-{one.plant.__name__}")
def test_a_script_tells_a_planted_defect_from_none(defect, monkeypatch):
    (law,) = laws(defect.law)
    assert not engine.check(LIBRARY, defect.case, [law])[0].failed
    with monkeypatch.context() as planted:
        defect.plant(lambda owner, name, value: planted.setattr(owner, name, value, raising=False))
        text = repro.standalone(LIBRARY, defect.case, law)
        assert text is not None, engine.check(LIBRARY, defect.case, [law])[0].message
        code, said = execute(text)
        assert code == 1 and "found" in said and "expected" in said, said
    assert len(text.splitlines()) <= repro.MOST_LINES and defect.does in text
    code, said = execute(text)
    assert code == 0, said


def test_a_model_that_cannot_run_without_adapters_is_shown_by_a_short_program():
    """PEFT's own: the deleted adapter stays the active one, of which the model's forward, not its layers, asks."""
    text = repro.standalone(LIBRARY, ONE, laws("state.delete")[0])
    code, said = execute(text)
    assert code == 1 and "found: KeyError" in said, said
