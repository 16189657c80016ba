"""Quantizers that need other hardware: layers of theirs are made by hand, to see that a merge into them is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcheck.errors import HarnessError
from peftcheck.rounding import Bounded, Precision


class Held:
    """What such a quantizer does alike; the rest is to read `tensors` and `decoded`, and to make a layer."""

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Do nothing: libraries recognise the layer's class."""

    def decoded(self, layer: nn.Module) -> Bounded:
        """Return the dense weight that the codes stand for."""
        raise NotImplementedError

    def values(self, layer: nn.Module) -> Tensor:
        """Return the same: the library's own dequantization may want its hardware."""
        return self.decoded(layer).value

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        """No element: nothing is requantized."""
        return torch.zeros_like(self.decoded(layer).value, dtype=torch.bool)

    def chosen(self, layer: nn.Module) -> None:
        """Return None: nothing is requantized."""

    def facts(self, layer: nn.Module) -> dict[str, Any]:
        return {"type": type(layer).__name__}

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        raise HarnessError("a layer made by hand is merged into by nothing, and has no budget")


def placed(model: nn.Module, name: str, layer: nn.Module, old: nn.Linear) -> None:
    """Put a layer in the place of a linear one, with its bias."""
    if old.bias is not None:
        layer.bias.data.copy_(old.bias.detach())
    layer.requires_grad_(False)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer.train(old.training))
