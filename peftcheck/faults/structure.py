"""Faults that only a whole model shows: other layers adapted, sharing broken on the way out, what is no layer rewritten."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from peftcheck.case import MODELS, Case
from peftcheck.faults.fault import Fault, Port, replacing
from peftcheck.faults.tensors import next_up
from peftcheck.implementation import Attached, Implementation


def _neighbour(case: Case) -> int | None:
    """Return a layer of the same shape as the first target, in another block, that no adapter targets."""
    taken = {target for adapter in case.adapters for target in adapter.targets}
    first = case.layers[case.adapters[0].targets[0]]
    last = first.name.rpartition(".")[2]
    alike = (
        index
        for index, spec in enumerate(case.layers)
        if index not in taken and spec.name.endswith(f".{last}") and replace(spec, name=first.name) == first
    )
    return next(alike, None)


def _attach_besides(implementation: Implementation, model: nn.Module, case: Case) -> Attached:
    first, *others = case.adapters
    wider = replace(first, targets=(*first.targets, _neighbour(case)))
    return implementation.attach(model, replace(case, adapters=(wider, *others)))


def _untie(port: Port, safe: bool = False, adapters=None) -> nn.Module:
    model = port.inner.merge_and_unload(safe=safe, adapters=adapters)
    for spec in port.case.layers:
        if spec.tied is not None:
            layer = model.get_submodule(spec.name)
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    return model


def _merge_into_norm(port: Port, adapters=None, safe: bool = False) -> None:
    port.inner.merge(adapters, safe)
    layers = {spec.name for spec in port.case.layers}
    tensors = port.inner.base_tensors()
    with torch.no_grad():
        next_up(
            next(
                t
                for key, t in tensors.items()
                if key.rpartition(".")[0] not in layers and t.is_floating_point() and bool(t.any())
            )
        )


def _tied(case: Case) -> bool:
    return any(spec.tied is not None for spec in case.layers)


def _add_by_any_name(port: Port, adapter) -> None:
    """Let a name that cannot be one run into whatever stands in its way."""
    if "." in adapter.name:
        raise KeyError(adapter.name)
    port.inner.add(adapter)


FAULTS = (
    Fault(
        "attach.dotted-name",
        "a name with a dot ends in the KeyError of a container",
        "torch.nn.Module.add_module: a module's name can't contain a dot",
        ("attach.names",),
        replacing(add=_add_by_any_name),
        dtypes=("float32",),
    ),
    Fault(
        "attach.besides",
        "the adapter is also put on the layer of the same name in another block",
        "huggingface/peft#2390: all-linear reached into the adapters of layers that were adapted before",
        ("attach.targets", "merge.isolated"),
        _attach_besides,
        layers=MODELS,
        suits=lambda case: _neighbour(case) is not None,
    ),
    Fault(
        "export.untied",
        "exporting gives the output layer a copy of the embedding's weight",
        "huggingface/transformers#45127: embedding and head come apart in merge_and_unload, though still said to be tied",
        ("merge.export",),
        replacing(merge_and_unload=_untie),
        layers=MODELS,
        suits=_tied,
    ),
    Fault(
        "merge.norm-written",
        "merging moves one element of a tensor that belongs to no adapted kind of layer",
        "the smallest defect that there is, where a bench of layers has nothing to show",
        ("merge.isolated",),
        replacing(merge=_merge_into_norm),
        layers=("model.llama", "model.resnet"),
    ),
)
