"""Set the stage: build a case's model, attach the adapters, fill every tensor, note where everything stands."""

from __future__ import annotations

import torch
from torch import Tensor

from peftcheck import models, quantizers, values
from peftcheck.architecture import architecture
from peftcheck.case import Case
from peftcheck.implementation import Implementation, Op
from peftcheck.oracle import FORMULAS, machine
from peftcheck.recording import frozen, recorded
from peftcheck.rounding import DTYPES, precision
from peftcheck.stage import Stage


def set_up(implementation: Implementation, case: Case) -> Stage:
    """Build the model, attach the adapters, fill every tensor: the start from which each law begins.

    Raises what the library raises while attaching.
    """
    variant = implementation.variants()[case.sweep.variant]
    formula = FORMULAS[variant.formula]
    base_dtype, adapter_dtype = DTYPES[case.sweep.dtype], DTYPES[case.adapter_dtype]
    model = models.build(case)
    pristine = {name: tensor.detach().clone() for name, tensor in models.tensors(model).items()}
    arguments = models.arguments(case)
    given = {} if case.whole else dict(zip((spec.name for spec in case.layers), arguments, strict=True))
    # a model that is asked for its hidden states keeps a mark of that: here it has the mark before anything is attached
    asked = {"output_hidden_states": True} if case.whole and formula.hears else {}
    with frozen(model):  # as libraries leave the base
        plain = recorded(
            {spec.name: model.get_submodule(spec.name) for spec in case.layers},
            lambda: model(*arguments, **asked),
            given,
        )
    if case.sweep.quantizer is not None:
        quantizers.apply(model, case)
    before = architecture(model)
    attached = implementation.attach(model, case)
    stage = Stage(
        case,
        implementation,
        variant,
        formula,
        machine(base_dtype, adapter_dtype, case.profile == "dyadic"),
        attached,
        before,
        arguments,
        {name: seen.x for name, seen in plain.items()},
        pristine,
        {name: seen.y for name, seen in plain.items()},
    )
    stage.fresh = _adapter_clones(stage)
    fill(stage)
    return stage


def fill(stage: Stage) -> None:
    """Write the case's values into every adapter tensor and note where everything stands."""
    case = stage.case
    shared: set[int] = set()
    with torch.no_grad():
        for index, adapter in enumerate(case.adapters):
            for (site, role), tensor in stage.attached.adapter_tensors(adapter.name).items():
                hint = stage.formula.hints.get(role, "factor")
                if hint == "keep" or not tensor.is_floating_point() or tensor.data_ptr() in shared:
                    continue
                if hint == "projection":
                    shared.add(tensor.data_ptr())  # one projection serves several sites: write it once
                tensor.copy_(values.adapter(case, index, site, role, tuple(tensor.shape), hint))
    note_start(stage)
    if case.profile == "cancelling":
        cancel(stage)


def _adapter_clones(stage: Stage) -> dict[str, dict[tuple[str, str], Tensor]]:
    held = {adapter.name: stage.attached.adapter_tensors(adapter.name) for adapter in stage.case.adapters}
    return {name: {key: t.detach().clone() for key, t in tensors.items()} for name, tensors in held.items()}


def note_start(stage: Stage) -> None:
    """Clone every base and adapter tensor as it stands: the start that laws compare with."""
    stage.start = {name: tensor.detach().clone() for name, tensor in stage.attached.base_tensors().items()}
    if stage.case.sweep.quantizer is not None:
        stage.dense = {name: tensor.detach().clone() for name, tensor in stage.attached.base_values().items()}
    stage.start_adapters = _adapter_clones(stage)
    stage.forget()


def cancel(stage: Stage) -> None:
    """Set the base of each targeted layer to minus its delta plus a few units in the last place."""
    if stage.formula.delta is None or not stage.can(Op.MERGE):
        return
    u = precision(DTYPES[stage.case.sweep.dtype]).u
    tensors = stage.attached.base_tensors()
    with torch.no_grad():
        for name in stage.targeted:
            for site in stage.sites(name):
                own = site.spec.weight_name
                change = stage.formula.delta(stage.machine, site).get(own)
                if change is not None:
                    tensors[f"{name}.{own}"].copy_(-change.value * (1 + 4 * u))
    note_start(stage)
    with stage.attached.disabled():
        stage.pristine_outputs.update({name: seen.y.detach().clone() for name, seen in stage.run().items()})
    stage.pristine.update({key: t for key, t in stage.start.items() if key in stage.pristine})
