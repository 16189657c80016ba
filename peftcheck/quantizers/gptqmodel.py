"""GPTQ and AWQ: int4 by calibration over hours; here layers are made by hand, to be refused a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from torch import Tensor, nn

from peftcheck.quantizers.held import Held, placed
from peftcheck.rounding import Bounded

_GROUP, _ZERO, _PER = 64, 8, 8  # weights of a group, the code of 0, codes to a word


@dataclass(frozen=True)
class Words(Held):
    """Codes 0 ... 15 in words of 32 bits along `axis` of the transposed weight, the i-th of a word's codes being the

    `order[i]`-th of the weights; a scale for each group of a row, no rounded zeros.
    """

    kind: type[BaseQuantLinear]
    axis: int
    order: tuple[int, ...]

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        """Round to the nearest code, with the scale max abs / 7 of each group."""
        old = model.get_submodule(name)
        sizes = {"in_features": old.in_features, "out_features": old.out_features, "bias": old.bias is not None}
        layer = self.kind(bits=4, group_size=_GROUP, sym=True, desc_act=False, register_buffers=True, **sizes)
        parts = old.weight.detach().float().reshape(old.out_features, -1, _GROUP)
        scale = parts.abs().amax(2, keepdim=True) / 7
        codes = (parts / scale).round().to(torch.int32).reshape(old.weight.shape).t() + _ZERO
        layer.qweight.copy_(self._words(codes))
        layer.qzeros.copy_(torch.full_like(layer.qzeros, sum(_ZERO << 4 * i for i in range(_PER - 1)) - (8 << 28)))
        layer.scales.copy_(scale.squeeze(2).t())
        placed(model, name, layer, old)

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Say where the model is: such layers have buffers only, and a model of nothing else no parameter to ask."""
        model.hf_device_map = {"": "cpu"}

    def _words(self, codes: Tensor) -> Tensor:
        parts = codes.unflatten(self.axis, (-1, _PER)).movedim(self.axis + 1, -1)[..., list(self.order)]
        return (parts.long() << 4 * torch.arange(_PER)).sum(-1).to(torch.int32)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        found = {"weight": layer.qweight, "weight.scale": layer.scales, "weight.zero": layer.qzeros}
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def decoded(self, layer: nn.Module) -> Bounded:
        parts = (layer.qweight.unsqueeze(-1) >> 4 * torch.arange(_PER)) & 15
        parts = parts[..., [self.order.index(i) for i in range(_PER)]]
        codes = parts.movedim(-1, self.axis + 1).flatten(self.axis, self.axis + 1)
        dense = (codes - _ZERO).double() * layer.scales.double().repeat_interleave(_GROUP, 0)
        return Bounded(dense.t(), torch.zeros_like(dense.t()))


QUANTIZERS = {
    "gptqmodel.gptq": Words(TorchLinear, 0, (0, 1, 2, 3, 4, 5, 6, 7)),
    "gptqmodel.awq": Words(AwqTorchLinear, 1, (0, 2, 4, 6, 1, 3, 5, 7)),
}
