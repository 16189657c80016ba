"""What every layer must give after each step of a sequence: the output of what is merged and of what is active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftcheck.case import LayerSpec
from peftcheck.measurement import NOTHING, Measurement, broken, compare, worst
from peftcheck.oracle import Site
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import Bounded, judged, leaf
from peftcheck.stage import Record

if TYPE_CHECKING:
    from peftcheck.sequence import Play

IGNORED = "active adapter ignored while another is merged"


def compared_outputs(play: Play, seen: Mapping[str, Record]) -> Measurement:
    """Compare the output of every layer in a run of the model with what it must give now, on the input that it had."""
    stage, found, play.runs = play.stage, [], dict(seen)
    if not stage.outputs_count or not play.numeric or (play.active is None and play.off is None):
        return NOTHING
    for spec in stage.case.layers:
        if spec.name not in seen:
            continue  # of a whole model, what a forward does not come by
        ran = seen[spec.name]
        if (spec.tied or spec.name) not in play.stacks:
            found.append(_bystander(play, spec, ran))
            continue
        form = _output(play, spec.name, ran.x) if spec.tied is None else None
        if form is None or not stage.sound(form):
            continue
        one = play.compared(f"{spec.name}:output", ran.y, form.value, judged(form, machine=stage.machine.base.store))
        if not one.holds and _ignores(play, spec.name, ran):
            return broken(
                f"{spec.name}:output", IGNORED, "an active adapter that is not merged has no part in the output"
            )
        found.append(one)
    return worst(found)


def _bystander(play: Play, spec: LayerSpec, ran: Record) -> Measurement:
    """Judge a layer that no adapter targets: the base's, or the trained copy that stands in for it."""
    stage, role = play.stage, f"{spec.name}:output"
    if stage.variant.rewrites_base:
        return NOTHING
    if not stage.case.whole:
        return play.compared(role, ran.y, stage.pristine_outputs[spec.name], torch.zeros((), dtype=torch.float64))
    own = {key.rpartition(".")[2]: t for key, t in play.copies().items() if key.rpartition(".")[0] == spec.name}
    base = {**stage.base(spec.name), **{tensor: leaf(t, stage.machine.exact) for tensor, t in own.items()}}
    form = layer_output(stage.machine.base, spec, base, stage.activation(spec.name, ran.x)) if own else None
    if form is None or not stage.sound(form):
        return NOTHING  # its tensors are bit-equal, and its input is another
    return play.compared(role, ran.y, form.value, judged(form, machine=stage.machine.base.store))


def _output(play: Play, name: str, given: Tensor) -> Bounded | None:
    stage, stack = play.stage, play.stacks[name]
    x = stage.activation(name, given)
    if play.off is not None:
        return None if stack.sites else layer_output(stage.machine.base, stage.spec(name), stack.top, x)
    live = _live(play, name)
    if live and stack.sites and not play.partial:
        return None
    if live and stack.sites and stage.formula.merge_many is not None:
        return None  # what an adapter adds to a layer depends there on what is merged below it
    if live:
        return stage.formula.forward(stage.machine, live, stack.top, x)
    return layer_output(stage.machine.base, stage.spec(name), stack.top, x)


def _live(play: Play, name: str) -> list[Site]:
    wanted = [adapter for adapter in play.active or () if adapter not in play.stacks[name].names]
    return [site for adapter in wanted if (site := play.site(adapter, name)) is not None]


def _ignores(play: Play, name: str, ran: Record) -> bool:
    stage, stack = play.stage, play.stacks[name]
    if not stack.sites or not _live(play, name):
        return False
    form = layer_output(stage.machine.base, stage.spec(name), stack.top, stage.activation(name, ran.x))
    return compare("", ran.y, form.value, judged(form, machine=stage.machine.base.store)).holds
