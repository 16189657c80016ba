"""Merging where people do merge: in training mode, under autocast, in inference mode, after a move, in a copy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from types import FunctionType

import torch
from torch import Tensor, nn

from peftcheck.architecture import layout
from peftcheck.implementation import Attached, Op
from peftcheck.law import law
from peftcheck.laws.merge import merge_all
from peftcheck.laws.plain import forward_holds, merge_holds, merged_as_due, unmerge_holds
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.oracle import machine
from peftcheck.rounding import DTYPES
from peftcheck.stage import Stage
from peftcheck.staging import note_start
from peftcheck.training import UNTRAINED, backward, feeds


@law(
    "merge.in_train_mode",
    "merged in training mode, the weights are the closed form within the bound of merge.oracle",
    (Op.MERGE,),
    "LyCORIS' rank dropout acted on the delta that was merged; probabilistic methods sample while they train",
    logic=True,
)
def in_train_mode(stage: Stage) -> Measurement | None:
    """Switch to training, merge, and compare: weight synchronisation merges in the middle of training."""
    if not merge_holds(stage):
        return NOTHING
    stage.attached.train(True)
    merge_all(stage)
    return merged_as_due(stage)


@law(
    "merge.under_autocast",
    "merged under autocast(bfloat16), the weights keep their dtype and are the closed form within the bound of merge.oracle",
    (Op.MERGE,),
    "a delta computed by a matmul that autocast turns to bfloat16 loses 16 bits, and unmerging outside does not undo it",
    sweeps=lambda sweep: sweep.dtype == "float32",
    logic=True,
)
def under_autocast(stage: Stage) -> Measurement | None:
    """Merge while autocast is on, as in a training loop: the weights that are stored are not an activation.

    Only float32 is asked: autocast leaves fp64 alone, and in half precision what it would cast is cast already.
    """
    if not merge_holds(stage):
        return NOTHING
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge_all(stage)
    return merged_as_due(stage)


@law(
    "merge.under_inference_mode",
    "merged in inference mode, the weights are the closed form; outside, the model still runs, trains and unmerges",
    (Op.MERGE, Op.FORWARD),
    "tensors made in inference mode refuse autograd and in-place changes for good",
    logic=True,
)
def under_inference_mode(stage: Stage) -> Measurement | None:
    """Merge within inference mode, then look outside whether what was written is an ordinary tensor."""
    if not merge_holds(stage):
        return NOTHING
    again = unmerge_holds(stage)
    with torch.inference_mode():
        merge_all(stage)
    found = [merged_as_due(stage)]
    for key, tensor in stage.attached.base_tensors().items():
        if tensor.is_inference():
            found.append(
                broken(f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", "inference tensor", f"{key} became one")
            )
    if again and worst(found).holds:
        stage.attached.unmerge()
    return worst(found)


@law(
    "merge.under_no_grad",
    "merged under no_grad, the weights are the closed form; outside, every trained tensor still gets its gradient",
    (Op.MERGE, Op.FORWARD),
    "a delta or factor that is cached while gradients are off, and cut from the graph when training goes on",
)
def under_no_grad(stage: Stage) -> Measurement | None:
    """Merge and unmerge with gradients off, as trainers do to evaluate, then train a step as if nothing had been.

    Gradients that were there before must be there after; their values may differ by the round trip of the weights.
    """
    if stage.case.profile in UNTRAINED or not merge_holds(stage):
        return NOTHING
    again, due = unmerge_holds(stage), set()
    if again and forward_holds(stage):
        due = _reached(stage)
        stage.put_back()
    with torch.no_grad():
        merge_all(stage)
        found = [merged_as_due(stage)]
        if again and worst(found).holds:
            stage.attached.unmerge()
    if again and worst(found).holds:
        lost = sorted(due - _reached(stage))
        found += [
            broken(role, "dead gradient", f"no gradient reaches {role} after a merge under no_grad")
            for role in lost[:1]
        ]
    return worst(found)


def _reached(stage: Stage) -> set[str]:
    """Return the trained tensors of the adapters that a backward pass in evaluation reaches."""
    backward(stage, feeds(stage, 3))
    held = {
        f"{site}:{role}": t for name in stage.names for (site, role), t in stage.attached.adapter_tensors(name).items()
    }
    return {role for role, tensor in held.items() if tensor.grad is not None}


def _casts(stage: Stage) -> torch.dtype | None:
    """Return another dtype that the variant takes, by the case's own seed: float32 or half, where models are cast to."""
    others = sorted(name for name in stage.variant.dtypes if name not in (stage.case.sweep.dtype, "float64"))
    return DTYPES[others[stage.case.values % len(others)]] if others else None


def cast_stage(stage: Stage) -> Stage | None:
    """Move the adapted model to another dtype, and return the stage that takes what is stored then for the start."""
    dtype = _casts(stage)
    if dtype is None:
        return None
    for model in _models(stage.attached):
        model.to(dtype)
    cast = replace(stage, machine=machine(dtype, dtype, False))
    cast._sites, cast._stored, cast._merged = {}, {}, {}
    note_start(cast)
    return cast


@law(
    "merge.after_to_dtype",
    "after model.to(dtype) the merged weights have that dtype and are its closed form within the bound of merge.oracle",
    (Op.MERGE,),
    "plain tensors and caches that .to() does not reach stay in the old dtype",
    concerns=lambda variant: bool(variant.dtypes & {"bfloat16", "float16"}),
    logic=True,
)
def after_to_dtype(stage: Stage) -> Measurement | None:
    """Cast the adapted model whole, take what is stored then as the start, and merge."""
    if not merge_holds(stage):
        return NOTHING
    cast = cast_stage(stage)
    if cast is None:
        return None
    dtype = cast.machine.base.store.dtype
    for key, tensor in cast.start.items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            return broken(
                f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", "dtype", f"{tensor.dtype} after .to({dtype})"
            )
    if (
        any(not bool(t.isfinite().all()) for own in cast.start_adapters.values() for t in own.values())
        or not cast.finite
    ):
        return None
    merge_all(cast)
    return merged_as_due(cast)


def _models(attached: Attached) -> list[nn.Module]:
    return [root for root in attached.roots() if isinstance(root, nn.Module)]


_CHANNELS_LAST = {"conv2d": torch.channels_last, "conv3d": torch.channels_last_3d}


@law(
    "merge.channels_last",
    "in channels_last, merge and unmerge keep the strides, and the weights are the closed form",
    (Op.MERGE,),
    "a reshape that reads strides for shapes; a merge that quietly makes the weight contiguous again",
    sweeps=lambda sweep: sweep.layer in _CHANNELS_LAST,
    logic=True,
)
def channels_last(stage: Stage) -> Measurement | None:
    """Move the model to channels_last, merge and unmerge, and compare values and strides."""
    if not merge_holds(stage):
        return NOTHING
    again = unmerge_holds(stage)
    for model in _models(stage.attached):
        model.to(memory_format=_CHANNELS_LAST[stage.case.sweep.layer])
    before = {key: layout(tensor) for key, tensor in stage.attached.base_tensors().items()}
    merge_all(stage)
    found = [merged_as_due(stage), *_strides(stage, before, "merge")]
    if again and worst(found).holds:
        stage.attached.unmerge()
        found += _strides(stage, before, "unmerge")
    return worst(found)


def _strides(stage: Stage, before: dict[str, tuple], what: str) -> list[Measurement]:
    now = stage.attached.base_tensors()
    return [
        broken(
            f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}",
            "strides",
            f"{layout(now[key])} after {what}, was {was}",
        )
        for key, was in before.items()
        if layout(now[key]) != was
    ]


@law(
    "merge.after_deepcopy",
    "a deep copy holds equal tensors, shares no storage, merges to the closed form, and leaves the original alone",
    (Op.MERGE,),
    "projections that a copy shares with the original; wrappers that a copy leaves pointing at the old layers",
    logic=True,
)
def after_deepcopy(stage: Stage) -> Measurement | None:
    """Copy the adapted model, merge the copy, and compare both."""
    if not merge_holds(stage):
        return NOTHING
    try:
        twin = copy.deepcopy(stage.attached)
    except (TypeError, RuntimeError) as error:  # what Python and torch raise of what cannot be copied
        return broken(":model", "not copyable", f"{type(error).__name__}: {error}")
    return _copied(stage, twin)


def _copied(stage: Stage, twin: Attached) -> Measurement:
    found = [*_equal(stage, twin), *_apart(_held(stage.attached, stage.names), _held(twin, stage.names))]
    if not worst(found).holds:
        return worst(found)
    copied = replace(stage, attached=twin)
    merge_all(copied)
    return worst([merged_as_due(copied), *_untouched(stage)])


@law(
    "merge.after_pickle",
    "a model that was pickled and read back holds equal tensors, merges to the closed form, and is independent",
    (Op.MERGE,),
    "state that pickling leaves out: what a class keeps beside its attributes, references that are weak",
    sweeps=lambda sweep: sweep.dtype == "float32",
    logic=True,
)
def after_pickle(stage: Stage) -> Measurement | None:
    """Pickle the adapted model in memory and read that very object back; functions stand for themselves."""
    if not merge_holds(stage):
        return NOTHING
    try:
        twin = _through_pickle(stage.attached)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        return broken(":model", "not picklable", f"{type(error).__name__}: {error}")
    return _copied(stage, twin)


def _through_pickle(value: Attached) -> Attached:
    """Return a copy by way of pickle. Functions without a name of their own are passed by reference."""
    functions: dict[str, FunctionType] = {}

    class Writer(pickle.Pickler):
        def persistent_id(self, one: object) -> str | None:
            if not isinstance(one, FunctionType) or "<" not in one.__qualname__:
                return None
            functions[str(id(one))] = one
            return str(id(one))

    class Reader(pickle.Unpickler):
        def persistent_load(self, key: str) -> FunctionType:
            return functions[key]

    stream = io.BytesIO()
    Writer(stream).dump(value)
    return Reader(io.BytesIO(stream.getvalue())).load()


def _held(attached: Attached, names: Sequence[str]) -> dict[str, Tensor]:
    """Return every tensor of a model and its adapters under a name."""
    found = {f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}": t for key, t in attached.base_tensors().items()}
    for name in names:
        found |= {f"{site}:{role}": t for (site, role), t in attached.adapter_tensors(name).items()}
    return found


def _equal(stage: Stage, twin: Attached) -> list[Measurement]:
    found = []
    for name in stage.names:
        own, copied = stage.attached.adapter_tensors(name), twin.adapter_tensors(name)
        if own.keys() != copied.keys():
            return [
                broken(":adapter", "lost", f"the copy has {len(copied)} tensors of '{name}', the original {len(own)}")
            ]
        found += [identical(f"{site}:{role} of the copy", copied[site, role], t) for (site, role), t in own.items()]
    copied = twin.base_tensors()
    found += [
        identical(f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", copied[key], t)
        for key, t in stage.start.items()
    ]
    return found


def _apart(original: dict[str, Tensor], copied: dict[str, Tensor]) -> list[Measurement]:
    own = {tensor.untyped_storage().data_ptr() for tensor in original.values() if tensor.numel()}
    return [
        broken(role, "shared with the copy", f"{role} of the copy lies in the original's storage")
        for role, tensor in copied.items()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in own
    ]


def _untouched(stage: Stage) -> list[Measurement]:
    """Compare the original with its start after the copy was merged."""
    tensors = stage.attached.base_tensors()
    found = [
        identical(
            f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", tensors[key], start, "changed by the copy's merge"
        )
        for key, start in stage.start.items()
    ]
    if any(stage.attached.merged().values()):
        found.append(broken(":module", "marked by the copy's merge", "the original counts as merged"))
    return found
