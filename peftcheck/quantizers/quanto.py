"""optimum-quanto: symmetric int8 for each row, affine int4 for groups of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from optimum.quanto import freeze, qint4, qint8
from optimum.quanto.library.extensions import get_extension
from optimum.quanto.nn import QLinear
from torch import Tensor, nn

from peftcheck.budgets import quantized
from peftcheck.rounding import Bounded, Precision, precision

def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of `bits` bits: first all that lie in the low bits of each byte."""
    return torch.cat([(packed >> bits * i) & (2**bits - 1) for i in range(8 // bits)])


# Reading int4 codes would first compile quanto's C++ form of this: a minute, a compiler, and a lock that an interrupted
# build leaves behind.
get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=_unpacked)


def _group(columns: int) -> int:
    """Return the group size of int4: 128, or the next smaller multiple of 32 that divides the row; short rows whole."""
    if columns <= 128:
        return columns
    return next((size for size in (128, 96, 64, 32) if columns % size == 0), columns)


@dataclass(frozen=True)
class Quanto:
    """A linear layer of quanto's; `bits` 8 (scale max abs(row) / 127) or 4 (scale range / 15 of each group)."""

    bits: int

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        old = model.get_submodule(name)
        layer = QLinear.from_module(old, weights=qint8 if self.bits == 8 else qint4)
        freeze(layer)
        layer.requires_grad_(False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(old.training))

    def dress(self, model: nn.Module) -> None:
        """Do nothing: the layer is a subclass of nn.Linear."""

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        weight = layer.weight
        codes = weight._data if self.bits == 8 else weight._data.unpack()
        found = {"weight": codes, "weight.scale": weight._scale}
        if self.bits == 4:
            found["weight.shift"] = weight._shift
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def values(self, layer: nn.Module) -> Tensor:
        return layer.weight.dequantize()

    def decoded(self, layer: nn.Module) -> Bounded:
        parts = {key: t.detach().double() for key, t in self.tensors(layer).items()}
        held = precision(layer.weight.dtype)
        scaled = parts["weight"] * parts["weight.scale"]
        if self.bits == 8:
            return Bounded(scaled, quantized.stored(scaled.abs(), held))
        dense = (scaled - parts["weight.shift"]).reshape(layer.weight.shape)
        return Bounded(dense, quantized.stored(scaled.abs().reshape(dense.shape) + dense.abs(), held))

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        return torch.zeros(layer.weight.shape, dtype=torch.bool)

    def facts(self, layer: nn.Module) -> dict[str, Any]:
        weight = layer.weight
        return {
            "type": type(layer).__name__,
            "parameter": type(weight).__name__,
            "dtype": weight.dtype,
            "shape": tuple(weight.shape),
            "requires_grad": weight.requires_grad,
        }

    def budget(self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision) -> Tensor:
        if self.bits == 8:
            return quantized.symmetric(value, error, 127.0, 0.0, store, store)
        return quantized.affine(value, error, 15, _group(value.shape[1]), store)


QUANTIZERS = {"quanto.qint8": Quanto(8), "quanto.qint4": Quanto(4)}
