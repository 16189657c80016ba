"""What a library does not support it refuses: clearly, and before it changes anything."""

from __future__ import annotations

from dataclasses import replace

import torch

from peftcheck import models, refusal
from peftcheck.architecture import architecture, difference
from peftcheck.case import Case
from peftcheck.implementation import Claim, Implementation, Op
from peftcheck.law import law
from peftcheck.laws.plain import forward_holds
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.stage import Stage


def _judge(stage: Stage, operation: str, call) -> Measurement:
    """Return whether `call` is refused clearly and leaves base and bookkeeping alone."""
    merged = stage.attached.merged()
    try:
        call()
    except Exception as error:
        if not refusal.is_library(error, stage.implementation):
            raise
        if not refusal.is_refusal(error, stage.implementation):
            place = refusal.where(error, stage.implementation)
            return broken(
                f":{operation}", f"crash: {place}", f"{operation} is not supported here, yet it crashes: {error}"
            )
    else:
        return broken(f":{operation}", "accepted", f"{operation} is not supported here, yet it went through")
    tensors = stage.attached.base_tensors()
    found = [
        identical(f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", tensors[key], start, f"written by {operation}")
        for key, start in stage.start.items()
    ]
    if stage.attached.merged() != merged:
        found.append(broken(":module", f"marked by {operation}", f"bookkeeping changed by a refused {operation}"))
    return worst(found)


def attach_refused(implementation: Implementation, case: Case) -> Measurement:
    """Attach to a layer that the library does not support: refused clearly, the model left as it was."""
    model = models.build(case)
    before = architecture(model)
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters(remove_duplicate=False)}
    place = f"{case.sweep.layer}:attach"
    try:
        implementation.attach(model, case)
    except Exception as error:
        if not refusal.is_library(error, implementation):
            raise
        if not refusal.is_refusal(error, implementation):
            crash = refusal.where(error, implementation)
            return broken(
                place, f"crash: {crash}", f"{case.sweep.layer} is not supported, yet attaching crashes: {error}"
            )
        shape = difference(architecture(model), before)
        if not shape.holds:
            return broken(place, "changed by a refused attach", shape.note)
        state = dict(model.named_parameters(remove_duplicate=False))
        return worst([identical(f"{key}:base", state[key], tensor) for key, tensor in start.items()])
    return broken(place, "accepted", f"{case.sweep.layer} is declared unsupported, yet it attached")


@law(
    "refuse.attach",
    "attaching to an unsupported layer is refused clearly, and leaves the model as it was",
    (),
    "TinyLoRA and trainable tokens end in KeyError and AttributeError on layers that they do not know",
    structural=True,
    concerns=lambda variant: False,  # runs on the layers that a variant does not accept, which have no stage
)
def attach(stage: Stage) -> Measurement | None:
    """Say nothing of supported layers."""
    return None


@law(
    "refuse.merge",
    "an unsupported merge is refused clearly, and writes nothing",
    (),
    "BEFT and LoRA with bias cannot merge into a layer without bias; LoRA merges no grouped convolution",
    structural=True,
    on="methods",
)
def merge(stage: Stage) -> Measurement | None:
    """Merge, safely and not, where the library declares that it does not."""
    if stage.claims(Op.MERGE) is not Claim.REFUSES:
        return None
    if len(stage.targeted) > 1:
        return None  # other layers of the model may merge before the refusal: safe_merge.all_or_nothing judges that
    unsafe = _judge(stage, "merge", lambda: stage.attached.merge(stage.names[:1], safe=False))
    safe = _judge(stage, "safe merge", lambda: stage.attached.merge(stage.names[:1], safe=True))
    return worst([unsafe, safe])


@law(
    "refuse.unload",
    "after a refused merge, unload() still gives back the base's architecture and bits",
    (Op.UNLOAD,),
    "BEFT merged into a layer without bias left another architecture behind",
    structural=True,
    on="methods",
)
def unload(stage: Stage) -> Measurement | None:
    """Let the library refuse a merge, then unload and compare with the base."""
    if stage.claims(Op.MERGE) is not Claim.REFUSES or stage.variant.rewrites_base or len(stage.targeted) > 1:
        return None
    try:
        stage.attached.merge(stage.names[:1], safe=True)
    except Exception as error:
        if not refusal.is_library(error, stage.implementation):
            raise
    else:
        return NOTHING  # refuse.merge judges that
    model = stage.attached.unload()
    shape = difference(architecture(model), stage.architecture)
    if not shape.holds:
        return shape
    state = models.tensors(model)
    return worst([identical(key, state[key], tensor) for key, tensor in stage.pristine.items()])


@law(
    "refuse.mixed_batch",
    "adapter names per row are refused clearly where the method cannot tell rows apart; nothing changes",
    (Op.FORWARD,),
    "a model that takes the names and then runs every row through the active adapters",
    structural=True,
    refuses=Op.MIXED_BATCH,
    on="methods",
)
def mixed_batch(stage: Stage) -> Measurement | None:
    """Give a name per row where the library declares no mixed batches."""
    if stage.claims(Op.MIXED_BATCH) is not Claim.REFUSES:
        return None
    if not forward_holds(stage):
        return NOTHING
    rows = (stage.names[0], stage.names[-1])
    call = models.arguments(replace(stage.case, batch=(len(rows), *stage.case.batch[1:])))
    with torch.no_grad():
        return _judge(stage, "mixed batch", lambda: stage.attached.forward(call, rows))


@law(
    "refuse.combine",
    "combining adapters of a method that does not add up is refused clearly; nothing is added, nothing written",
    (Op.FORWARD,),
    "AdaLoRA inherits LoRA's add_weighted_adapter, whose sums mean nothing for its three factors",
    structural=True,
    sweeps=lambda sweep: sweep.dtype == "float32",
    refuses=Op.COMBINE,
)
def combine(stage: Stage) -> Measurement | None:
    """Combine the first adapter with the last where the library declares that it does not."""
    if stage.claims(Op.COMBINE) is not Claim.REFUSES:
        return None
    pair, known = (stage.names[0], stage.names[-1]), stage.attached.adapters()
    found = _judge(stage, "combine", lambda: stage.attached.combine(pair, (1.0, 1.0), "cat", "combined"))
    if found.holds and stage.attached.adapters() != known:
        return broken(":combine", "left behind", f"refused, but 'combined' is registered beside {', '.join(known)}")
    return found
