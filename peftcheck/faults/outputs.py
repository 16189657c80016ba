"""Faults of the forward pass, set as hooks on the adapted layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, Case
from peftcheck.faults.fault import Attach, Fault, Port, replacing
from peftcheck.faults.tensors import targeted

Change = Callable[[Port, str, nn.Module, Tensor, Tensor], Tensor]


def changing(change: Change) -> Attach:
    """Return an attach after which `change(port, site, layer, x, y)` replaces the output of unmerged layers."""

    def start(port: Port) -> None:
        for site in targeted(port):
            layer = port.inner.layer(site)
            port.notes[site] = layer.register_forward_hook(partial(_hook, port, change, site))

    def leave(port: Port) -> None:
        for site in targeted(port):
            port.notes[site].remove()
        port.notes.clear()

    def unload(port: Port) -> nn.Module:
        leave(port)
        return port.inner.unload()

    def merge_and_unload(port: Port, safe=False, adapters=None) -> nn.Module:
        leave(port)
        return port.inner.merge_and_unload(safe=safe, adapters=adapters)

    return replacing(start, unload=unload, merge_and_unload=merge_and_unload)


def _hook(port: Port, change: Change, site: str, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    if port.inner.merged().get(site):
        return output
    return change(port, site, layer, args[0], output).to(output.dtype)


def _along_outputs(port: Port, site: str, vector: Tensor) -> Tensor:
    spec = next(spec for spec in port.case.layers if spec.name == site)
    return vector.reshape(-1, *(1,) * len(spec.kernel)) if spec.kind in CONVOLUTIONS else vector


def _gate_outputs(port: Port, site: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return l * layer(x) where layer(l * x) is due; a vector of another length is repeated or cut."""
    spec = next(spec for spec in port.case.layers if spec.name == site)
    tensors = port.inner.adapter_tensors(port.case.adapters[0].name)
    gate = tensors[site, "scale"].reshape(-1)
    plain = layer.forward(x / _along_outputs(port, site, gate).to(x.dtype))
    return plain * _along_outputs(port, site, gate[torch.arange(spec.n_out) % gate.numel()])


def _drop(port: Port, site: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.dropout(y, 0.5, training=True)


def _forget_factor(port: Port, site: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the output with the adapter's part divided by the embedding's factor."""
    spec = next(spec for spec in port.case.layers if spec.name == site)
    plain = nn.functional.embedding(x, port.inner.base_tensors()[f"{site}.weight"]) * spec.scale
    return plain + (y - plain) / spec.scale


def _shift(port: Port, site: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the adapter's part one position late, as an adapter without the layer's padding has it."""
    spec = next(spec for spec in port.case.layers if spec.name == site)
    return y.roll(1, dims=-1) if spec.kind in CONVOLUTIONS else y


def _one(case: Case) -> bool:
    return len(case.adapters) == 1 and case.profile in ("normal", "dyadic")


def _long(case: Case) -> bool:
    return _one(case) and all(spec.size[-1] > spec.kernel[-1] + 2 and spec.stride[-1] == 1 for spec in case.layers)


FAULTS = (
    Fault(
        "forward.gate-wrong-side",
        "a feed-forward layer gates its outputs where it must gate its inputs",
        "huggingface/peft#972: on which side of a feed-forward layer the gate belongs",
        ("forward.oracle", "merge.forward"),
        changing(_gate_outputs),
        variants=("ia3.feedforward",),
        layers=("linear", "conv2d"),
        suits=_one,
    ),
    Fault(
        "forward.dropout-in-eval",
        "dropout stays active in eval mode",
        "huggingface/transformers#34469: a model left in training mode",
        ("forward.oracle", "merge.forward"),
        changing(_drop),
        suits=_one,
    ),
    Fault(
        "forward.embedding-factor",
        "the adapter's part of a scaled embedding lacks the factor",
        "huggingface/peft#2825: Gemma3's scaled word embedding",
        ("forward.oracle", "merge.forward"),
        changing(_forget_factor),
        variants=("lora",),
        layers=EMBEDDINGS[1:],
        suits=_one,
    ),
    Fault(
        "forward.padding",
        "the adapter's convolution is one position off",
        "huggingface/peft#637: LoRA on convolutions",
        ("forward.oracle", "merge.forward"),
        changing(_shift),
        variants=("lora",),
        layers=("conv1d", "conv2d"),
        suits=_long,
    ),
    Fault(
        "forward.lost-layer",
        "an adapter is missing from the first layer that it was asked for",
        "huggingface/peft#2710: adapters on parameters that landed on others",
        ("forward.targets",),
        replacing(sites=lambda port, adapter: port.inner.sites(adapter)[1:]),
        suits=_one,
    ),
)
