"""optimum-quanto: symmetric int8 and float8 for each row, affine int4 and int2 for groups of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from optimum.quanto import freeze, qfloat8, qint2, qint4, qint8
from optimum.quanto.library.extensions import get_extension
from optimum.quanto.nn import QLinear
from torch import Tensor, nn

from peftcheck.budgets import grids
from peftcheck.rounding import Bounded, Precision, precision


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of `bits` bits: first all that lie in the low bits of each byte."""
    return torch.cat([(packed >> bits * i) & (2**bits - 1) for i in range(8 // bits)])


# Reading packed codes would first compile quanto's C++ form of this: a minute, a compiler, and a lock that an
# interrupted build leaves behind.
get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=_unpacked)
_TYPES = {"qint8": qint8, "qint4": qint4, "qint2": qint2, "qfloat8": qfloat8}


def _group(columns: int) -> int:
    """Return the size of a group: 128, or the next smaller multiple of 32 that divides the row; short rows whole."""
    if columns <= 128:
        return columns
    return next((size for size in (128, 96, 64, 32) if columns % size == 0), columns)


@dataclass(frozen=True)
class Quanto:
    """A linear layer of quanto's. In 8 bits the scale is max abs(row) / 127 (float8: / 448), in fewer the range of each

    group over the largest code; all in the dtype of the weights.
    """

    kind: str

    @property
    def levels(self) -> int:
        """The largest code of an affine grid; 0 for a symmetric one."""
        return {"qint4": 15, "qint2": 3}.get(self.kind, 0)

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        old = model.get_submodule(name)
        layer = QLinear.from_module(old, weights=_TYPES[self.kind])
        freeze(layer)
        layer.requires_grad_(False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(old.training))

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Do nothing: the layer is a subclass of nn.Linear."""

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        weight = layer.weight
        codes = weight._data.unpack() if self.levels else weight._data
        found = {"weight": codes, "weight.scale": weight._scale}
        if self.levels:
            found["weight.shift"] = weight._shift
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def values(self, layer: nn.Module) -> Tensor:
        return layer.weight.dequantize()

    def decoded(self, layer: nn.Module) -> Bounded:
        parts = {key: t.detach().double() for key, t in self.tensors(layer).items()}
        held = precision(layer.weight.dtype)
        scaled = parts["weight"] * parts["weight.scale"]
        if not self.levels:
            return Bounded(scaled, grids.stored(scaled.abs(), held))
        dense = (scaled - parts["weight.shift"]).reshape(layer.weight.shape)
        return Bounded(dense, grids.stored(scaled.abs().reshape(dense.shape) + dense.abs(), held))

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        """No element: scales in the dtype of the weights need not come back."""
        return torch.zeros(layer.weight.shape, dtype=torch.bool)

    def chosen(self, layer: nn.Module) -> None:
        """Return None: the grid follows from the values."""

    def facts(self, layer: nn.Module) -> dict[str, Any]:
        weight = layer.weight
        return {
            "type": type(layer).__name__,
            "parameter": type(weight).__name__,
            "dtype": weight.dtype,
            "shape": tuple(weight.shape),
            "requires_grad": weight.requires_grad,
        }

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        if self.kind == "qint8":
            return grids.symmetric(value, error, 127, 127.0, 0.0, store, store, roundings=1)
        if self.kind == "qfloat8":
            return grids.float8(value, error, store, store)
        return grids.shifted(value, error, self.levels, _group(value.shape[1]), store)


QUANTIZERS = {f"quanto.{kind}": Quanto(kind) for kind in _TYPES}
