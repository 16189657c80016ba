"""What scripts do for the laws of training, and of merging where training merges."""

from __future__ import annotations

from peftcheck.repro import merging
from peftcheck.repro.model import indented, literal
from peftcheck.repro.scene import Scene, compared
from peftcheck.rounding import judged

FRESH = frozenset({"train.identity_at_init"})  # the script leaves the adapters as the library made them


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
