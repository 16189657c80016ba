"""DoRA on one layer: m (W + s B A) / norm(W + s B A), the norm per output (Liu et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcheck.case import AdapterSpec
from peftcheck.implementations.reference.layers import Geometry, geometry, per_output, rows
from peftcheck.implementations.reference.lora import LowRank

Tensors = dict[str, Tensor]


class Decomposed(nn.Module):
    """Hold a LoRA and a magnitude m (n_out), at first the norm of the weight: then nothing changes.

    The norm is that of the unmerged weight plus this adapter's own delta, however many adapters there are. `gain` is
    m / norm as it was when the adapter was merged: unmerging has no unmerged weight to compute it from.
    """

    mixes: ClassVar[bool] = False  # in a batch of several adapters: its norm is that of one weight
    roles: ClassVar[dict[str, str]] = {"low.A": "A", "low.B": "B", "magnitude": "magnitude"}

    def __init__(self, site: str, layer: nn.Module, adapter: AdapterSpec, dtype: torch.dtype) -> None:
        super().__init__()
        g = geometry(site, layer)
        if g.groups > 1:
            raise ValueError(f"DoRA '{adapter.name}' on '{site}': a convolution with groups is not supported")
        self.low = LowRank(site, layer, adapter, dtype)
        self.site, self.name, self.options = site, adapter.name, adapter.options
        self.gain: Tensor | None = None
        self.magnitude = nn.Parameter(_norm(g, layer.weight.detach().to(dtype)).flatten())

    def rescale(self, factor: float) -> None:
        """Set the scale of the delta to `factor` times what the configuration says."""
        self.low.rescale(factor)

    def configuration(self) -> dict[str, Any]:
        """Return what is stored beside the tensors, as JSON data."""
        return self.low.configuration()

    def restore(self, configuration: dict[str, Any]) -> None:
        """Take the stored scale."""
        self.low.restore(configuration)

    def delta(self, layer: nn.Module) -> Tensors:
        """Refuse: the change depends on the weight, it is no delta of the adapter's own."""
        raise ValueError(f"DoRA '{self.name}' normalizes '{self.site}': it has no delta")

    def _gain(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return m / norm(W + s B A) in the shape that multiplies the stored weight."""
        g = geometry(self.site, layer)
        return rows(g, self.magnitude) / _norm(g, weight + self.low.delta(layer)["weight"])

    def around(self, layer: nn.Module, plain: Callable, x: Tensor, bare: Callable[[], Tensors]) -> Tensor:
        """Return b + g (y - b) + g s B A x, where y = plain(x): the bias is not normalized."""
        g, y = geometry(self.site, layer), plain(x)
        gain = per_output(g, self._gain(layer, bare()["weight"]).flatten())
        change = gain * self.low.path(layer, x)
        if g.kind == "embedding":
            return gain * y + change
        linear = y if layer.bias is None else y - per_output(g, layer.bias)
        return y + ((gain - 1) * linear + change)

    def merge(self, layer: nn.Module, tensors: Tensors, bare: Callable[[], Tensors]) -> Tensors:
        """Return the weight that changes, g (W + s B A), rounded to its own dtype at the end; keep g."""
        weight = tensors["weight"]
        self.gain = self._gain(layer, bare()["weight"])
        return {"weight": (self.gain * (weight + self.low.delta(layer)["weight"])).to(weight.dtype)}

    def unmerge(self, layer: nn.Module, tensors: Tensors) -> Tensors:
        """Return the weight that changes, W / g - s B A with the g of the merge; ValueError where that is zero."""
        if self.gain is None or bool((self.gain == 0).any()):
            raise ValueError(f"DoRA '{self.name}' cannot be unmerged from '{self.site}': a magnitude is zero")
        weight = tensors["weight"]
        return {"weight": (weight / self.gain - self.low.delta(layer)["weight"]).to(weight.dtype)}


def _norm(g: Geometry, weight: Tensor) -> Tensor:
    """Return the norm of what each output sums over, in the shape that multiplies the stored weight."""
    dims = (0,) if g.kind in ("transposed", "embedding") else tuple(range(1, weight.dim()))
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
