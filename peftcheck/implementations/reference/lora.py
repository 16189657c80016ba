"""LoRA on one layer: y = layer(x) + s B A x (Hu et al., 2021), its merge and its way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcheck.case import AdapterSpec
from peftcheck.implementations.reference.layers import convolve, geometry, mix_channels, per_output

Tensors = dict[str, Tensor]


class LowRank(nn.Module):
    """Hold A (rank, n_in, *kernel), B (n_out, rank / groups, 1, ...) and, if wanted, a bias (n_out) of B.

    `scale` is alpha / rank, or alpha / sqrt(rank) with the option `rslora` (Kalajdzievski, 2023). With `bias` the
    path is s (B A x + bias), which only a layer with a bias can take in. `rescale` multiplies the scale. In training,
    the option `dropout` drops elements of the input (of A's rows, where the input is an index).
    """

    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "bias": "B.bias"}

    def __init__(self, site: str, layer: nn.Module, adapter: AdapterSpec, dtype: torch.dtype) -> None:
        super().__init__()
        g = geometry(site, layer)
        if adapter.rank < 1 or adapter.rank % g.groups:
            raise ValueError(
                f"LoRA '{adapter.name}' on '{site}': rank {adapter.rank} is not a multiple of {g.groups} groups"
            )
        if adapter.option("bias") and g.kind == "embedding":
            raise TypeError(f"LoRA '{adapter.name}' on '{site}': an embedding has no bias to adapt")
        self.site, self.name, self.rank, self.alpha = site, adapter.name, adapter.rank, adapter.alpha
        self.options = adapter.options
        self.dropout = float(adapter.option("dropout", 0.0))
        self.scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.option("rslora") else adapter.rank)
        self.factor = 1.0
        self.A = nn.Parameter(torch.randn(adapter.rank, g.n_in, *g.kernel, dtype=dtype) / math.sqrt(g.n_in))
        self.B = nn.Parameter(torch.zeros(g.n_out, adapter.rank // g.groups, *(1,) * len(g.kernel), dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(g.n_out, dtype=dtype)) if adapter.option("bias") else None

    def rescale(self, factor: float) -> None:
        """Set the scale to `factor` times what the configuration says."""
        self.factor = factor

    def configuration(self) -> dict[str, Any]:
        """Return what is stored beside the tensors, as JSON data."""
        scale = self.factor * self.scale
        return {"rank": self.rank, "alpha": self.alpha, "scale": scale, "options": dict(self.options)}

    def restore(self, configuration: dict[str, Any]) -> None:
        """Take the stored scale: that of a combination does not follow from rank and alpha."""
        self.scale = float(configuration["scale"])

    def around(self, layer: nn.Module, plain: Callable, x: Tensor, bare: Callable[[], Tensors]) -> Tensor:
        """Return plain(x) + s (B A x + bias), where `plain` is the layer with the adapters before this one."""
        return plain(x) + self.path(layer, x)

    def path(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return s (B A x + bias) in the adapter's dtype."""
        g = geometry(self.site, layer)
        if g.kind == "embedding":
            y = self._dropped(self.A.t()[x]) @ self.B.t() * (self.factor * self.scale)
            # the layer holds its factor in the weight's dtype: another rounding of it would be another factor
            return y if g.factor is None else y * g.factor.to(layer.weight.dtype)
        x = self._dropped(x.to(self.A.dtype))
        if g.kind == "convolution":
            y = mix_channels(layer, convolve(layer, x, self.A), self.B)
        else:
            y = x @ self.A.t() @ self.B.t()
        if self.bias is not None:
            y = y + per_output(g, self.bias)
        return y * (self.factor * self.scale)

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def product(self, layer: nn.Module) -> Tensor:
        """Return s B A, (n_out, n_in, *kernel), in the adapter's dtype; raises ValueError on a grouped convolution."""
        g = geometry(self.site, layer)
        if g.groups > 1:
            # A sees all channels, so the product is a full kernel: no grouped kernel computes the same
            raise ValueError(
                f"LoRA '{self.name}' cannot merge into '{self.site}', a convolution with {g.groups} groups"
            )
        return (self.B.flatten(1) @ self.A.flatten(1)).reshape(g.n_out, g.n_in, *g.kernel) * (self.factor * self.scale)

    def delta(self, layer: nn.Module) -> Tensors:
        """Return what merging adds to each of the layer's tensors, in the adapter's dtype and the layer's layout."""
        change = self.product(layer)
        if geometry(self.site, layer).kind in ("transposed", "embedding"):
            change = change.t()
        if self.bias is None:
            return {"weight": change}
        if layer.bias is None:
            raise ValueError(f"LoRA '{self.name}' cannot merge its bias into '{self.site}', which has none")
        return {"weight": change, "bias": self.bias * (self.factor * self.scale)}

    def merge(self, layer: nn.Module, tensors: Tensors, bare: Callable[[], Tensors]) -> Tensors:
        """Return the tensors that change, delta added: the delta is rounded to their dtype, then the sum."""
        return {name: tensors[name] + change.to(tensors[name].dtype) for name, change in self.delta(layer).items()}

    def unmerge(self, layer: nn.Module, tensors: Tensors) -> Tensors:
        """Return the tensors that change, the same rounded delta subtracted."""
        return {name: tensors[name] - change.to(tensors[name].dtype) for name, change in self.delta(layer).items()}
