"""Whether the plain path holds on a case, so that a law of a special path reports only what is new there.

What is wrong without the special path is found by `forward.oracle` and `merge.oracle` on the same cases: reported by a
dozen more laws it would hide what they are for.
"""

from __future__ import annotations

from collections.abc import Callable

from peftcheck import refusal
from peftcheck.implementation import Op
from peftcheck.laws.merge import merge_all
from peftcheck.measurement import Measurement, compare, worst
from peftcheck.rounding import judged
from peftcheck.stage import Stage


def forward_holds(stage: Stage) -> bool:
    """Return whether every adapted layer computes its closed form, unmerged and in evaluation."""
    return _asked(stage, "forward", lambda: _forward(stage))


def merge_holds(stage: Stage) -> bool:
    """Return whether every merged tensor is its closed form, merged in evaluation under no special mode."""
    return _asked(stage, "merge", lambda: _merge(stage))


def unmerge_holds(stage: Stage) -> bool:
    """Return whether the library claims to unmerge, and does so without an error after a plain merge."""
    return stage.can(Op.UNMERGE) and _asked(stage, "unmerge", lambda: _unmerge(stage))


def _asked(stage: Stage, path: str, ask: Callable[[], Measurement]) -> bool:
    if path not in stage.plain:
        try:
            stage.plain[path] = ask().holds
        except Exception as error:
            if not refusal.is_library(error, stage.implementation):
                raise
            stage.plain[path] = False  # the error itself is the finding of the law of the plain path
        finally:
            stage.put_back()
    return stage.plain[path]


def _forward(stage: Stage) -> Measurement:
    found = []
    for name, seen in stage.records().items():
        form = stage.output(name, seen.x)
        if stage.sound(form):
            found.append(compare(f"{name}:output", seen.y, form.value, judged(form, machine=stage.machine.base.store)))
    return worst(found)


def _merge(stage: Stage) -> Measurement:
    merge_all(stage)
    return merged_as_due(stage)


def _unmerge(stage: Stage) -> Measurement:
    merge_all(stage)
    stage.attached.unmerge()
    return worst(())


def merged_as_due(stage: Stage) -> Measurement:
    """Compare every merged tensor, in value, dtype and shape, with the closed form within its budget."""
    tensors = stage.attached.base_tensors()
    found = []
    for name in stage.targeted:
        for tensor, form in stage.merged(name).items():
            now, role = tensors[f"{name}.{tensor}"], f"{name}:{tensor}"
            budget = judged(form, machine=stage.machine.base.store)
            found.append(compare(role, now, form.value, budget))
            if now.dtype != stage.start[f"{name}.{tensor}"].dtype:
                found.append(_dtype(role, now.dtype, stage.start[f"{name}.{tensor}"].dtype))
    return worst(found)


def _dtype(role: str, now, was) -> Measurement:
    return Measurement(float("inf"), float("inf"), role, "dtype", note=f"{now} where {was} is due")
