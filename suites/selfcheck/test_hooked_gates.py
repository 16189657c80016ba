"""An (IA)^3 by hooks with each of three defects that such a library had, and the law that kills each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from peftcheck import engine, generator
from peftcheck.case import AdapterSpec, Case, Sweep
from peftcheck.implementations.hooks import Gate, Hooked, Hooks
from peftcheck.implementations.reference import layers as shapes
from peftcheck.law import laws
from peftcheck.outcome import PASS
from peftcheck.rounding import DTYPES

ASKED = laws("forward.oracle", "train.identity_at_init", "train.live_gradients", "train.dropout", "train.base_frozen")


class OutputSide(Gate):
    """Gate the output of a feed-forward layer, where the paper gates its input; right in all others."""

    def before(self, layer: nn.Module, g: shapes.Geometry, x: Tensor) -> Tensor:
        return x

    def after(self, layer: nn.Module, g: shapes.Geometry, x: Tensor, y: Tensor) -> Tensor:
        return y * shapes.per_output(g, self.gate(layer.training))


class Undropped(Gate):
    """Take the dropout option, and never read it."""

    def gate(self, training: bool) -> Tensor:
        return self.tensors["scale"]


class Skipping(Gate):
    """Leave gates of one out, which spares a multiplication: a fresh gate then has no part in the graph."""

    def gate(self, training: bool) -> Tensor:
        gate = super().gate(training)
        return gate.detach() if bool((gate == 1).all()) else gate


@dataclass(frozen=True)
class Defective(Hooks):
    """The implementation by hooks with other gates; a gate of outputs has their length."""

    gates: type[Gate] = Gate

    def attach(self, model: nn.Module, case: Case) -> Hooked:
        def make(site: str, layer: nn.Module, adapter: AdapterSpec, dtype: torch.dtype) -> Gate:
            g, feedforward = shapes.geometry(site, layer), bool(adapter.option("feedforward"))
            length = g.n_in if feedforward and self.gates is not OutputSide else g.n_out
            scale = torch.ones(length, dtype=dtype, requires_grad=True)
            return self.gates({"scale": scale}, feedforward, float(adapter.option("dropout", 0.0)))

        attached = Hooked(model, [spec.name for spec in case.layers], make, DTYPES[case.adapter_dtype])
        for adapter in case.adapters:
            attached.add(adapter)
        attached.activate([adapter.name for adapter in case.adapters])
        return attached


def drawn(layer: str, square: bool) -> Sequence[Case]:
    """Return cases of feed-forward gates on layers that are square, or any."""
    sweep = Sweep("hooks", "ia3.feedforward", layer, "float64")
    made = (generator.draw(Hooks().variants()[sweep.variant], sweep, 4, index, index % 2 == 0) for index in range(400))
    return [case for case in made if all(spec.n_in == spec.n_out for spec in case.layers) or not square][:24]


def broken(gates: type[Gate], layer: str, square: bool = False) -> set[str]:
    """Return the laws that fail with these gates on some case; none may fail with the sound ones."""
    found = set()
    for case in drawn(layer, square):
        assert not [o for o in engine.check(Defective(Gate), case, ASKED) if o.failed]
        found |= {o.law for o in engine.check(Defective(gates), case, ASKED) if o.failed}
    return found


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_a_gate_on_the_wrong_side_is_killed_by_the_closed_form(layer: str) -> None:
    """On square layers too, where nothing tells by its shape: the fresh gate is one, and changes nothing."""
    assert broken(OutputSide, layer, square=True) == {"forward.oracle"}


def test_a_dropout_that_is_never_read_is_killed_by_the_law_of_dropout() -> None:
    assert broken(Undropped, "linear") == {"train.dropout"}


def test_a_gate_without_a_gradient_at_the_start_is_killed_by_the_law_of_gradients() -> None:
    assert broken(Skipping, "linear") == {"train.live_gradients"}


def test_the_sound_gates_are_asked_everything() -> None:
    told = {
        o.law for case in drawn("linear", False) for o in engine.check(Defective(Gate), case, ASKED) if o.status == PASS
    }
    assert told == {law.name for law in ASKED}
