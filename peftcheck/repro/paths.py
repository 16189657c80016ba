"""What scripts do for merges in a copy, after a move to another dtype, and under modes of autograd."""

from __future__ import annotations

from dataclasses import replace

from peftcheck.laws.merge_paths import cast_stage
from peftcheck.repro import merging
from peftcheck.repro.model import indented, literal
from peftcheck.repro.scene import Scene, compared
from peftcheck.rounding import judged

_COPY = {
    "merge.after_deepcopy": ("import copy", "copy.deepcopy(model)"),
    "merge.after_pickle": ("import pickle", "pickle.loads(pickle.dumps(model))"),
}


def copied(scene: Scene, law: str) -> list[str] | None:
    """Copy the model, merge the copy, and look at what did not hold: of the copy, or of the original."""
    needs, copy = _COPY[law]
    symptom = scene.measured.symptom
    if symptom in ("not copyable", "not picklable"):
        return [
            needs,
            "try:",
            f"    {copy}",
            "except Exception as error:",
            '    print("found:", type(error).__name__, error)',
            '    print("expected: a copy")',
            "    raise SystemExit(1)",
        ]
    if symptom == "shared with the copy":
        return [
            needs,
            "place = lambda t: t.untyped_storage().data_ptr()",
            f"twin, own = {copy}, {{place(t) for t in tensors(model).values() if t.numel()}}",
            "shared = [name for name, t in tensors(twin).items() if t.numel() and place(t) in own]",
            'print("found: shared", shared, "expected: shared []")',
            "raise SystemExit(int(bool(shared)))",
        ]
    if symptom in ("numeric", "non-finite"):
        return [needs, f"model = {copy}", *merging.oracle(scene)]
    if symptom == "changed by the copy's merge":
        original = f"expected, original = {scene.current()}, model"
        return [
            needs,
            original,
            f"model = {copy}",
            *scene.merges(),
            "model = original",
            f"found = {scene.current()}",
            *compared(None),
        ]
    return None


def after_to_dtype(scene: Scene) -> list[str] | None:
    """Move the model to another dtype, merge, and compare with the closed form of what is stored then."""
    cast = cast_stage(scene.stage)
    if cast is None:
        return None
    dtype = cast.machine.base.store.dtype
    moves = f"model.to({dtype})"
    if scene.measured.symptom == "dtype":
        weight = scene.say.base(scene.site, scene.tensor)
        merges = scene.merges() if "where" in scene.measured.note else []
        return [
            moves,
            *merges,
            f"found, expected = {weight}.dtype, {dtype}",
            'print("found:", found, "expected:", expected)',
            "raise SystemExit(int(found != expected))",
        ]
    return (
        [moves, *merging.oracle(replace(scene, stage=cast))]
        if scene.measured.symptom in ("numeric", "non-finite")
        else None
    )


def within(scene: Scene, mode: str) -> list[str] | None:
    """Merge under a mode of autograd, and compare with the closed form; or look at what was written."""
    merges = [f"with torch.{mode}():", *indented(scene.merges())]
    weight = scene.say.base(scene.site, scene.tensor)
    if scene.measured.symptom == "inference tensor":
        found = f"found = {weight}.is_inference()"
        return [
            *merges,
            found,
            'print("found: an inference tensor:", found, "expected: False")',
            "raise SystemExit(int(found))",
        ]
    if scene.measured.symptom not in ("numeric", "non-finite"):
        return None
    form = scene.stage.merged(scene.site)[scene.tensor]
    note = "# expected: the closed form, computed in fp64 outside the library"
    allowed = judged(form, machine=scene.stage.machine.base.store)
    return [*merges, f"found = {scene.current()}", note, *compared(literal(form.value), allowed)]
