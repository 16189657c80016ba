"""AQLM: codebooks of groups of eight, made on a GPU over hours; here a layer is made by hand, to be refused a merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from aqlm import QuantizedLinear
from torch import Tensor, nn

from peftcheck.quantizers.held import Held, placed
from peftcheck.rounding import Bounded

_GROUP, _CODES = 8, 256


class Aqlm(Held):
    """One codebook of 256 vectors for groups of eight weights of a row, and a scale for each row."""

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        """Take the first 256 groups of the weight for the codebook: every further group shares the code of one."""
        old = model.get_submodule(name)
        bias, dtype = old.bias is not None, old.weight.dtype
        layer = QuantizedLinear(old.in_features, old.out_features, _GROUP, 1, 1, 8, bias=bias, dtype=dtype)
        groups = old.weight.detach().reshape(-1, _GROUP)
        at = torch.arange(_CODES) % groups.shape[0]
        layer.codebooks.data.copy_(groups[at].reshape(layer.codebooks.shape))
        layer.codes.data.copy_(
            (torch.arange(groups.shape[0]) % _CODES).to(torch.uint8).view(torch.int8).reshape(layer.codes.shape)
        )
        layer.scales.data.fill_(1.0)
        placed(model, name, layer, old)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        found = {"weight": layer.codes, "weight.codebook": layer.codebooks, "weight.scale": layer.scales}
        return found if layer.bias is None else {**found, "bias": layer.bias}

    def decoded(self, layer: nn.Module) -> Bounded:
        codes = layer.codes.detach().reshape(-1).view(torch.uint8).long()
        groups = layer.codebooks.detach().double().reshape(_CODES, _GROUP)[codes]
        dense = groups.reshape(layer.out_features, layer.in_features) * layer.scales.detach().double().reshape(-1, 1)
        return Bounded(dense, torch.zeros_like(dense))


QUANTIZERS = {"aqlm.1x8": Aqlm()}
