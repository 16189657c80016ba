"""bitsandbytes: LLM.int8 and the 4-bit codebooks of QLoRA, with and without double quantization."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from peftcheck.budgets import grids
from peftcheck.budgets.grids import V
from peftcheck.rounding import Bounded, Precision, precision

# Dettmers et al., QLoRA, 2023, appendix E: quantiles of the normal distribution, an exact zero, both ends at 1.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# One sign bit, two of exponent, one of mantissa, over the largest; by bit pattern.
_FP4 = tuple(sign * size / 12 for sign in (1, -1) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def _code(kind: str) -> Tensor:
    """Return the codebook by bit pattern, fp64 of single-precision numbers."""
    return torch.tensor(NF4 if kind == "nf4" else _FP4, dtype=torch.float32).double()


def _sorted(kind: str) -> Tensor:
    return torch.unique(_code(kind) + 0.0)


def _place(model: nn.Module, name: str, layer: nn.Module, old: nn.Linear) -> None:
    if old.bias is not None:
        layer.bias = nn.Parameter(old.bias.detach().clone(), requires_grad=False)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer.train(old.training))


@dataclass(frozen=True)
class Int8:
    """LLM.int8: a scale for each row, codes -127 ... 127, weights through half precision."""

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        old = model.get_submodule(name)
        layer = bnb.nn.Linear8bitLt(old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False)
        data = old.weight.detach().clone()
        layer.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False).to("cpu")
        _place(model, name, layer, old)

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        model.is_loaded_in_8bit = True

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        found = {"weight": layer.weight.data, "weight.scale": self._scale(layer)}
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def _scale(self, layer: nn.Module) -> Tensor:
        """Return the row scales, which a forward moves from the weight to the state."""
        return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB

    def values(self, layer: nn.Module) -> Tensor:
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, self._scale(layer))

    def decoded(self, layer: nn.Module) -> Bounded:
        value = layer.weight.data.double() * self._scale(layer).double().reshape(-1, 1) / 127
        return Bounded(value, (3.001 * V + 2.0**-28) * value.abs() + 2.0**-149)

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        """The scale s is a half-precision number, reached by the code 127, and k s / 127 through half precision is off

        by max(2^-11 k s / 127, 2^-25), less than half a step s / 254 where s > 7.6e-6. Through bfloat16 it is not.
        """
        large = (self._scale(layer) > 1e-5) & (adapter_dtype != torch.bfloat16)
        return large.reshape(-1, 1).expand(layer.weight.shape)

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
            "has_fp16_weights": weight.has_fp16_weights,
            "threshold": layer.state.threshold,
            "graph": _graph(self.tensors(layer)),
        }

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        return grids.rows_through_half(value, error, store)


def _graph(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the stored tensors that hang on an autograd graph: none should."""
    return tuple(name for name, tensor in tensors.items() if tensor.grad_fn is not None)


@dataclass(frozen=True)
class Four:
    """Codebooks of 16 over blocks of the weight laid out row by row; `double`: the block scales quantized too."""

    kind: str
    double: bool

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        old, storage = model.get_submodule(name), getattr(torch, settings.get("storage", "uint8"))
        layer = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            old.bias is not None,
            compute_dtype=old.weight.dtype,
            compress_statistics=self.double,
            quant_type=self.kind,
            quant_storage=storage,
        )
        layer.weight = bnb.nn.Params4bit(
            old.weight.detach().clone(),
            requires_grad=False,
            blocksize=int(settings["blocksize"]),
            compress_statistics=self.double,
            quant_type=self.kind,
            quant_storage=storage,
            module=layer,
        ).to("cpu")
        _place(model, name, layer, old)

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        model.is_loaded_in_4bit = True

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        state = layer.weight.quant_state
        found = {"weight": layer.weight.data.view(torch.uint8), "weight.scale": state.absmax}
        if state.nested:
            found |= {"weight.scale.scale": state.state2.absmax, "weight.scale.mean": state.offset}
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def values(self, layer: nn.Module) -> Tensor:
        data, state = layer.weight.data, layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # the library's own way back from what its CPU forward made of the weight; it writes, so on copies
            data, state = bnb.functional._convert_weight_packed_for_cpu_inverse(data.clone(), copy.deepcopy(state))
        return bnb.functional.dequantize_4bit(data, state)

    def decoded(self, layer: nn.Module) -> Bounded:
        data, state = layer.weight.data.view(torch.uint8).reshape(-1), layer.weight.quant_state
        codes = torch.stack([data >> 4, data & 15], 1).reshape(-1).long()  # the first element in the high bits
        scales, doubt = state.absmax.double(), 0.0
        if state.nested:
            groups = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: scales.numel()]
            parts = grids.dynamic_map()[state.absmax.reshape(-1).long()] * groups
            scales = parts + state.offset.double()
            doubt = (3.001 * V * (parts.abs() + scales.abs())).reshape(-1, 1)
        values = grids.blocks(_code(self.kind)[codes][: state.shape.numel()], state.blocksize)
        dense = values * scales.reshape(-1, 1)
        error = values.abs() * doubt + 2.001 * V * dense.abs()
        error = error + grids.stored(dense.abs() + error, precision(state.dtype))
        return Bounded(*(grids.unblocked(t, state.shape) for t in (dense, error)))

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        """A flat block keeps its scale a, which the code 1 or -1 reaches and which is a number of the state's dtype;

        c_k a through any of the dtypes is off by 2^-8 c_k a at most, less than the distance to the next threshold:
        half the narrowest gap beside c_k is 0.039 (nf4), and at fp4's smallest codes 0.0026 against 2^-8 x 0.0052.
        Half precision does that only where c_k a is normal.
        """
        state = layer.weight.quant_state
        if state.nested:
            return torch.zeros(state.shape, dtype=torch.bool)
        large = (state.absmax.double() > 2.0**-5).reshape(-1, 1).expand(-1, state.blocksize)
        return grids.unblocked(large, state.shape)

    def chosen(self, layer: nn.Module) -> None:
        """Return None: the grid follows from the values."""

    def facts(self, layer: nn.Module) -> dict[str, Any]:
        weight, state = layer.weight, layer.weight.quant_state
        return {
            "type": type(layer).__name__,
            "parameter": type(weight).__name__,
            "codes": weight.quant_storage,
            "requires_grad": weight.requires_grad,
            "quant_type": state.quant_type,
            "blocksize": state.blocksize,
            "double quantization": state.nested,
            "shape": tuple(state.shape),
            "dtype of the state": state.dtype,
            "layer's state is the weight's": layer.quant_state is state,
            "graph": _graph(self.tensors(layer)),
        }

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        return grids.codebook(value, error, _sorted(self.kind), int(settings["blocksize"]), store, self.double)


QUANTIZERS = {
    "bitsandbytes.int8": Int8(),
    "bitsandbytes.nf4": Four("nf4", False),
    "bitsandbytes.nf4.double": Four("nf4", True),
    "bitsandbytes.fp4": Four("fp4", False),
    "bitsandbytes.fp4.double": Four("fp4", True),
}
