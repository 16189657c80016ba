"""Training a model on stage: fresh adapters, random data, gradients, steps.

Optimizers have eps and moments that underflow in half precision; a step here is a plain descent whose largest element
is fixed, so that it means the same in every dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftcheck import models, values
from peftcheck.case import EMBEDDINGS
from peftcheck.oracle import Machine, Site
from peftcheck.rounding import DTYPES, EXACT_FP64, Arithmetic, Bounded, leaf, precision
from peftcheck.stage import Stage

# Gradients of a base near the ends of its dtype's range overflow or vanish by themselves; a cancelling base is
# changed after attaching, so that a start which was cut out of the base no longer fits it.
UNTRAINED = frozenset({"huge", "subnormal", "graded", "cancelling"})
_STEP = 2.0**-4  # the largest element of a step: small beside generic values, far above the roundoff of bfloat16
_NUDGE = 2.0**-24  # how far a tensor is moved to see whether a closed form depends on it: too little to change a choice


def start_fresh(stage: Stage) -> None:
    """Write back into every adapter tensor what the library made it, in place of the case's values."""
    with torch.no_grad():
        for name, tensors in stage.fresh.items():
            held = stage.attached.adapter_tensors(name)
            for key, tensor in tensors.items():
                held[key].copy_(tensor)


def fresh_site(stage: Stage, index: int, name: str, only: str | None = None) -> Site:
    """Return a fresh adapter on a layer, each tensor (or one role only) with the bound of its start."""
    site = stage.site_of(index, name, stage.fresh[stage.case.adapters[index].name])
    dtypes = {role: t.dtype for (where, role), t in stage.fresh[site.adapter.name].items() if where == name}
    near = {
        role: stored(stage, t, dtypes[role])
        for role, t in site.tensors.items()
        if role in dtypes and only in (None, role)
    }
    return replace(site, tensors={**site.tensors, **near})


def stored(stage: Stage, tensor: Bounded, dtype: torch.dtype) -> Bounded:
    """Return a tensor with the bound of what computing and storing its start may cost; integers and zeros are exact.

    A start may have been computed in the base's dtype before it was stored in its own, and decompositions are carried
    out in single precision, whatever the model's: the coarsest of the three. They are accurate in norm, not element by
    element: (m + n) u norm(T) for the m x n matrix T, as for a QR or SVD by orthogonal transformations.
    """
    if not dtype.is_floating_point or not bool(tensor.value.any()):
        return tensor
    coarsest = max(precision(one).roundoff for one in (dtype, DTYPES[stage.case.sweep.dtype], torch.float32))
    extent = sum(tensor.value.shape[:2])
    return tensor.widened(extent * coarsest * torch.linalg.vector_norm(tensor.value))


def feeds(stage: Stage, rows: int = 8) -> dict[str, Tensor]:
    """Return random inputs for training, `rows` of them per layer, whatever the case's profile and batch.

    Of a whole model: what each layer is given in the pristine one, which takes the case's own arguments.
    """
    if stage.case.whole:
        return dict(stage.inputs)
    found = models.inputs(replace(stage.case, batch=(rows,), profile="normal"))
    for spec in stage.case.layers:
        if spec.kind in EMBEDDINGS:  # a padding row has no gradient: look up the others too
            ids = torch.tensor([i for i in range(spec.n_in) if i != spec.padding_idx or spec.n_in == 1])
            found[spec.name] = ids.repeat(-(-rows // len(ids)))
    return found


def parameters(stage: Stage) -> dict[int, Tensor]:
    """Return every tensor that an optimizer would be given, by id: of the model, and of adapters beside it."""
    found: dict[int, Tensor] = {}
    for root in stage.attached.roots():
        for tensor in root.parameters() if isinstance(root, nn.Module) else ():
            found[id(tensor)] = tensor
    for name in stage.names:
        held = stage.attached.adapter_tensors(name)
        for key in sorted(stage.attached.trainable(name)):
            found[id(held[key])] = held[key]
    return {key: tensor for key, tensor in found.items() if tensor.requires_grad}


def backward(stage: Stage, data: Mapping[str, Tensor]) -> bool:
    """Run forward and backward on random targets; return False where no output depends on a trained tensor.

    The loss is linear in the outputs, with random weights: no gradient is zero by symmetry.
    """
    for tensor in parameters(stage).values():
        tensor.grad = None
    loss = torch.zeros((), dtype=torch.float64)
    for name, output in _outputs(stage, data).items():
        if output.requires_grad:
            weights = values.normal(f"{stage.case.values}|target|{name}", tuple(output.shape))
            loss = loss + (output.double() * weights).sum()
    if not loss.requires_grad:
        return False
    loss.backward()
    return True


def _outputs(stage: Stage, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of the layers on their inputs, by name, or the tensors that a whole model returns on its own."""
    if not stage.case.whole:
        outputs = stage.attached.forward([data[spec.name] for spec in stage.case.layers])
        return {spec.name: output for spec, output in zip(stage.case.layers, outputs, strict=True)}
    returned = stage.attached.forward(stage.arguments)
    return {name: output for name, output in returned.items() if isinstance(output, Tensor)}


def descend(stage: Stage) -> None:
    """Take one step: every tensor with a gradient moves along it, its largest element by a sixteenth."""
    with torch.no_grad():
        for tensor in parameters(stage).values():
            largest = 0.0 if tensor.grad is None else float(tensor.grad.abs().max()) if tensor.grad.numel() else 0.0
            if 0.0 < largest < torch.inf:
                tensor.sub_((tensor.grad.double() * (_STEP / largest)).to(tensor.dtype))


def matters(stage: Stage, index: int, name: str, role: str, data: Mapping[str, Tensor]) -> bool:
    """Return whether the layer's output depends on an adapter's tensor, by the closed form in fp64 where training stands.

    A rotation of blocks of one, the logits of a choice of one, what feeds a unit that is off: no gradient is due to them.
    Tensors that are zero throughout are given random values first: two factors that keep each other at zero are dead.
    """
    spec = stage.spec(name)
    if spec.padding_idx is not None and spec.n_in == 1:
        return False  # the only row is the padding, which torch gives no gradient
    ideal = Arithmetic(EXACT_FP64, EXACT_FP64)
    exact = Machine(ideal, ideal, False)
    sites, base = [], stage.base(name)
    for other in stage.adapters_on(name):
        sites.append(stage.site_of(other, name, _generic(stage, other, name)))
    x = stage.activation(name, data[name])
    at = stage.adapters_on(name).index(index)
    before = stage.formula.forward(exact, sites, base, x)
    tensor = sites[at].tensors[role].value
    moved = leaf(tensor + _NUDGE * values.normal(f"{stage.case.values}|nudge|{name}|{role}", tuple(tensor.shape)))
    sites[at] = replace(sites[at], tensors={**sites[at].tensors, role: moved})
    after = stage.formula.forward(exact, sites, base, x)
    return bool(((after.value - before.value).abs() > 2 * (after.bound + before.bound)).any())


def _generic(stage: Stage, index: int, name: str) -> dict[tuple[str, str], Tensor]:
    """Return an adapter's tensors on a layer as they are now, random values in what is trained and zero."""
    case, found = replace(stage.case, profile="normal"), {}
    adapter = case.adapters[index].name
    trained = stage.attached.trainable(adapter)
    for (site, role), tensor in stage.attached.adapter_tensors(adapter).items():
        if site != name:
            continue
        hint = stage.formula.hints.get(role, "factor")
        if (site, role) in trained and hint != "keep" and not bool(tensor.any()):
            tensor = values.adapter(case, index, site, role, tuple(tensor.shape), hint)
        found[site, role] = tensor.detach().clone()
    return found
