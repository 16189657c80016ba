"""An offset on one layer's bias: y = layer(x) + c (Ben Zaken et al., 2021; BEFT for one projection)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcheck.case import AdapterSpec
from peftcheck.implementations.reference.layers import geometry, per_output

Tensors = dict[str, Tensor]


class Offset(nn.Module):
    """Hold c (n_out), which merges into a bias where there is one."""

    roles: ClassVar[dict[str, str]] = {"offset": "bias"}

    def __init__(self, site: str, layer: nn.Module, adapter: AdapterSpec, dtype: torch.dtype) -> None:
        super().__init__()
        g = geometry(site, layer)
        if g.kind == "embedding":
            raise TypeError(f"offset '{adapter.name}' on '{site}': an embedding has no bias to adapt")
        self.site, self.name, self.options = site, adapter.name, adapter.options
        self.rank, self.alpha = adapter.rank, adapter.alpha
        self.offset = nn.Parameter(torch.zeros(g.n_out, dtype=dtype))

    def rescale(self, factor: float) -> None:
        """Refuse: an offset has no scale."""
        raise ValueError(f"offset '{self.name}' has no scale to change")

    def configuration(self) -> dict[str, Any]:
        """Return what is stored beside the tensors, as JSON data."""
        return {"rank": self.rank, "alpha": self.alpha, "options": dict(self.options)}

    def restore(self, configuration: dict[str, Any]) -> None:
        """Take nothing more: the offset is all there is."""

    def around(self, layer: nn.Module, plain: Callable, x: Tensor, bare: Callable[[], Tensors]) -> Tensor:
        """Return plain(x) + c."""
        return plain(x) + per_output(geometry(self.site, layer), self.offset)

    def delta(self, layer: nn.Module) -> Tensors:
        """Refuse: there is no delta of the weight."""
        raise ValueError(f"offset '{self.name}' adapts the bias of '{self.site}': its weight has no delta")

    def _rounded(self, tensors: Tensors) -> Tensor:
        if "bias" not in tensors:
            raise ValueError(f"offset '{self.name}' cannot merge into '{self.site}', which has no bias")
        return self.offset.to(tensors["bias"].dtype)

    def merge(self, layer: nn.Module, tensors: Tensors, bare: Callable[[], Tensors]) -> Tensors:
        """Return the bias, the rounded offset added; raises ValueError where there is none."""
        offset = self._rounded(tensors)
        return {"bias": tensors["bias"] + offset}

    def unmerge(self, layer: nn.Module, tensors: Tensors) -> Tensors:
        """Return the bias, the same offset subtracted."""
        offset = self._rounded(tensors)
        return {"bias": tensors["bias"] - offset}
