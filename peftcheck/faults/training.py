"""Faults of training and of the paths that training takes: starts, gradients, dropout, rows, copies, modes."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor, nn

from peftcheck.case import Case
from peftcheck.faults.fault import Fault, Port, replacing
from peftcheck.faults.outputs import changing
from peftcheck.faults.tensors import own, owner, put_back, rounded, targeted
from peftcheck.implementation import BASE
from peftcheck.rounding import DTYPES


def _tensors(port: Port) -> list[Tensor]:
    return [t for a in port.case.adapters for t in port.inner.adapter_tensors(a.name).values() if t.is_floating_point()]


def _elsewhere(port: Port) -> None:
    with torch.no_grad():
        for tensor in _tensors(port):
            tensor.add_(0.5)


def _zeros(port: Port) -> None:
    with torch.no_grad():
        for tensor in _tensors(port):
            tensor.zero_()


def _cut(port: Port) -> None:
    for tensor in _tensors(port):
        if tensor.requires_grad:
            tensor.register_hook(torch.zeros_like)


def _unfreeze(port: Port) -> None:
    for tensor in own(port).values():
        tensor.requires_grad_(True)


def _idle(port: Port, mode: bool) -> None:
    port.inner.train(False)


def _stays(port: Port, mode: bool) -> None:
    if mode:
        port.inner.train(True)


def _baked(port: Port, adapters=None, safe=False) -> None:
    """Merge; in training, what elements of the adapters dropout leaves."""
    before = {}
    if port.inner.layer(targeted(port)[0]).training:
        before = rounded(port, torch.float64)
        with torch.no_grad():
            for tensor in _tensors(port):
                tensor.copy_(nn.functional.dropout(tensor, 0.5))
    try:
        port.inner.merge(adapters, safe)
    finally:
        put_back(before)


def _in_autocast(port: Port, adapters=None, safe=False) -> None:
    before = rounded(port, torch.bfloat16) if torch.is_autocast_enabled("cpu") else {}
    try:
        port.inner.merge(adapters, safe)
    finally:
        put_back(before)


def _new_parameters(port: Port, adapters=None, safe=False) -> None:
    """Merge, and put a new parameter in the place of each weight."""
    port.inner.merge(adapters, safe)
    for tensor in own(port, "weight").values():
        module, name = owner(port, tensor)
        module._parameters[name] = nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _cut_off(port: Port, adapters=None, safe=False) -> None:
    """Merge; with gradients off, leave the adapters without any."""
    port.inner.merge(adapters, safe)
    if not torch.is_grad_enabled():
        for tensor in _tensors(port):
            tensor.requires_grad_(False)


def _old_dtype(port: Port, adapters=None, safe=False) -> None:
    port.inner.merge(adapters, safe)
    for tensor in own(port, "weight").values():
        tensor.data = tensor.data.to(DTYPES[port.case.sweep.dtype])


def _contiguous(port: Port, adapters=None, safe=False) -> None:
    port.inner.merge(adapters, safe)
    for tensor in own(port, "weight").values():
        tensor.data = tensor.data.contiguous()


def _shallow(port: Port, memo: dict) -> Port:
    return Port(port.inner, port.case, port.operations)


def _locked(port: Port) -> None:
    for site in targeted(port):
        port.inner.layer(site).lock = Lock()


def _first_row(port: Port, inputs, adapters=None):
    return port.inner.forward(inputs, adapters and (adapters[0],) * len(adapters))


def _base_adapted(port: Port, inputs, adapters=None):
    first = port.case.adapters[0].name
    return port.inner.forward(inputs, adapters and tuple(first if name == BASE else name for name in adapters))


def _ignoring(port: Port, inputs, adapters=None):
    return port.inner.forward(inputs)


def _counting(port: Port, site: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return a change that grows with every call."""
    port.notes[f"calls of {site}"] = calls = port.notes.get(f"calls of {site}", 0) + 1
    return y * torch.full((), calls, dtype=y.dtype)  # a tensor: what is recomputed is what autograd saved


def _traced(port: Port, site: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 2 * y if torch.compiler.is_compiling() else y


def _dropping(case: Case) -> bool:
    return bool(case.adapters[0].option("dropout")) and case.profile == "normal"


def _normal(case: Case) -> bool:
    return case.profile == "normal"


def _one(case: Case) -> bool:
    return len(case.adapters) == 1 and case.profile == "normal"


def _two(case: Case) -> bool:
    return len(case.adapters) > 1 and case.profile == "normal" and case.adapters[0].targets == case.adapters[1].targets


_LORA = ("lora", "lora.rslora")
_IA3 = ("ia3", "ia3.feedforward")

FAULTS = (
    Fault(
        "init.elsewhere",
        "fresh adapters change the output",
        "huggingface/peft#2819: an initialisation whose residual never reached the base",
        ("train.identity_at_init",),
        replacing(_elsewhere),
        variants=_LORA,
        suits=_normal,
    ),
    Fault(
        "init.saddle",
        "both factors of a fresh LoRA are zero, so that neither ever moves",
        "statement deletion: the random initialisation of A",
        ("train.live_gradients",),
        replacing(_zeros),
        variants=_LORA,
        layers=("linear", "conv2d"),
        suits=_normal,
    ),
    Fault(
        "hooked.gates-dead",
        "the gates of an (IA)^3 set by hooks get no gradient",
        "a gate that is read through .data or under no_grad inside its hook",
        ("train.live_gradients",),
        replacing(_cut),
        variants=_IA3,
        suits=_normal,
    ),
    Fault(
        "hooked.dropout-idle",
        "the dropout of an (IA)^3 is configured and never applied",
        "an (IA)^3 by hooks whose dropout option was never read",
        ("train.dropout",),
        replacing(train=_idle),
        variants=_IA3,
        suits=_dropping,
    ),
    Fault(
        "base.unfrozen",
        "the base requires gradients while adapters are attached",
        "huggingface/peft#1115: base parameters left trainable",
        ("train.base_frozen",),
        replacing(_unfreeze),
        suits=_normal,
    ),
    Fault(
        "dropout.idle",
        "dropout is never active",
        "statement deletion: the call of dropout",
        ("train.dropout",),
        replacing(train=_idle),
        variants=_LORA,
        suits=_dropping,
    ),
    Fault(
        "dropout.stays",
        "dropout stays active after the return to evaluation",
        "huggingface/transformers#34469: a model left in training mode",
        ("train.dropout",),
        replacing(train=_stays),
        variants=_LORA,
        suits=_dropping,
    ),
    Fault(
        "merge.dropout-baked",
        "a merge in training mode merges what dropout leaves of the delta",
        "LyCORIS: rank dropout inside get_delta_weight",
        ("train.dropout", "merge.in_train_mode"),
        replacing(merge=_baked),
        variants=_LORA,
        suits=_dropping,
    ),
    Fault(
        "merge.autocast",
        "under autocast the delta is computed from factors in bfloat16",
        "a matmul under autocast, as in the merge of most libraries",
        ("merge.under_autocast",),
        replacing(merge=_in_autocast),
        variants=_LORA,
        layers=("linear", "conv2d"),
        dtypes=("float32",),
        suits=_one,
    ),
    Fault(
        "merge.inference-tensor",
        "a merge puts new parameters in place, which in inference mode are inference tensors",
        "huggingface/peft#2918: inference tensors cannot be saved for backward",
        ("merge.under_inference_mode",),
        replacing(merge=_new_parameters),
        suits=_one,
    ),
    Fault(
        "merge.no-grad-for-good",
        "after a merge with gradients off the adapters are trained no more",
        "a cache filled under no_grad that a later forward takes for its factors",
        ("merge.under_no_grad",),
        replacing(merge=_cut_off),
        variants=("lora", "lora.rslora", "ia3"),
        suits=_one,
    ),
    Fault(
        "merge.old-dtype",
        "a merge writes the weight in the dtype that it had when the adapter was attached",
        "a cache or a plain tensor that .to() does not reach",
        ("merge.after_to_dtype",),
        replacing(merge=_old_dtype),
        suits=_one,
    ),
    Fault(
        "merge.contiguous",
        "a merge makes the weight contiguous, whatever its memory format",
        "a reshape on the way to the merged weight",
        ("merge.channels_last",),
        replacing(merge=_contiguous),
        layers=("conv2d", "conv3d"),
        suits=lambda case: _normal(case) and all(s.kernel[-1] > 1 and s.n_in // s.groups > 1 for s in case.layers),
    ),
    Fault(
        "copy.shallow",
        "a deep copy shares its tensors with the original",
        "projections kept in one store that every copy refers to",
        ("merge.after_deepcopy",),
        replacing(__deepcopy__=_shallow),
        suits=_normal,
    ),
    Fault(
        "copy.locked",
        "adapted layers hold a lock, which can neither be copied nor pickled",
        "a class of libraries that synchronise their hooks",
        ("merge.after_deepcopy", "merge.after_pickle"),
        replacing(_locked),
        layers=("linear", "conv2d"),
        dtypes=("float32",),
        suits=_normal,
    ),
    Fault(
        "mixed.first-row",
        "a mixed batch runs all rows through the adapter of the first",
        "huggingface/peft#1558: adapter_names and the order of the rows",
        ("train.mixed_batch",),
        replacing(forward=_first_row),
        variants=_LORA,
        suits=_two,
    ),
    Fault(
        "mixed.base-adapted",
        "the base's rows of a mixed batch go through the first adapter",
        "boundary mutation: the name of the base is taken for an adapter's",
        ("train.mixed_batch",),
        replacing(forward=_base_adapted),
        variants=_LORA,
        suits=_normal,
    ),
    Fault(
        "mixed.ignored",
        "the adapters' names of a mixed batch are dropped, and all rows go through the active adapters",
        "PeftModel.forward drops adapter_names for methods that do not know them",
        ("refuse.mixed_batch",),
        replacing(forward=_ignoring),
        variants=("lora.dora",),
        suits=lambda case: _normal(case) and len({t for a in case.adapters for t in a.targets}) == 1,
    ),
    Fault(
        "forward.counts-calls",
        "the output of a layer depends on how often it was called",
        "a state that gradient checkpointing does not put back before it recomputes",
        ("forward.checkpointed",),
        changing(_counting),
        layers=("linear", "conv2d"),
        suits=_one,
    ),
    Fault(
        "forward.traced",
        "a compiled layer applies its output twice over",
        "graph breaks and guards around adapters under torch.compile",
        ("forward.compiled",),
        changing(_traced),
        variants=_LORA,
        layers=("linear",),
        dtypes=("float32",),
        suits=_one,
    ),
)
