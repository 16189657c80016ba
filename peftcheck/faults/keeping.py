"""Faults of what merging must leave alone, and of leaving: bystanders, dtypes, sharing, flags, exports."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from peftcheck.case import Case
from peftcheck.faults.fault import Fault, Operation, Port, replacing
from peftcheck.faults.tensors import named, next_up, own, owner, targeted


def _after_merge(spoil) -> dict[str, Operation]:
    """Return a merge after which `spoil(port, names)` runs."""

    def merge(port: Port, adapters=None, safe=False) -> None:
        port.inner.merge(adapters, safe)
        spoil(port, tuple(adapters) if adapters is not None else tuple(a.name for a in port.case.adapters))

    return {"merge": merge}


def _neighbours(case: Case) -> list[str]:
    """Return the layers that are not targeted and whose name begins with that of one that is."""
    wanted = {target for adapter in case.adapters for target in adapter.targets}
    own_names = [case.layers[target].name for target in wanted]
    others = [spec for index, spec in enumerate(case.layers) if index not in wanted and spec.tied is None]
    return [spec.name for spec in others if any(spec.name.startswith(name) for name in own_names)]


def _touch_neighbour(port: Port, names) -> None:
    with torch.no_grad():
        for name in _neighbours(port.case):
            port.inner.base_tensors()[f"{name}.weight"].add_(1)


def _scale_adapter(port: Port, names) -> None:
    with torch.no_grad():
        for tensor in port.inner.adapter_tensors(names[0]).values():
            tensor.mul_(named(port, names[0]).rank + 1)


def _widen_bias(port: Port, names) -> None:
    wide = torch.float32 if port.case.sweep.dtype == "float64" else torch.float64
    for tensor in own(port, "bias").values():
        tensor.data = tensor.data.to(wide)


def _replace_parameter(port: Port, names) -> None:
    for key, tensor in own(port, "weight").items():
        if any(spec.tied == key.rpartition(".")[0] for spec in port.case.layers):
            module, name = owner(port, tensor)
            module._parameters[name] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)


def _transpose_storage(port: Port, names) -> None:
    for tensor in own(port, "weight").values():
        tensor.data = tensor.data.transpose(0, 1).contiguous().transpose(0, 1)


def _start_training(port: Port, names) -> None:
    port.inner.train(True)


def _thaw(port: Port, names) -> None:
    for tensor in own(port, "weight").values():
        tensor.requires_grad_(not tensor.requires_grad)


def _leaving(spoil) -> dict[str, Operation]:
    """Return exports after which `spoil(port, model)` runs."""

    def unload(port: Port) -> nn.Module:
        model = port.inner.unload()
        spoil(port, model)
        return model

    def merge_and_unload(port: Port, safe=False, adapters=None) -> nn.Module:
        model = port.inner.merge_and_unload(safe=safe, adapters=adapters)
        spoil(port, model)
        return model

    return {"unload": unload, "merge_and_unload": merge_and_unload}


def _leave_attribute(port: Port, model: nn.Module) -> None:
    model.adapter_config = dict(port.case.adapters[0].options)


def _ignore(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    return None


def _leave_hook(port: Port, model: nn.Module) -> None:
    model.get_submodule(targeted(port)[0]).register_forward_hook(_ignore)


class Lookalike(nn.Module):
    """A module of another class with the tensors of the one whose place it takes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)


def _leave_class(port: Port, model: nn.Module) -> None:
    name = targeted(port)[0]
    model.set_submodule(name, Lookalike(model.get_submodule(name)))


def _unload_rounded(port: Port) -> nn.Module:
    model = port.inner.unload()
    next_up(model.get_submodule(targeted(port)[0]).weight)
    return model


@contextmanager
def _disabled_if_unmerged(port: Port):
    if any(port.inner.merged().values()):
        yield
        return
    with port.inner.disabled():
        yield


def _has_tied_target(case: Case) -> bool:
    names = {case.layers[target].name for adapter in case.adapters for target in adapter.targets}
    return any(spec.tied in names for spec in case.layers)


def _biased(case: Case) -> bool:
    return any(case.layers[target].bias for adapter in case.adapters for target in adapter.targets)


def _wide(case: Case) -> bool:
    wanted = {target for adapter in case.adapters for target in adapter.targets}
    return all(min(case.layers[target].weight_shape[:2]) > 1 for target in wanted)


_DELETION = "statement deletion, a standard mutation operator"
_ALIASED = ("linear", "embedding")

FAULTS = (
    Fault(
        "merge.neighbour",
        "merging 'proj' also changes 'proj_out'",
        "huggingface/peft#3433: unanchored matching of names",
        ("merge.isolated",),
        replacing(**_after_merge(_touch_neighbour)),
        suits=lambda case: bool(_neighbours(case)),
    ),
    Fault(
        "merge.adapter-scaled",
        "merging scales the adapter's own tensors in place",
        "huggingface/peft#654: combining rewrote the scale of its sources",
        ("merge.isolated",),
        replacing(**_after_merge(_scale_adapter)),
    ),
    Fault(
        "merge.bias-dtype",
        "the merged bias comes back in another dtype",
        "huggingface/peft#1634: (IA)^3 results in the adapter's dtype",
        ("merge.preserves",),
        replacing(**_after_merge(_widen_bias)),
        layers=("linear", "conv2d", "conv1d-transformers"),
        suits=_biased,
    ),
    Fault(
        "merge.untied",
        "the merged weight is a new parameter: what was tied to it is so no more",
        "huggingface/peft#2972: merging adapted tied embeddings",
        ("merge.preserves",),
        replacing(**_after_merge(_replace_parameter)),
        layers=_ALIASED,
        suits=_has_tied_target,
    ),
    Fault(
        "merge.strides",
        "the merged weight is a transposed view of its storage",
        "huggingface/peft#3531: layers that store their weight transposed",
        ("merge.preserves",),
        replacing(**_after_merge(_transpose_storage)),
        layers=("linear", "conv2d"),
        suits=_wide,
    ),
    Fault(
        "merge.training",
        "merging puts the model into training mode",
        "huggingface/transformers#34469: load_adapter took the model out of eval",
        ("merge.preserves",),
        replacing(**_after_merge(_start_training)),
    ),
    Fault(
        "merge.requires-grad",
        "merging flips requires_grad of the base's weight",
        "negation of a condition, a standard mutation operator",
        ("merge.preserves",),
        replacing(**_after_merge(_thaw)),
    ),
    Fault(
        "export.attribute-left",
        "unloading leaves an attribute on the model",
        "huggingface/peft#3067: unload() left peft_config behind",
        ("merge.export", "merge.unload"),
        replacing(**_leaving(_leave_attribute)),
    ),
    Fault(
        "export.hook-left",
        "unloading leaves a forward hook on a layer",
        _DELETION,
        ("merge.export", "merge.unload"),
        replacing(**_leaving(_leave_hook)),
    ),
    Fault(
        "export.class",
        "an exported layer is of another class",
        "huggingface/peft#1014: Conv1D layers came back as Linear",
        ("merge.export", "merge.unload"),
        replacing(**_leaving(_leave_class)),
    ),
    Fault(
        "unload.one-ulp",
        "unloading leaves one element of a weight one unit in the last place off",
        "the smallest defect that there is",
        ("merge.unload",),
        replacing(unload=_unload_rounded),
    ),
    Fault(
        "disabled.adapters-on",
        "adapters stay on while they are disabled",
        _DELETION,
        ("merge.disable",),
        replacing(disabled=lambda port: nullcontext()),
        suits=lambda case: case.profile != "subnormal",
    ),
    Fault(
        "disabled.stays-merged",
        "disabling a merged adapter changes nothing: it is in the weight",
        _DELETION,
        ("merge.disable",),
        replacing(disabled=_disabled_if_unmerged),
        suits=lambda case: case.profile != "subnormal",
    ),
)
