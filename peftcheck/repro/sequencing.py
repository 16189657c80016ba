"""What scripts do for the laws of sequences: the steps until one does not hold, and what is due after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftcheck import refusal
from peftcheck.engine import Scene as Live
from peftcheck.laws.sequence import programs_of, sound
from peftcheck.measurement import Measurement
from peftcheck.operations import do
from peftcheck.programs import Step
from peftcheck.repro.model import indented, literal, number
from peftcheck.repro.scene import Scene, compared, named
from peftcheck.sequence import Play
from peftcheck.sequence_outputs import IGNORED
from peftcheck.spelling import text

LAWS = ("merge.guarded", "merge.subset", "merge.order", "state.sequence")
_SHAPES = ("module type", "attributes", "hooks", "training flag", "tensor", "module lost", "module added")
_TRAIN = (
    "def step():",
    "    own = [p for p in model.train().parameters() if p.requires_grad]",
    "    grads = torch.autograd.grad(sum(y.double().square().mean() for y in run()), own, allow_unused=True)",
    "    for p, g in zip(own, grads):",
    "        p.data.sub_(0 if g is None else (2**-6 * g / g.abs().max().clamp_min(1e-30)).to(p.dtype))",
)


@dataclass
class Failed:
    """A play at the step that did not hold: what was measured, or None where the library raised an error."""

    play: Play
    found: Measurement | None


def _failure(scene: Scene, law: str) -> Failed | None:
    """Play the law's programs again, each from the start; where none fails alone, all of them in a row."""
    live = Live(scene.stage.implementation, scene.stage.case)
    live.attach()
    numeric, programs = sound(live.stage), programs_of(law, scene.stage.case)
    for steps in (*programs, [step for one in programs for step in one]):
        with Play(live.stage, numeric, law != "state.sequence") as play:
            failed = _until(play, steps)
        if failed is not None:
            scene.stage.attached = live.stage.attached
            return failed
        live.stage.put_back()
    return None


def _until(play: Play, steps: Sequence[Step]) -> Failed | None:
    for step in steps:
        try:
            found = do(play, step)
        except Exception as error:
            if not refusal.is_library(error, play.stage.implementation):
                raise
            return Failed(play, None)
        if not found.holds:
            return Failed(play, found)
    return None


def body(scene: Scene, law: str) -> list[str] | None:
    """Carry the steps out, and compare what did not hold with what is due."""
    failed = _failure(scene, law)
    if failed is None or failed.found is None:
        return None
    judged = _judged(scene, failed.play, failed.found)
    last = failed.play.done[-1]
    if last[0] == "forward" and failed.found.role.endswith(":output"):  # the comparison itself runs the layer
        failed.play.done.pop()
        judged = ["model.train()", *judged] if last[1:] == (True,) and judged else judged
    steps = _spelled(scene, failed.play)
    return None if steps is None or judged is None else [*_prelude(scene, failed.play), *steps, *judged]


def crash(scene: Scene, law: str) -> list[str] | None:
    """Carry the steps out, the last of which ends in an error."""
    failed = _failure(scene, law)
    steps = _spelled(scene, failed.play) if failed is not None and failed.found is None else None
    return None if steps is None else [*_prelude(scene, failed.play), *steps]


def _prelude(scene: Scene, play: Play) -> list[str]:
    """Return what the steps need: how the model is run, one step of training, a way to live with refusals."""
    kinds, lines = {step[0] for step in play.done}, []
    if {"save", "load"} & kinds:
        lines.append("import pathlib, tempfile")
    if play.refused:
        lines.append("import contextlib")
    if {"forward", "train"} & kinds:
        lines.append(scene.run())
    if "train" in kinds:
        lines += [*_TRAIN, f"    model.train({scene.stage.case.train})"]
    return lines


def _spelled(scene: Scene, play: Play) -> list[str] | None:
    """Return the steps as calls into the library; None where one of them has no spelling."""
    lines: list[str] = []
    for index, step in enumerate(play.done):
        own = list(_calls(scene, play, step))
        if not own:
            return None
        lines += (
            ["with contextlib.suppress(Exception):  # it may refuse", *indented(own)] if index in play.refused else own
        )
    return lines


def _calls(scene: Scene, play: Play, step: Step) -> Iterator[str]:
    """Yield the calls of one step; nothing where the library's spelling lacks it."""
    say, case, (kind, *arguments) = scene.say, scene.stage.case, step
    mode = f"model.train({case.train})"
    names = arguments and isinstance(arguments[0], tuple) and [play.name(index) for index in arguments[0]]
    name = play.name(arguments[0]) if arguments and isinstance(arguments[0], int) else ""
    if kind == "forward":
        yield f"model.train(); run(); {mode}" if arguments and arguments[0] else "run()"
    elif kind == "merge":
        yield say.merge(names or None, arguments[1])
    elif kind == "unmerge":
        yield say.unmerge
    elif kind == "disable":
        yield f"off = {say.disabled}; off.__enter__()"
    elif kind == "enable":
        yield "off.__exit__(None, None, None)"
    elif kind == "train":
        yield "step()"
    elif kind == "unload":
        yield f"exported = {say.unload}"
    elif kind == "export":
        yield f"exported = {say.export(None, arguments[0])}"
    elif kind == "activate" and say.activate:
        yield say.activate(names)
    elif kind == "rescale" and say.rescale:
        yield say.rescale(name, arguments[1])
    elif kind == "delete" and say.delete:
        yield say.delete(name)
    elif kind == "save" and say.save:
        yield "folder = pathlib.Path(tempfile.mkdtemp())"
        yield say.save("folder", (name,))
    elif kind == "load" and say.load:
        yield f"own = folder / {text(name)} if (folder / {text(name)}).is_dir() else folder"
        yield f"{say.load('own', name)}; {mode}"
    elif kind == "add" and say.add:
        yield from (f"{say.add(name)}; {mode}", *_refilled(scene, name))


def _refilled(scene: Scene, adapter: str) -> list[str]:
    """Return the line that gives an adapter, added anew, the values that it had at the start."""
    names = {id(tensor): name for name, tensor in reversed(named(scene.say.root(scene.stage.attached)).items())}
    own = scene.stage.attached.adapter_tensors(adapter)
    values = {names[id(t)]: scene.stage.start_adapters[adapter][key] for key, t in own.items() if id(t) in names}
    return (
        [f"fill(model, {{{', '.join(f'{text(k)}: {number(v.double().tolist())}' for k, v in values.items())}}})"]
        if values
        else []
    )


def _judged(scene: Scene, play: Play, found: Measurement) -> list[str] | None:
    """Return the lines that compare what the last step left with what is due."""
    name, _, tensor = found.role.partition(":")
    symptom = found.symptom.partition(" after ")[0]
    if found.role in play.due and symptom in ("numeric", "non-finite", IGNORED):
        expected, allowed = play.due[found.role]
        note = "# expected: by the closed form, computed in fp64 outside the library"
        return [
            _found(scene, play, name, tensor),
            note,
            *compared(literal(expected), allowed.broadcast_to(expected.shape)),
        ]
    if tensor.endswith(" of the adapter") and symptom == "changed":
        return _of_adapter(scene, play, name, tensor.removesuffix(" of the adapter"))
    if symptom == "changed" and f"{name}.{tensor}" in play.held:
        return [_found(scene, play, name, tensor), *compared(literal(play.held[f"{name}.{tensor}"]))]
    if symptom == "bookkeeping":
        return _equal(f"list({scene.say.merged(name)})", repr(list(play.now()[name])))
    if symptom == "strides" and tensor in ("weight", "bias"):
        steps = "[s for s, n in zip({t}.stride(), {t}.shape) if n > 1]".replace("{t}", scene.say.base(name, tensor))
        return _equal(steps, repr(list(play.marks[f"{name}.{tensor}"][3])))
    if symptom == "marks":
        place, _, own = name.rpartition(".")
        now, marked = scene.say.base(place, own), play.marks[name]
        return _equal(f"({now}.dtype, tuple({now}.shape), {now}.requires_grad)", repr(marked[:3]))
    if symptom == "training flag" and not play.over:
        return _equal("any(m.training for m in model.modules())", str(scene.stage.case.train))
    if play.over and symptom in _SHAPES:
        return [
            "after = described(exported)",
            "names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]",
            'print("found:", {n: after.get(n) for n in names}, "expected:", {n: before.get(n) for n in names})',
            "raise SystemExit(int(bool(names)))",
        ]
    return None


def _found(scene: Scene, play: Play, name: str, tensor: str) -> str:
    if tensor == "output":
        return f"found = {scene.runs(name, literal(play.runs[name].x))}.detach()"
    if play.over:
        return f"found = exported.get_submodule({text(name)}).{tensor}.detach()"
    return f"found = {scene.say.base(name, tensor)}.detach().clone()"


def _equal(found: str, expected: str) -> list[str]:
    return [
        f"found, expected = {found}, {expected}",
        'print("found:", found, "expected:", expected)',
        "raise SystemExit(int(found != expected))",
    ]


def _of_adapter(scene: Scene, play: Play, site: str, role: str) -> list[str] | None:
    """Compare an adapter's tensor with what it was."""
    names: dict[int, str] = {id(tensor): name for name, tensor in named(scene.say.root(scene.stage.attached)).items()}
    for adapter, tensors in play.adapters.items():
        now = scene.stage.attached.adapter_tensors(adapter).get((site, role))
        due: Tensor | None = tensors.get((site, role))
        if now is not None and due is not None and not torch.equal(now, due) and id(now) in names:
            return [f"found = tensors(model)[{text(names[id(now)])}].detach()", *compared(literal(due))]
    return None
