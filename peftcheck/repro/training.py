"""What scripts do for the laws of training, and of merging where training merges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck import values
from peftcheck.implementation import BASE
from peftcheck.laws.train import drops
from peftcheck.laws.train_modes import mixed_inputs, mixed_rows, of_rows
from peftcheck.repro import merging
from peftcheck.repro.model import indented, literal
from peftcheck.repro.scene import Scene, compared, named
from peftcheck.rounding import judged
from peftcheck.spelling import text
from peftcheck.training import feeds

FRESH = frozenset(
    {"train.identity_at_init", "train.live_gradients"}
)  # the script leaves the adapters as the library made them


def in_train_mode(scene: Scene) -> list[str]:
    """Merge in training mode, and compare with the closed form."""
    return ["model.train()", *merging.oracle(scene)]


def under_autocast(scene: Scene) -> list[str] | None:
    """Merge under autocast, and compare with the closed form."""
    if scene.measured.symptom == "dtype":
        return None
    form = scene.stage.merged(scene.site)[scene.tensor]
    allowed = judged(form, machine=scene.stage.machine.base.store)
    return [
        'with torch.autocast("cpu", dtype=torch.bfloat16):',
        *indented(scene.merges()),
        f"found = {scene.current()}",
        "# expected: the closed form, computed in fp64 outside the library",
        *compared(literal(form.value), allowed),
    ]


def channels_last(scene: Scene) -> list[str] | None:
    """Merge (and unmerge) in channels_last, and compare strides with those before."""
    if scene.measured.symptom != "strides":
        return None
    formats = {"conv2d": "channels_last", "conv3d": "channels_last_3d"}
    back = [scene.say.unmerge] if "unmerge" in scene.measured.note else []
    weight = scene.say.base(scene.site, scene.tensor)
    return [
        f"model.to(memory_format=torch.{formats[scene.stage.case.sweep.layer]})",
        f"expected = {weight}.stride()",
        *scene.merges(),
        *back,
        f"found = {weight}.stride()",
        'print("found:   ", found)',
        'print("expected:", expected)',
        "raise SystemExit(int(found != expected))",
    ]


def dropout(scene: Scene) -> list[str] | None:
    """Run in training mode until two outputs differ."""
    if scene.measured.symptom != "dropout idle":
        return None
    layer = f"{scene.runs(scene.site)}.detach()"
    return [
        "model.train()",
        f"outputs = [{layer} for _ in range(300)]",
        "same = all(torch.equal(output, outputs[0]) for output in outputs)",
        'print("found: 300 outputs in training,", "all the same" if same else "they differ")',
        'print("expected: they differ, with dropout")',
        "raise SystemExit(int(same))",
    ]


def identity_at_init(scene: Scene) -> list[str] | None:
    """Run the freshly adapted layer, and compare with the base's output."""
    if scene.measured.symptom == "shape":
        return None
    expected = scene.stage.pristine_outputs[scene.site]
    allowed = (expected.double().abs() * 0 + scene.measured.bound).clamp(min=0)
    found = f"found = {scene.runs(scene.site)}.detach()"
    return [found, "# expected: the base's output, before anything was attached", *compared(literal(expected), allowed)]


def _steps(scene: Scene, count: int, rows: int = 8) -> list[str]:
    """Return a function `descend` that takes a step on random data, and a loop of as many steps.

    The loop notes in `seen` what is reached.
    """
    data = feeds(scene.stage, rows)
    outputs = {name: scene.stage.call(name, data[name]) for name in scene.stage.targeted}
    weights = {
        name: values.normal(f"{scene.stage.case.values}|target|{name}", tuple(y.shape)) for name, y in outputs.items()
    }
    items = ", ".join(
        f"(lambda x: {scene.runs(name, 'x')}, {literal(data[name])}, {literal(weights[name])})" for name in outputs
    )
    return [
        f"data, seen = [{items}], set()",
        f"for _ in range({count}):",
        "    model.zero_grad()",
        "    sum((layer(x).double() * w).sum() for layer, x, w in data).backward()",
        "    for name, p in model.named_parameters():",
        "        if p.grad is not None and p.grad.any():",
        "            seen.add(name)",
        "            p.data.sub_((p.grad.double() * (2**-4 / p.grad.abs().max())).to(p.dtype))",
    ]


def _under(scene: Scene, wanted: Tensor) -> str | None:
    """Return the name of a tensor under the model that the script holds."""
    return next(
        (name for name, tensor in named(scene.say.root(scene.stage.attached)).items() if tensor is wanted), None
    )


def live_gradients(scene: Scene) -> list[str] | None:
    """Train the fresh adapters for three steps, and see whether a gradient reaches the tensor."""
    wanted = {
        "dead gradient": "not name in seen",
        "non-finite gradient": "not tensors(model)[name].grad.isfinite().all()",
    }
    if scene.measured.symptom not in wanted:
        return None
    held = (scene.stage.attached.adapter_tensors(name) for name in scene.stage.names)
    role = scene.measured.role.partition(":")[2]
    names = [_under(scene, own[scene.site, role]) for own in held if (scene.site, role) in own]
    if not names or None in names:
        return None
    return [
        f"model.train({not drops(scene.stage)})",
        *_steps(scene, 3),
        f"found = [name for name in {names} if {wanted[scene.measured.symptom]}]",
        f'print("found: {scene.measured.symptom} of", found, "expected: a finite gradient within three steps")',
        "raise SystemExit(int(bool(found)))",
    ]


def base_frozen(scene: Scene) -> list[str] | None:
    """Take two steps with the first adapter active, and see whether a tensor moved that is none of its own."""
    stage = scene.stage
    if scene.measured.symptom != "trained" or (len(stage.names) > 1 and scene.say.activate is None):
        return None
    role = scene.measured.role.partition(":")[2]
    watched = [stage.attached.base_tensors()[f"{scene.site}.{role}"]] if " of " not in role else [
        own[scene.site, role.partition(" of ")[0]] for name in stage.names[("inactive" in role) :]
        for own in [stage.attached.adapter_tensors(name)] if (scene.site, role.partition(" of ")[0]) in own
    ]  # fmt: skip
    names = [_under(scene, tensor) for tensor in watched]
    if not names or None in names:
        return None
    activate = [scene.say.activate(stage.names[:1])] if len(stage.names) > 1 else []
    return [
        *activate,
        "model.train()",
        f"before = {{name: tensors(model)[name].detach().clone() for name in {names}}}",
        *_steps(scene, 2),
        "moved = [name for name, t in before.items() if not torch.equal(t, tensors(model)[name])]",
        'print("found: moved", moved, "expected: moved []")',
        "raise SystemExit(int(bool(moved)))",
    ]


def mixed(scene: Scene, rows: Sequence[str]) -> list[str] | None:
    """Return the lines that run a mixed batch: `outputs` holds what each layer gives."""
    if scene.say.mixed is None or scene.stage.case.whole:
        return None
    names = [spec.name for spec in scene.stage.case.layers]
    inputs = mixed_inputs(scene.stage, len(rows))
    return [
        f"names, rows = {names}, {list(rows)}",
        "nn.ModuleDict.forward = lambda self, *xs: [self.get_submodule(n)(x) for n, x in zip(names, xs)]",
        f"inputs = [{', '.join(literal(inputs[name]) for name in names)}]",
        f"outputs = {scene.say.mixed('*inputs', 'rows')}",
    ]


def mixed_batch(scene: Scene) -> list[str] | None:
    """Run a batch with an adapter for each row, and compare the rows of one of them."""
    stage, rows = scene.stage, mixed_rows(scene.stage)
    run = mixed(scene, rows)
    if run is None or scene.measured.symptom not in ("numeric", "non-finite"):
        return None
    inputs, spec = mixed_inputs(stage, len(rows)), stage.spec(scene.site)
    adapter = BASE if scene.measured.role.endswith("the base") else None
    for name in dict.fromkeys(rows):
        if (name == BASE) is not (adapter == BASE):
            continue
        own = [row for row, wanted in enumerate(rows) if wanted == name]
        form = of_rows(stage, spec, name, inputs[spec.name][own])
        with torch.no_grad():
            found = stage.attached.forward([inputs[s.name] for s in stage.case.layers], rows)[
                stage.case.layers.index(spec)
            ][own]
        allowed = judged(form, machine=stage.machine.base.store)
        if not bool(((found.double() - form.value).abs() <= allowed).all()):
            note = "# expected: the closed form, computed in fp64 outside the library"
            return [
                *run,
                f"found = outputs[{stage.case.layers.index(spec)}][{own}].detach()",
                note,
                *compared(literal(form.value), allowed),
            ]
    return None


def refused_mixed(scene: Scene) -> list[str] | None:
    """Give an adapter for each row where the library declares that it cannot."""
    rows = (scene.stage.names[0], scene.stage.names[-1])
    run = mixed(scene, rows)
    symptom = scene.measured.symptom
    if run is None or not (symptom == "accepted" or symptom.startswith("crash: ")):
        return None
    crash = symptom.removeprefix("crash: ").partition(" ")[0]
    return [
        *run[:-1],
        "try:",
        f"    {run[-1]}",
        "except Exception as error:",
        '    print("found:", type(error).__name__, error)',
        f"    raise SystemExit(int(type(error).__name__ == {text(crash)}))",
        'print("found:", outputs, "expected: a refusal, the method cannot tell rows apart")',
        "raise SystemExit(1)",
    ]


def checkpointed(scene: Scene) -> list[str] | None:
    """Compare gradients with and without gradient checkpointing."""
    stage = scene.stage
    data = feeds(stage, 3)
    outputs = {name: stage.call(name, data[name]) for name in stage.targeted}
    weights = {name: values.normal(f"{stage.case.values}|target|{name}", tuple(y.shape)) for name, y in outputs.items()}
    items = ", ".join(
        f"(lambda x: {scene.runs(name, 'x')}, {literal(data[name])}, {literal(weights[name])})" for name in outputs
    )
    return [
        "from torch.utils.checkpoint import checkpoint",
        f"data = [{items}]",
        "def gradients(recompute):",
        f"    torch.manual_seed({stage.case.values})",
        "    model.train().zero_grad()",
        "    run = lambda layer, x: checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)",
        "    sum((run(layer, x).double() * w).sum() for layer, x, w in data).backward()",
        "    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}",
        "expected, found = gradients(False), gradients(True)",
        "wrong = [n for n, g in expected.items() if n not in found or not torch.equal(found[n], g)]",
        'print("found:", {n: found.get(n) for n in wrong}, "expected:", {n: expected[n] for n in wrong})',
        "raise SystemExit(int(bool(wrong)))",
    ]
