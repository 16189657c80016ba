"""(IA)^3 on one layer: y = l * layer(x), or layer(l * x) in feed-forward layers (Liu et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcheck.case import AdapterSpec
from peftcheck.implementations.reference.layers import columns, geometry, per_input, per_output, rows

Tensors = dict[str, Tensor]


class Gate(nn.Module):
    """Hold l: (n_out), or (n_in) with the option `feedforward`.

    In training, the option `dropout` drops elements of l - 1: a dropped gate lets its channel pass as it is.
    """

    roles: ClassVar[dict[str, str]] = {"vector": "scale"}

    def __init__(self, site: str, layer: nn.Module, adapter: AdapterSpec, dtype: torch.dtype) -> None:
        super().__init__()
        g = geometry(site, layer)
        self.site, self.name, self.rank, self.alpha = site, adapter.name, adapter.rank, adapter.alpha
        self.options = adapter.options
        self.dropout = float(adapter.option("dropout", 0.0))
        self.feedforward = bool(adapter.option("feedforward"))
        if self.feedforward and g.kind == "embedding":
            raise TypeError(f"(IA)^3 '{adapter.name}' on '{site}': the input of an embedding has no features to scale")
        self.vector = nn.Parameter(torch.ones(g.n_in if self.feedforward else g.n_out, dtype=dtype))

    def rescale(self, factor: float) -> None:
        """Refuse: a gate has no scale beside its own values."""
        raise ValueError(f"(IA)^3 '{self.name}' has no scale to change: its vector is the scale")

    def configuration(self) -> dict[str, Any]:
        """Return what is stored beside the tensors, as JSON data."""
        return {"rank": self.rank, "alpha": self.alpha, "options": dict(self.options)}

    def restore(self, configuration: dict[str, Any]) -> None:
        """Take nothing more: the vector is all there is."""

    def around(self, layer: nn.Module, plain: Callable, x: Tensor, bare: Callable[[], Tensors]) -> Tensor:
        """Return l * plain(x) or plain(l * x), where `plain` is the layer with the adapters before this one."""
        g, vector = geometry(self.site, layer), self.vector
        if self.dropout and self.training:
            vector = 1 + nn.functional.dropout(vector - 1, self.dropout)
        if self.feedforward:
            return plain(x * per_input(g, vector))
        return plain(x) * per_output(g, vector)

    def delta(self, layer: nn.Module) -> Tensors:
        """Refuse: the change depends on the weight, it is no delta of the adapter's own."""
        raise ValueError(f"(IA)^3 '{self.name}' multiplies '{self.site}': it has no delta")

    def _gains(self, layer: nn.Module) -> Tensors:
        """Return the factor of each of the layer's tensors; a gate on inputs leaves the bias alone."""
        g = geometry(self.site, layer)
        if self.feedforward:
            return {"weight": columns(g, self.vector)}
        gains = {"weight": rows(g, self.vector)}
        if getattr(layer, "bias", None) is not None:
            gains["bias"] = self.vector
        return gains

    def merge(self, layer: nn.Module, tensors: Tensors, bare: Callable[[], Tensors]) -> Tensors:
        """Return the tensors that change, multiplied and rounded once to their dtype."""
        return {name: (tensors[name] * gain).to(tensors[name].dtype) for name, gain in self._gains(layer).items()}

    def unmerge(self, layer: nn.Module, tensors: Tensors) -> Tensors:
        """Return the tensors that change, divided by the same factors; raises ValueError where one is zero."""
        if bool((self.vector == 0).any()):
            raise ValueError(f"(IA)^3 '{self.name}' cannot be unmerged from '{self.site}': its vector has a zero")
        return {name: (tensors[name] / gain).to(tensors[name].dtype) for name, gain in self._gains(layer).items()}
