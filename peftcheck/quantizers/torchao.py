"""torchao: int8 on rows, int4 on groups, float8 on rows; with weights alone, or activations in eight bits besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

from peftcheck.budgets import grids
from peftcheck.budgets.grids import V
from peftcheck.quantizers.held import Held
from peftcheck.rounding import Bounded, Precision, precision

_LEAST = 2.0**-23  # the smallest scale of rows; groups have the smallest normal number of their dtype


@dataclass(frozen=True)
class _Again:
    """What transformers keeps of a configuration, and libraries requantize by."""

    config: AOBaseConfig

    def get_apply_tensor_subclass(self) -> AOBaseConfig:
        return self.config


@dataclass(frozen=True)
class Torchao:
    """A type of torchao's; `config` makes its configuration from the case's settings."""

    config: Callable[[Mapping[str, Any]], AOBaseConfig]

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        layer = model.get_submodule(name)
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        quantize_(layer, self.config(settings))

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        model.hf_quantizer = SimpleNamespace(quantization_config=_Again(self.config(settings)))

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        weight = layer.weight
        found = {"weight": weight.qdata, "weight.scale": weight.scale}
        zero = getattr(weight, "zero_point", None)
        if zero is not None:
            found["weight.zero"] = zero
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def values(self, layer: nn.Module) -> Tensor:
        return layer.weight.dequantize()

    def decoded(self, layer: nn.Module) -> Bounded:
        parts = {key: tensor.detach().double() for key, tensor in self.tensors(layer).items()}
        codes = parts["weight"].reshape(parts["weight.scale"].numel(), -1)  # a row, or a group of a row
        codes = codes - parts["weight.zero"].reshape(-1, 1) if "weight.zero" in parts else codes
        dense = (codes * parts["weight.scale"].reshape(-1, 1)).reshape(layer.weight.shape)
        return Bounded(dense, 2.001 * V * dense.abs() + grids.stored(dense.abs(), precision(layer.weight.dtype)))

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        """No element: the largest code is 127 (7) where the scale is made for 127.5 (7.5), so every cycle shrinks the

        scale; float8 keeps 448 on the largest magnitude, but 448 s divided by 448 again may round to another scale.
        """
        return torch.zeros(layer.weight.shape, dtype=torch.bool)

    def chosen(self, layer: nn.Module) -> None:
        """Return None: the grid follows from the values."""

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
            "activations": _activations(weight),
            "shape": tuple(weight.shape),
            "requires_grad": weight.requires_grad,
            "graph": tuple(key for key, t in self.tensors(layer).items() if t.grad_fn is not None),
        }

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        single = precision(torch.float32)
        return grids.symmetric(value, error, 127, 127.5, _LEAST, store, single)


def _activations(weight: Tensor) -> str:
    """Say how activations are quantized on the way, '' where they are not."""
    kind = getattr(weight, "activation_quantization", None) or getattr(weight, "act_quant_kwargs", None)
    return "" if kind is None else str(kind)


@dataclass(frozen=True)
class Grouped(Torchao):
    """Codes -8 ... 7 on groups of a row, scale max abs / 7.5; reciprocal and product in the dtype of the weights."""

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        least = torch.finfo(store.dtype).smallest_normal
        return grids.symmetric(value, error, 7, 7.5, least, store, store, block=int(settings["group"]))


@dataclass(frozen=True)
class Float8(Torchao):
    """Four significant bits, scale max abs(row) / 448."""

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        return grids.float8(value, error, store, precision(torch.float32))


def _four(settings: Mapping[str, Any]) -> AOBaseConfig:
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(int(settings["group"])))


def _four_dynamic(settings: Mapping[str, Any]) -> AOBaseConfig:
    group = PerGroup(int(settings["group"]))
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group)


class Int4(Held):
    """int4 on groups of 64, for kernels of GPUs: two codes a byte, the even column's in the low bits."""

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        """Round to codes -8 ... 7 with the scale max abs / 7 of each group."""
        layer = model.get_submodule(name)
        parts = layer.weight.detach().reshape(layer.out_features, -1, 64)
        scale = parts.abs().amax(2, keepdim=True) / 7
        codes = (parts / scale).round().clamp(-8, 7).to(torch.int8).reshape(layer.weight.shape)
        packed = (codes[:, 1::2] << 4) | (codes[:, ::2] & 15)
        scale = scale.squeeze(2).t().contiguous()
        weight = Int4Tensor(packed, scale, torch.zeros_like(scale), [1, 64], layer.weight.shape)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.requires_grad_(False)

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        model.hf_quantizer = SimpleNamespace(quantization_config=_Again(Int4WeightOnlyConfig(group_size=64)))

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        found = {
            "weight": layer.weight.qdata,
            "weight.scale": layer.weight.scale,
            "weight.zero": layer.weight.zero_point,
        }
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def decoded(self, layer: nn.Module) -> Bounded:
        packed = layer.weight.qdata.detach()
        low, high = (packed << 4) >> 4, packed >> 4  # with the sign of the upper bit
        codes = torch.stack([low, high], 2).double().reshape(layer.out_features, -1, 64)
        dense = (codes * layer.weight.scale.detach().double().t().unsqueeze(2)).reshape(layer.weight.shape)
        return Bounded(dense, torch.zeros_like(dense))


QUANTIZERS = {
    "torchao.int8": Torchao(lambda settings: Int8WeightOnlyConfig()),
    "torchao.int8.dynamic": Torchao(lambda settings: Int8DynamicActivationInt8WeightConfig()),
    "torchao.intx4": Grouped(_four),
    "torchao.intx4.dynamic": Grouped(_four_dynamic),
    "torchao.int4": Int4(),
    "torchao.float8": Float8(lambda settings: Float8WeightOnlyConfig()),
}
