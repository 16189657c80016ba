"""The steps of a sequence: each carries out one operation on the library and says what must be true after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck import models, values
from peftcheck.architecture import architecture, difference
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.programs import Step, words
from peftcheck.sequence import Play
from peftcheck.stage import Stage

Operation = Callable[..., Measurement | None]
_TRAINED = ("float64", "float32")  # where torch's CPU kernels have every backward
_LEARNING = 2.0**-6
_CHOOSES = ("activate", "add", "delete", "load")  # after these other tensors may be trained than before


def play(stage: Stage, program: Sequence[Step], numeric: bool = True, partial: bool = True) -> Measurement:
    """Play a program on a stage until a step does not hold; return the worst of what was measured.

    Raises what the library raises where it may not refuse.
    """
    with Play(stage, numeric, partial) as one:
        return steps(one, program)


def steps(play: Play, program: Sequence[Step]) -> Measurement:
    """Do the same within a play."""
    found = []
    for step in program:
        found.append(do(play, step))
        if not found[-1].holds:
            break
    return worst(found)


def do(play: Play, step: Step) -> Measurement:
    """Carry a step out, where it means anything now, and measure all that must be true after it."""
    kind, *arguments = step
    if play.over or not play.can(kind):
        return NOTHING
    play.steps.append(words(step, play.stage.names))
    play.done.append(step)
    if kind in _CHOOSES:
        play.trained = None
    found = _OPERATIONS[kind](play, *arguments)
    if kind in (*_CHOOSES, "enable"):
        play.flags()
    if found is None:
        play.steps.pop()
        play.done.pop()
        return NOTHING
    if not found.holds:
        return play.named(found, kind)
    if kind == "unmerge":
        play.oddity = ""
    return found


def _forward(play: Play, training: bool = False) -> Measurement:
    stage = play.stage
    if training:
        stage.attached.train(True)
    try:
        seen = stage.run()
    finally:
        if training:
            stage.attached.train(stage.case.train)
    if training:
        play.ran_in_training()
    # disabled adapters may be unmerged by a forward; nothing else may
    choices = (play.now(), play.nothing()) if play.off is not None else (play.now(),)
    settled = play.settle(*choices)
    drawn = training and (stage.variant.samples or any(spec.option("dropout") for spec in play.specs))
    return worst([settled, play.outputs(seen)]) if settled.holds and not drawn else settled


def _present(play: Play, indices: Sequence[int]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for index in indices if (name := play.name(index)) in play.present))


def _activate(play: Play, indices: Sequence[int]) -> Measurement | None:
    names = _present(play, indices)
    if not names:
        return None
    if play.attempt(lambda: play.stage.attached.activate(names), "activate while merged", play.merged):
        play.active = names
    return play.settle(play.now(), play.nothing())


def _added(play: Play, names: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """Return what is merged where once these are merged too; None where that, or the way back, may overflow."""
    wanted = play.now()
    for name, stack in play.stacks.items():
        sites = [
            site for adapter in names if adapter not in stack.names and (site := play.site(adapter, name)) is not None
        ]
        if not all(play.stage.sound(*level.values()) for level in play.above(stack, sites)):
            return None
        if sites and play.can("unmerge"):  # nor may the way back lead out of range
            bottom = stack.levels[0]
            room = play.way_back(bottom, [*stack.sites, *sites])
            if not play.stage.sound(*(bottom[tensor].widened(budget) for tensor, budget in room.items())):
                return None
        wanted[name] += tuple(site.adapter.name for site in sites)
    return wanted


def _merge(play: Play, indices: Sequence[int], safe: bool) -> Measurement | None:
    """Merge the adapters named; where none is, those that are active."""
    names = _present(play, indices) if indices else play.active
    wanted = _added(play, names) if names else None
    if wanted is None:
        return None
    odd, asked = play.merged or play.off is not None, names if indices else None
    done = play.attempt(lambda: play.stage.attached.merge(asked, safe=safe), "merge while merged", odd)
    return play.settle(wanted if done else play.now())


def _unmerge(play: Play) -> Measurement:
    done = play.attempt(play.stage.attached.unmerge, play.oddity or "unmerge while unmerged", not play.merged)
    return play.settle(play.nothing() if done else play.now())


def _disable(play: Play) -> Measurement | None:
    if play.off is not None:
        return None
    play.off, play.before_off = ExitStack(), play.now()
    play.off.enter_context(play.stage.attached.disabled())
    return play.settle(play.now(), play.nothing())


def _enable(play: Play) -> Measurement | None:
    if play.off is None:
        return None
    off, play.off = play.off, None
    off.close()
    return play.settle(play.now(), play.nothing(), play.before_off)


def _rescale(play: Play, index: int, factor: float) -> Measurement | None:
    name = play.name(index)
    if name not in play.present or not _scales(play, name):
        return None
    if play.attempt(lambda: play.stage.attached.rescale(name, factor), "rescale while merged", play.merged):
        play.factors[name] = factor
    return play.settle(play.now(), play.nothing())


def _scales(play: Play, adapter: str) -> bool:
    """Return whether the method's delta is proportional to alpha: else there is no scale to speak of."""
    delta, m = play.stage.formula.delta, play.stage.machine
    if delta is None:
        return False
    for name in play.stacks:
        if (site := play.site(adapter, name)) is not None:
            once = delta(m, site)
            twice = delta(m, replace(site, adapter=replace(site.adapter, alpha=2 * site.adapter.alpha)))
            return all(torch.equal(2 * form.value, twice[tensor].value) for tensor, form in once.items())
    return False


def _delete(play: Play, index: int) -> Measurement | None:
    name = play.name(index)
    if name not in play.present or len(play.present) == 1:
        return None
    if play.attempt(lambda: play.stage.attached.delete(name), "delete while merged", play.merged):
        play.present.remove(name)
        del play.adapters[name]
        play.before_off = {
            site: tuple(other for other in names if other != name) for site, names in play.before_off.items()
        }
        left = tuple(other for other in play.active or () if other != name)
        play.active = left or None  # which one a library activates then is its own choice
        if play.stage.attached.sites(name):
            return broken(
                "model:module", "left behind", f"'{name}' is deleted, yet on {play.stage.attached.sites(name)}"
            )
    return play.settle(play.now(), play.nothing())


def _add(play: Play, index: int) -> Measurement | None:
    name = play.name(index)
    if name in play.present:
        return None
    spec = play.specs[play.stage.names.index(name)]
    if play.attempt(lambda: play.stage.attached.add(spec), "add while merged", play.merged):
        play.stage.attached.train(play.stage.case.train)  # what is new may be in another mode: laws of state say so
        _fill(play, name)
        play.present.append(name)
        play.factors[name] = 1.0
    return play.settle(play.now(), play.nothing())


def _fill(play: Play, name: str) -> None:
    """Write the case's values into an adapter's own tensors; projections that others share stay as they are."""
    stage, index = play.stage, play.stage.names.index(name)
    written = {t.data_ptr() for other in play.present for t in stage.attached.adapter_tensors(other).values()}
    with torch.no_grad():
        for (site, role), tensor in stage.attached.adapter_tensors(name).items():
            hint = stage.formula.hints.get(role, "factor")
            if hint != "keep" and tensor.is_floating_point() and tensor.data_ptr() not in written:
                written |= {tensor.data_ptr()} if hint == "projection" else set()
                tensor.copy_(values.adapter(stage.case, index, site, role, tuple(tensor.shape), hint))


def _save(play: Play, index: int) -> Measurement | None:
    name = play.name(index)
    if name not in play.present or play.factors[name] != 1.0:
        return None  # whether a changed scale is stored is a library's own choice
    target = play.folder / f"at step {len(play.steps)}"
    if play.attempt(lambda: play.stage.attached.save(target, (name,)), "save while merged", play.merged):
        play.saved[name] = (target, {key: t.clone() for key, t in play.adapters[name].items()})
    return play.settle(play.now())


def _load(play: Play, index: int) -> Measurement | None:
    name = play.name(index)
    if name in play.present or name not in play.saved:
        return None
    target, tensors = play.saved[name]
    stored = target / name
    source = stored if stored.is_dir() else target
    if play.attempt(lambda: play.stage.attached.load(source, name), "load while merged", play.merged):
        play.present.append(name)
        play.factors[name] = 1.0
        play.adapters[name] = tensors  # what was saved is what must be there now
        play.stage.attached.train(play.stage.case.train)
    return play.settle(play.now(), play.nothing())


def _train(play: Play) -> Measurement | None:
    """Move every trainable tensor against its gradient, by a share of 2^-6 of the largest entry."""
    stage = play.stage
    if (
        play.merged
        or play.off is not None
        or not play.active
        or stage.case.sweep.dtype not in _TRAINED
        or stage.case.profile not in ("normal", "dyadic")
    ):
        return None
    adapters = [
        (name, key, t)
        for name in play.present
        for key, t in stage.attached.adapter_tensors(name).items()
        if t.requires_grad
    ]
    every = [t for _, _, t in adapters] + [t for t in stage.attached.base_tensors().values() if t.requires_grad]
    stage.attached.train(True)
    try:
        with torch.enable_grad():
            outputs = stage.attached.forward(stage.arguments)
            told = outputs.values() if isinstance(outputs, Mapping) else outputs  # a whole model names what it returns
            loss = sum(output.double().square().mean() for output in told if isinstance(output, Tensor))
            if not loss.requires_grad:
                return None
            gradients = torch.autograd.grad(loss, every, allow_unused=True)
    finally:
        stage.attached.train(stage.case.train)
    with torch.no_grad():
        for tensor, gradient in zip(every, gradients, strict=True):
            if gradient is not None and gradient.numel() and bool(torch.isfinite(gradient).all()):
                tensor.sub_((_LEARNING * gradient / gradient.abs().max().clamp_min(1e-30)).to(tensor.dtype))
    play.ran_in_training()
    for name, key, tensor in adapters:
        if name in play.active:
            play.adapters[name] = {**play.adapters[name], key: tensor.detach().clone()}
    return play.settle(play.now())


def _unload(play: Play) -> Measurement:
    may_refuse = play.merged
    made: list = []
    if not play.attempt(lambda: made.append(play.stage.attached.unload()), "unload while merged", may_refuse):
        return play.settle(play.now())
    # a copy trained as a whole is left to merge.unload
    return _left(play, made[0], play.nothing(), {key: t for key, t in play.held.items() if key not in play.copies()})


def _export(play: Play, safe: bool) -> Measurement | None:
    wanted = _added(play, play.active) if play.active and play.off is None else None
    if wanted is None:
        return None
    made: list = []
    call = lambda: made.append(play.stage.attached.merge_and_unload(safe=safe))  # noqa: E731
    if not play.attempt(call, "export while merged", play.merged):
        return play.settle(play.now())
    return _left(play, made[0], wanted, {**play.held, **play.copies()})


def _left(play: Play, model, wanted, kept: Mapping[str, Tensor]) -> Measurement:
    """Judge what an export or an unload gives back: the base's architecture, what is merged, and what is kept as it is."""
    play.over = True
    if play.off is not None:
        play.off.close()
        play.off = None
    shape = difference(architecture(model), play.stage.architecture)
    if not shape.holds:
        return shape
    state = models.tensors(model)
    found, touched = [], set()
    for name, stack in play.stacks.items():
        if wanted[name] == stack.names:
            continue
        forms, room = play.moved(name, stack, wanted[name])
        for tensor, budget in room.items():
            touched |= play.sharing(f"{name}.{tensor}")
            if play.numeric:
                found.append(play.compared(f"{name}:{tensor}", state[f"{name}.{tensor}"], forms[tensor].value, budget))
    found += [
        identical(f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", state[key], t)
        for key, t in kept.items()
        if key not in touched
    ]
    return worst(found)


_OPERATIONS: dict[str, Operation] = {
    "forward": _forward,
    "activate": _activate,
    "merge": _merge,
    "unmerge": _unmerge,
    "disable": _disable,
    "enable": _enable,
    "rescale": _rescale,
    "delete": _delete,
    "add": _add,
    "save": _save,
    "load": _load,
    "train": _train,
    "unload": _unload,
    "export": _export,
}
