"""hqq: affine codes on groups, with the optimiser that moves each group's zero, and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn

from peftcheck.budgets import grids
from peftcheck.errors import HarnessError
from peftcheck.rounding import Bounded, Precision, precision

_NARROW, _LEAST = 1e-4, 1 / 2e4  # ranges that get the scale 1; the smallest scale otherwise


@dataclass(frozen=True)
class Affine:
    """Codes 0 ... 2^bits - 1 on the range of each group of a row; scale and zero in the compute dtype.

    `optimised`: the zero is moved by a number of steps that no bound foretells, since the last of them is not looked
    at; then the budget takes the zeros that were chosen.
    """

    bits: int
    optimised: bool = False

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        old = model.get_submodule(name)
        config = BaseQuantizeConfig(nbits=self.bits, group_size=int(settings["group"]), axis=1)
        config["weight_quant_params"] |= {"optimize": self.optimised, "round_zero": False}
        old.weight.requires_grad_(False)
        if old.bias is not None:
            old.bias.requires_grad_(False)
        layer = HQQLinear(old, config, compute_dtype=old.weight.dtype, device="cpu", del_orig=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(old.training))

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
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

    def chosen(self, layer: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Return scale and zero of each group, fp64, where the optimiser has chosen them; else None."""
        meta = layer.meta
        return tuple(meta[key].detach().double().clone() for key in ("scale", "zero")) if self.optimised else None

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

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        levels, group = 2**self.bits - 1, int(settings["group"])
        if not self.optimised:
            return grids.affine(value, error, levels, group, store, _NARROW, _LEAST)
        if chosen is None:
            raise HarnessError("the budget of an optimised grid needs the zeros that were chosen")
        return grids.moved(value, error, levels, group, store, *chosen, _NARROW, _LEAST)


QUANTIZERS = {f"hqq.{bits}": Affine(bits) for bits in (8, 4, 2)}
QUANTIZERS |= {f"hqq.{bits}.optimised": Affine(bits, True) for bits in (8, 4, 2)}
