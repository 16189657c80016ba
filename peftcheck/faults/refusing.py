"""Faults of refusals: what is not supported goes through, crashes, or leaves traces."""

from __future__ import annotations

import torch
from torch import nn

from peftcheck.case import Case
from peftcheck.faults.fault import REFUSALS, Fault, Port, replacing
from peftcheck.faults.tensors import own, targeted
from peftcheck.implementation import Attached, Implementation


def _accepts(port: Port, adapters=None, safe=False) -> None:
    try:
        port.inner.merge(adapters, safe)
    except REFUSALS:
        return


def _writes(port: Port, adapters=None, safe=False) -> None:
    try:
        port.inner.merge(adapters, safe)
    except REFUSALS:
        with torch.no_grad():
            next(iter(own(port, "weight").values())).add_(1)
        raise


def _crashes(port: Port, adapters=None, safe=False) -> None:
    try:
        port.inner.merge(adapters, safe)
    except REFUSALS as error:
        raise AttributeError("'NoneType' object has no attribute 'data'") from error


def _marks_bias(port: Port, adapters=None, safe=False) -> None:
    try:
        port.inner.merge(adapters, safe)
    except REFUSALS:
        port.notes["refused"] = True
        raise


def _unload_with_bias(port: Port) -> nn.Module:
    model = port.inner.unload()
    if port.notes.get("refused"):
        layer = model.get_submodule(targeted(port)[0])
        layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0], dtype=layer.weight.dtype))
    return model


def _refusing(spoil):
    """Return an attach that runs `spoil(model, error)` where the library refuses a layer."""

    def attach(implementation: Implementation, model: nn.Module, case: Case) -> Attached:
        try:
            return implementation.attach(model, case)
        except REFUSALS as error:
            spoil(model, error)
            raise

    return attach


def _combines(port: Port, adapters, weights, kind, into, **options) -> None:
    """Combine nothing, and say nothing."""


def _leave_configuration(model: nn.Module, error: Exception) -> None:
    model.adapter_config = str(error)


def _crash_attaching(model: nn.Module, error: Exception) -> None:
    raise KeyError("in_features") from error


def _refuses_merge(case: Case) -> bool:
    """Whether the one targeted layer is one that LoRA, with or without a bias, cannot merge into."""
    wanted = {target for adapter in case.adapters for target in adapter.targets}
    layers = [case.layers[target] for target in wanted]
    lacks_bias = all(adapter.option("bias") for adapter in case.adapters) and not layers[0].bias
    return len(layers) == 1 and (layers[0].groups > 1 or lacks_bias)


def _lacks_bias(case: Case) -> bool:
    wanted = {target for adapter in case.adapters for target in adapter.targets}
    return _refuses_merge(case) and not any(case.layers[target].bias for target in wanted)


_VARIANTS, _LAYERS = ("lora.bias", "lora"), ("linear", "conv1d", "conv2d")

FAULTS = (
    Fault(
        "refuse.accepts",
        "a merge that is not supported goes through without a word",
        "statement deletion, a standard mutation operator",
        ("refuse.merge",),
        replacing(merge=_accepts),
        variants=_VARIANTS,
        layers=_LAYERS,
        suits=_refuses_merge,
    ),
    Fault(
        "refuse.writes",
        "a refused merge has already changed the weight",
        "huggingface/peft#3611: the weight was assigned before the missing bias was noticed",
        ("refuse.merge", "refuse.unload"),
        replacing(merge=_writes),
        variants=_VARIANTS,
        layers=_LAYERS,
        suits=_refuses_merge,
    ),
    Fault(
        "refuse.combines",
        "adapters that do not add up are combined without a word",
        "statement deletion, a standard mutation operator",
        ("refuse.combine",),
        replacing(combine=_combines),
        variants=("ia3",),
        layers=("linear", "conv2d"),
    ),
    Fault(
        "refuse.crashes",
        "a merge that is not supported ends in an AttributeError",
        "huggingface/peft#2716: merging a LoRA bias into a layer without one",
        ("refuse.merge",),
        replacing(merge=_crashes),
        variants=_VARIANTS,
        layers=_LAYERS,
        suits=_refuses_merge,
        crashes=True,
    ),
    Fault(
        "refuse.bias-left",
        "after a refused merge unload() gives back a layer with a bias that it never had",
        "huggingface/peft#3227: BEFT on layers without bias",
        ("refuse.unload",),
        replacing(merge=_marks_bias, unload=_unload_with_bias),
        variants=("lora.bias",),
        layers=("linear", "conv2d"),
        suits=_lacks_bias,
    ),
    Fault(
        "attach.traces",
        "a refused attach leaves an attribute on the model",
        "huggingface/peft#3025: a model that remembers a configuration it no longer has",
        ("refuse.attach",),
        _refusing(_leave_configuration),
        unsupported=True,
    ),
    Fault(
        "attach.crashes",
        "attaching to a layer that is not supported ends in a KeyError",
        "replacement of an exception, a standard mutation operator",
        ("refuse.attach",),
        _refusing(_crash_attaching),
        unsupported=True,
        crashes=True,
    ),
)
