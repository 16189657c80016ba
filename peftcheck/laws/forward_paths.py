"""The forward pass where people run it: recomputed by gradient checkpointing, compiled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftcheck import attention, values
from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.laws.plain import forward_holds
from peftcheck.measurement import NOTHING, Measurement, broken, compare, identical, worst
from peftcheck.rounding import judged
from peftcheck.stage import Stage
from peftcheck.training import UNTRAINED, feeds, parameters


@law(
    "forward.checkpointed",
    "gradients of a layer under gradient checkpointing are those without, bit for bit",
    (Op.FORWARD,),
    "a recomputed forward that draws other noise, or finds a state that the first one changed",
    structural=True,
    logic=True,
)
def checkpointed(stage: Stage) -> Measurement | None:
    """Train a step with and without checkpointing, from the same random state, dropout included.

    Checkpointing puts torch's random state back before it recomputes, and the same kernels run in the same order:
    nothing is left to differ by rounding.
    """
    if stage.case.profile in UNTRAINED:
        return None
    if not forward_holds(stage):
        return NOTHING
    data = feeds(stage, 3)
    plain = _gradients(stage, data, False)
    stage.put_back()
    if not plain:
        return NOTHING
    recomputed = _gradients(stage, data, True)
    found = []
    for role, gradient in plain.items():
        if role not in recomputed:
            return broken(role, "dead gradient", f"no gradient reaches {role} under checkpointing")
        found.append(identical(role, recomputed[role], gradient, "other gradient"))
    return worst(found)


def _gradients(stage: Stage, data: dict[str, Tensor], recompute: bool) -> dict[str, Tensor]:
    """Return the gradient of every adapter tensor that one backward pass reaches, by site and role."""
    torch.default_generator.manual_seed(stage.case.values)
    stage.attached.train(True)
    for tensor in parameters(stage).values():
        tensor.grad = None
    loss = torch.zeros((), dtype=torch.float64)
    for name in stage.targeted:
        spec, layer, x = stage.spec(name), stage.attached.layer(name), data[name]
        y = (
            checkpoint(attention.run, spec, layer, x, use_reentrant=False)
            if recompute
            else attention.run(spec, layer, x)
        )
        weights = values.normal(f"{stage.case.values}|target|{name}", tuple(y.shape))
        loss = loss + (y.double() * weights).sum()
    if loss.requires_grad:
        loss.backward()
    held = {
        f"{site}:{role}": tensor
        for adapter in stage.names
        for (site, role), tensor in stage.attached.adapter_tensors(adapter).items()
    }
    return {role: tensor.grad.clone() for role, tensor in held.items() if tensor.grad is not None}


_COMPILED = frozenset({"linear", "conv2d"})


@law(
    "forward.compiled",
    "abs(compiled adapted(x) - closed form(x)) <= running error bound, before and after the adapters were disabled",
    (Op.FORWARD,),
    "a trace that keeps the adapters, the scale or the merged state of its first call",
    logic=True,
    sweeps=lambda sweep: sweep.dtype == "float32" and sweep.layer in _COMPILED,
)
def compiled(stage: Stage) -> Measurement | None:
    """Compile each adapted layer (the eager backend: tracing and guards, no code generation), disable the adapters, enable them.

    A disabled layer may differ from the base by the reordering of its sums: the bound of the adapted output covers it.
    """
    if not stage.outputs_count:
        return None
    if not forward_holds(stage):
        return NOTHING
    torch._dynamo.reset()
    traced = {name: torch.compile(stage.attached.layer(name), backend="eager") for name in stage.targeted}
    found = _traced(stage, traced)
    if stage.can(Op.DISABLED) and not stage.variant.rewrites_base:
        with stage.attached.disabled():
            for name, layer in traced.items():
                plain = stage.pristine_outputs[name]
                with torch.no_grad():
                    output = layer(stage.inputs[name])
                found.append(
                    compare(f"{name}:disabled output", output, plain, stage.output(name, stage.inputs[name]).bound)
                )
        found += _traced(stage, traced)
    torch._dynamo.reset()
    return worst(found)


def _traced(stage: Stage, traced: dict[str, torch.nn.Module]) -> list[Measurement]:
    found = []
    for name, layer in traced.items():
        form = stage.output(name, stage.inputs[name])
        with torch.no_grad():
            output = layer(stage.inputs[name])
        if stage.sound(form):
            budget = judged(form, machine=stage.machine.base.store)
            found.append(compare(f"{name}:output", output, form.value, budget))
    return found
