"""torchao: int8 weight-only, a scale for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from peftcheck.budgets import quantized
from peftcheck.budgets.quantized import V
from peftcheck.rounding import Bounded, Precision, precision

_LEAST = 2.0**-23  # the smallest scale


@dataclass(frozen=True)
class Int8:
    """Codes -128 ... 127, scale max abs(row) / 127.5 but no less than 2^-23."""

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        layer = model.get_submodule(name)
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        quantize_(layer, Int8WeightOnlyConfig())

    def dress(self, model: nn.Module) -> None:
        again = SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
        model.hf_quantizer = SimpleNamespace(quantization_config=again)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        weight = layer.weight
        found = {"weight": weight.qdata, "weight.scale": weight.scale, "weight.zero": weight.zero_point}
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def values(self, layer: nn.Module) -> Tensor:
        return layer.weight.dequantize()

    def decoded(self, layer: nn.Module) -> Bounded:
        weight = layer.weight
        dense = (weight.qdata.double() - weight.zero_point.double()) * weight.scale.double()
        return Bounded(dense, 2.001 * V * dense.abs() + quantized.stored(dense.abs(), precision(weight.dtype)))

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        """No element: the largest code is 127 where the scale is made for 127.5, so every cycle shrinks the scale."""
        return torch.zeros(layer.weight.shape, dtype=torch.bool)

    def facts(self, layer: nn.Module) -> dict[str, Any]:
        weight = layer.weight
        return {
            "type": type(layer).__name__,
            "parameter": type(weight).__name__,
            "is a parameter": isinstance(weight, nn.Parameter),
            "dtype": weight.dtype,
            "codes": weight.qdata.dtype,
            "dtype of the scale": weight.scale.dtype,
            "block": tuple(weight.block_size),
            "shape": tuple(weight.shape),
            "requires_grad": weight.requires_grad,
            "graph": tuple(key for key, t in self.tensors(layer).items() if t.grad_fn is not None),
        }

    def budget(self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision) -> Tensor:
        return quantized.symmetric(value, error, 127.5, _LEAST, store, precision(torch.float32))


QUANTIZERS = {"torchao.int8": Int8()}
