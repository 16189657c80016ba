"""What scripts do for the laws of forward and merge."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peftcheck.implementation import Inverts, Op
from peftcheck.oracle.layers import layer_output
from peftcheck.repro.model import indented, literal
from peftcheck.repro.scene import Scene, compared, named
from peftcheck.rounding import judged
from peftcheck.spelling import text


def _roundtrip(scene: Scene, cycles: int) -> list[str]:
    stage = scene.stage
    once = [*scene.merges(), scene.say.unmerge]
    act = once if cycles == 1 else [f"for _ in range({cycles}):", *indented(once)]
    allowed = stage.roundtrip(scene.site, cycles=cycles)[scene.tensor]
    if stage.variant.inverts is Inverts.EXACT:
        allowed = torch.zeros_like(allowed)
    return [f"expected = {scene.current()}", *act, f"found = {scene.current()}", *compared(None, allowed)]


def roundtrip(scene: Scene) -> list[str]:
    """Merge and unmerge."""
    return _roundtrip(scene, 1)


def drift(scene: Scene) -> list[str]:
    """Merge and unmerge several times."""
    return _roundtrip(scene, scene.stage.case.cycles)


def oracle(scene: Scene) -> list[str]:
    """Merge, and compare with the closed form."""
    form = scene.stage.merged(scene.site)[scene.tensor]
    allowed = judged(form, machine=scene.stage.machine.base.store)
    note = "# expected: the closed form, computed in fp64 outside the library"
    return [*scene.merges(), f"found = {scene.current()}", note, *compared(literal(form.value), allowed)]


def outputs(scene: Scene) -> list[str]:
    """Run the adapted layer, and compare with the closed form."""
    x = scene.stage.inputs[scene.site]
    form = scene.stage.output(scene.site, x)
    allowed = judged(form, machine=scene.stage.machine.base.store)
    found = f"found = {scene.runs(scene.site)}.detach()"
    note = "# expected: the closed form, computed in fp64 outside the library"
    return [found, note, *compared(literal(form.value), allowed)]


def forward(scene: Scene) -> list[str]:
    """Run the layer adapted and merged."""
    stage, call = scene.stage, f"{scene.runs(scene.site, 'x')}.detach()"
    activation = stage.activation(scene.site, stage.inputs[scene.site])
    merged = {**stage.base(scene.site), **stage.merged(scene.site)}
    after = layer_output(stage.machine.base, stage.spec(scene.site), merged, activation)
    allowed = stage.output(scene.site, stage.inputs[scene.site]).bound + after.bound
    lines = [f"x = {scene.takes(scene.site)}", f"expected = {call}", *scene.merges(), f"found = {call}"]
    return [*lines, *compared(None, allowed)]


def delta(scene: Scene) -> list[str]:
    """Compare the delta that the library reports with what its merge changes."""
    stage = scene.stage
    own = stage.spec(scene.site).weight_name
    form, merged = (
        stage.formula.delta(stage.machine, stage.site(0, scene.site))[own],
        stage.merged(scene.site, (0,))[own],
    )
    allowed = form.bound + merged.bound
    if merged.error is not None:
        allowed = allowed + 2.0**-53 * form.ceiling()
    return [
        f"found = {scene.say.delta(scene.site, stage.names[0])}.detach()",
        f"before = {scene.current(own)}.double()",
        scene.say.merge(stage.names[:1], stage.case.safe),
        f"expected = {scene.current(own)}.double() - before",
        *compared(None, allowed),
    ]


def disable(scene: Scene) -> list[str]:
    """Run with adapters disabled: unmerged if that shows the defect, else merged."""
    stage, site = scene.stage, scene.site
    x = stage.inputs[site]
    with torch.no_grad(), stage.attached.disabled():
        unmerged = stage.call(site, x)
    same = unmerged.shape == stage.pristine_outputs[site].shape and torch.equal(unmerged, stage.pristine_outputs[site])
    same = same and stage.can(Op.MERGE, Op.UNMERGE) and stage.finite
    allowed = None
    if same:
        base, moved = stage.base(site), dict(stage.base(site))
        if site in stage.targeted:
            for tensor, room in stage.roundtrip(site).items():
                moved[tensor] = base[tensor].widened(room + stage.documented(site).get(tensor, 0.0))
        plain, after = (
            layer_output(stage.machine.base, stage.spec(site), b, stage.activation(site, x)) for b in (base, moved)
        )
        allowed = plain.bound + after.bound
    run = [
        f"with {scene.say.disabled}:",
        f"    found = {scene.runs(site)}.detach()",
    ]
    return [
        *(scene.merges() if same else ()),
        *run,
        *compared(literal(stage.pristine_outputs[site]), allowed),
    ]


SHAPE = (
    "def described(model):",
    "    kind = lambda m: (type(m).__name__, sorted(vars(m)), len(m._forward_hooks), m.training)",
    "    steps = lambda t: [step for step, n in zip(t.stride(), t.shape) if n > 1]",
    "    tensors = {n: (tuple(t.shape), t.dtype, steps(t)) for n, t in model.state_dict().items()}",
    "    return {**tensors, **{n: kind(m) for n, m in model.named_modules()}}",
)
BEFORE = "before = described(model)"
"""What a script must note before it attaches, where it describes the model in the end."""


def _exported(scene: Scene, exported: str, numbers: Callable[[], list[str]]) -> list[str] | None:
    if scene.measured.symptom in ("numeric", "non-finite", "changed"):
        return [f"exported = {exported}", *numbers()]
    if scene.measured.symptom == "tying":
        return None
    return [
        f"after = described({exported})",
        "names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]",
        "for name in names:",
        '    print(repr(name), "found:", after.get(name), "expected:", before.get(name))',
        "raise SystemExit(int(bool(names)))",
    ]


def export(scene: Scene) -> list[str] | None:
    """Merge and unload."""

    def numbers() -> list[str]:
        form = scene.stage.merged(scene.site)[scene.tensor]
        found = f"found = exported.get_submodule({text(scene.site)}).{scene.tensor}.detach()"
        return [found, *compared(literal(form.value), judged(form, machine=scene.stage.machine.base.store))]

    return _exported(scene, scene.say.export(scene.stage.names, scene.stage.case.safe), numbers)


def unload(scene: Scene) -> list[str] | None:
    """Unload without merging."""

    def numbers() -> list[str]:
        kept = scene.stage.start if scene.stage.variant.rewrites_base else scene.stage.pristine
        found = f"found = exported.get_submodule({text(scene.site)}).{scene.tensor}.detach()"
        return [found, *compared(literal(kept[f"{scene.site}.{scene.tensor}"]))]

    return _exported(scene, scene.say.unload, numbers)


def isolated(scene: Scene) -> list[str] | None:
    """Merge and unmerge, and look at what is none of the merge's business."""
    stage, root = scene.stage, scene.say.root(scene.stage.attached)
    changed = {f"{name}.{tensor}" for name in stage.targeted for tensor in stage.merged(name)}
    owned = [t for key, t in stage.attached.base_tensors().items() if key not in changed]
    owned += [t for adapter in stage.names for t in stage.attached.adapter_tensors(adapter).values()]
    watched = [name for name, t in named(root).items() if any(t is own for own in owned)]
    if scene.measured.symptom == "lost" or not watched:
        return None
    return [
        f"bits = lambda: {{name: tensors(model)[name].detach().clone() for name in {watched}}}",
        "before = bits()",
        *scene.merges(),
        "after = bits()",
        scene.say.unmerge if stage.variant.inverts is not Inverts.NEVER else "pass",
        "same = lambda n: torch.equal(before[n], after[n]) and torch.equal(before[n], bits()[n])",
        "changed = [n for n in before if not same(n)]",
        'print("found: changed", changed, "expected: changed []")',
        "raise SystemExit(int(bool(changed)))",
    ]


_MARKS = {
    "dtype": "{t}.dtype",
    "shape": "tuple({t}.shape)",
    "strides": "[s for s, n in zip({t}.stride(), {t}.shape) if n > 1]",
    "device": "{t}.device",
    "requires_grad": "{t}.requires_grad",
}


def preserves(scene: Scene) -> list[str] | None:
    """Merge and unmerge, and look at the bookkeeping of a tensor."""
    if scene.measured.symptom not in _MARKS:
        return None
    mark = _MARKS[scene.measured.symptom].format(t=scene.say.base(scene.site, scene.tensor))
    return [
        f"mark = lambda: {mark}",
        "before = mark()",
        *scene.merges(),
        "merged = mark()",
        scene.say.unmerge if scene.stage.variant.inverts is not Inverts.NEVER else "pass",
        'print("found:", merged, "merged,", mark(), "unmerged; expected:", before)',
        "raise SystemExit(int(merged != before or mark() != before))",
    ]
