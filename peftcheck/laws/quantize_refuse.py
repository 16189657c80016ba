"""Merging into codes that a method knows nothing of is refused, clearly and before anything is written."""

from __future__ import annotations

from peftcheck import models, quantizers, refusal
from peftcheck.architecture import architecture, difference
from peftcheck.case import Case
from peftcheck.implementation import Implementation
from peftcheck.law import law
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.stage import Stage
from peftcheck.staging import set_up


def merge_refused(implementation: Implementation, case: Case) -> Measurement:
    """Attach to quantized layers and merge: one of the two is refused clearly, and every code stays.

    A method may well adapt a quantized layer that it cannot merge into; then the merge must say so.
    """
    model = models.build(case)
    quantizers.apply(model, case)
    before, quantizer = architecture(model), quantizers.load(case.sweep.quantizer)
    start = {spec.name: _codes(quantizer, model, spec.name) for spec in case.layers}
    role = f"{case.sweep.layer}:weight"
    try:
        implementation.attach(model, case)
    except Exception as error:
        verdict = _refusal(implementation, error, "attach")
        if not verdict.holds:
            return verdict
        shape = difference(architecture(model), before)
        if not shape.holds:
            return broken(role, "changed by a refused attach", shape.note)
        after = {spec.name: _codes(quantizer, model, spec.name) for spec in case.layers}
        return worst(identical(f"{n}:{k}", after[n][k], t) for n, codes in start.items() for k, t in codes.items())
    stage = set_up(implementation, case)
    attached = stage.attached
    try:
        attached.merge(stage.names[:1], safe=case.safe)
    except Exception as error:
        verdict = _refusal(implementation, error, "merge")
        if not verdict.holds:
            return verdict
        tensors = attached.base_tensors()
        found = [
            identical(f":{key.rpartition('.')[2]}", tensors[key], t, "written by a refused merge")
            for key, t in stage.start.items()
        ]
        if any(attached.merged().values()):
            found.append(
                broken(":module", "marked by a refused merge", "a layer is marked merged after a refused merge")
            )
        return worst(found)
    return broken(role, "accepted", f"merging into {case.sweep.quantizer} went through: {_what_it_did(stage)}")


def _codes(quantizer: quantizers.Quantizer, model, name: str) -> dict:
    return {key: tensor.detach().clone() for key, tensor in quantizer.tensors(model.get_submodule(name)).items()}


def _refusal(implementation: Implementation, error: Exception, operation: str) -> Measurement:
    if not refusal.is_library(error, implementation):
        raise error
    if refusal.is_refusal(error, implementation):
        return NOTHING
    place = refusal.where(error, implementation)
    return broken(
        f":{operation}", f"crash: {place}", f"{operation} on quantized layers crashes instead of refusing: {error}"
    )


def _what_it_did(stage: Stage) -> str:
    """Say what became of the change: discarded, written somewhere, or made of the codes."""
    try:
        values = stage.attached.base_values()
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return f"the layer can no longer be read ({type(error).__name__})"
    moved = [n for n in stage.targeted if not _same(values[f"{n}.weight"], stage.dense[f"{n}.weight"])]
    if not moved:
        return "it was marked merged and discarded, no weight changed"
    return "the weight changed, by way of its codes"


def _same(now, then) -> bool:
    return now.shape == then.shape and bool((now == then).all())


@law(
    "quantize.refuses",
    "a method without quantized merge refuses it clearly, writing nothing",
    (),
    "methods that accept any subclass of nn.Linear add a dense delta to packed codes, or to nothing at all",
    structural=True,
    concerns=lambda variant: False,  # runs where a variant must refuse, without a stage of its own
)
def refuses(stage: Stage) -> Measurement | None:
    """Say nothing of quantizers that the method merges into."""
    return None
