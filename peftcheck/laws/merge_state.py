"""Merging leaves alone what is not its own: bystanders, dtypes, strides, sharing, flags."""

from __future__ import annotations

from peftcheck.architecture import layout
from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.laws.merge import merge_all, merged_keys
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.stage import Stage


@law(
    "merge.isolated",
    "tensors that no adapter targets, and the adapters' own, are bit-equal after merge and after unmerge",
    (Op.MERGE,),
    "a target name that is a prefix of another layer's; a merge that scales the adapter in place",
    on="both",
)
def isolated(stage: Stage) -> Measurement | None:
    """Merge, unmerge where possible, and compare every bystander with its clone."""
    merge_all(stage)
    found = [_bystanders(stage, "merge")]
    if stage.can(Op.UNMERGE):
        stage.attached.unmerge()
        found.append(_bystanders(stage, "unmerge"))
    return worst(found)


def _bystanders(stage: Stage, after: str) -> Measurement:
    changed = merged_keys(stage)
    found = []
    tensors = stage.attached.base_tensors()
    for key, start in stage.start.items():
        if key not in tensors:
            return broken(key, "lost", f"{key} is gone after {after}")
        if key not in changed:
            found.append(identical(key, tensors[key], start))
    for adapter in stage.names:
        now = stage.attached.adapter_tensors(adapter)
        for key, start in stage.start_adapters[adapter].items():
            label = f"{key[0]}:{key[1]} of the adapter"
            if key not in now:
                return broken(label, "lost", f"{label} is gone after {after}")
            found.append(identical(label, now[key], start))
    return worst(found)


@law(
    "merge.preserves",
    "dtype, shape, strides, device, requires_grad, sharing and training flags are kept by merge and unmerge",
    (Op.MERGE,),
    "a merged bias that came back in the adapter's dtype; a weight replaced by a transposed view",
    structural=True,
    on="both",
)
def preserves(stage: Stage) -> Measurement | None:
    """Compare the bookkeeping of every base tensor and module before and after."""
    before, training = _marks(stage), _training(stage)
    merge_all(stage)
    found = _kept(before, _marks(stage), "merge")
    if found.holds and _training(stage) != training:
        found = broken("model", "training flag", "merge changed a module's training flag")
    if found.holds and stage.can(Op.UNMERGE):
        stage.attached.unmerge()
        found = _kept(before, _marks(stage), "unmerge")
    return found


def _marks(stage: Stage) -> dict[str, tuple]:
    tensors = stage.attached.base_tensors()
    owners: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        owners.setdefault(tensor.data_ptr(), []).append(key)
    return {
        key: (t.dtype, tuple(t.shape), layout(t), str(t.device), t.requires_grad, tuple(owners[t.data_ptr()]))
        for key, t in tensors.items()
    }


def _training(stage: Stage) -> dict[str, bool]:
    return {spec.name: stage.attached.layer(spec.name).training for spec in stage.case.layers}


_LABELS = ("dtype", "shape", "strides", "device", "requires_grad", "sharing")


def _kept(before: dict[str, tuple], after: dict[str, tuple], what: str) -> Measurement:
    for key, marks in before.items():
        if key not in after:
            return broken(key, "lost", f"{key} is gone after {what}")
        for label, was, now in zip(_LABELS, marks, after[key], strict=True):
            if was != now:
                return broken(key, label, f"{label} of {key} is {now} after {what}, was {was}")
    return NOTHING
