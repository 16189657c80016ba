"""hqq: affine codes on groups, without the optimiser (whose grid has no bound a priori)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn

from peftcheck.budgets import quantized
from peftcheck.rounding import Bounded, Precision, precision

_NARROW, _LEAST = 1e-4, 1 / 2e4  # ranges that get the scale 1; the smallest scale otherwise


@dataclass(frozen=True)
class Affine:
    """Codes 0 ... 2^bits - 1 on the range of each group of a row; scale and zero in the compute dtype."""

    bits: int

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        old = model.get_submodule(name)
        config = BaseQuantizeConfig(nbits=self.bits, group_size=int(settings["group"]), axis=1)
        config["weight_quant_params"] |= {"optimize": False, "round_zero": False}
        old.weight.requires_grad_(False)
        if old.bias is not None:
            old.bias.requires_grad_(False)
        layer = HQQLinear(old, config, compute_dtype=old.weight.dtype, device="cpu", del_orig=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(old.training))

    def dress(self, model: nn.Module) -> None:
        """Do nothing: libraries recognise the layer's class."""

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        found = {"weight": layer.W_q, "weight.scale": layer.meta["scale"], "weight.zero": layer.meta["zero"]}
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def values(self, layer: nn.Module) -> Tensor:
        return layer.dequantize()

    def decoded(self, layer: nn.Module) -> Bounded:
        meta, packed = layer.meta, layer.W_q.detach()
        per = 8 // self.bits  # the first part of all codes lies in the high bits, the last in the low ones
        codes = torch.cat([(packed >> (8 - self.bits * (i + 1))) & (2**self.bits - 1) for i in range(per)], 0).double()
        scale, zero = meta["scale"].detach().double(), meta["zero"].detach().double()
        apart = codes - zero
        dense = (apart * scale).reshape(meta["shape"])
        held = precision(layer.compute_dtype)
        return Bounded(dense, 2.01 * held.roundoff * dense.abs() + 2 * held.eta)

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        """No element: minimum and maximum come back as z s and (levels - z) s, rounded; the next grid starts there."""
        return torch.zeros(layer.meta["shape"], dtype=torch.bool)

    def facts(self, layer: nn.Module) -> dict[str, Any]:
        meta = layer.meta
        return {
            "type": type(layer).__name__,
            "bits": meta["nbits"],
            "group": meta["group_size"],
            "axis": meta["axis"],
            "packing": meta["packing"],
            "shape": tuple(meta["shape"]),
            "codes": layer.W_q.dtype,
            "dtype": layer.compute_dtype,
            "dtype of the scale": meta["scale"].dtype,
            "optimiser": layer.quant_config["weight_quant_params"]["optimize"],
            "requires_grad": layer.W_q.requires_grad,
            "bias": layer.bias is not None,
            "graph": tuple(key for key, t in self.tensors(layer).items() if t.grad_fn is not None),
        }

    def budget(self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision) -> Tensor:
        return quantized.affine(value, error, 2**self.bits - 1, int(settings["group"]), store, _NARROW, _LEAST)


QUANTIZERS = {f"hqq.{bits}": Affine(bits) for bits in (8, 4, 2)}
