"""What goes into layers and comes out of them while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Record:
    """One layer in a run: its input and its output."""

    x: Tensor
    y: Tensor


def recorded(
    layers: Mapping[str, nn.Module], run: Callable[[], object], given: Mapping[str, Tensor] | None = None
) -> dict[str, Record]:
    """Return input and output of each layer while `run` runs the model that they are in.

    `given`: what a case gives to each layer, where that is known; a layer may take it apart into several arguments.
    """
    known = given or {}
    seen: dict[str, Record] = {}
    handles = []
    for name, layer in layers.items():
        # a library's own hooks may change the input before and the output after: look before the first, after the last
        def arrives(module: nn.Module, args: tuple, named: dict[str, Any], name: str = name) -> None:
            first = next(iter((*args, *named.values())))
            seen[name] = Record(known.get(name, first).detach().clone(), first)

        def leaves(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
            seen[name].y = (output[0] if isinstance(output, tuple) else output).detach().clone()

        handles.append(layer.register_forward_pre_hook(arrives, prepend=True, with_kwargs=True))
        handles.append(layer.register_forward_hook(leaves))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Have no parameter of a model require a gradient, for a while.

    That is no matter of gradients: of two kernels, which may differ in the last bit, torch takes one if the weight
    requires one (`should_fold` in its matmul).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
