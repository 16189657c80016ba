"""A model with PEFT's ShadowPEFT behind the port: wrapped blocks, and a network of its own beside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.shadow.layers import ShadowCarrier, ShadowLayer
from torch import Tensor, nn

from peftcheck.implementations.peft.attached import PeftAttached
from peftcheck.recording import Record, recorded


class ShadowedAttached(PeftAttached):
    """The same port; the network beside the model counts for a part of the adapter on its first block."""

    def adapter_tensors(self, adapter: str) -> dict[tuple[str, str], Tensor]:
        own, sites = super().adapter_tensors(adapter), self.sites(adapter)
        for name in ("shadow_backbone", "shadow_projection") if sites else ():
            for path, tensor in getattr(self.model.base_model, name)[adapter].named_parameters():
                own[sites[0], f"{name.removeprefix('shadow_')}.{path}"] = tensor
        return own

    def activate(self, adapters: Sequence[str]) -> None:
        (adapter,) = adapters
        self.model.set_adapter(adapter)

    def watched(self, layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Record]:
        """Record layers as ever, and wrapped blocks that a state comes to.

        Of those, x is the hidden state, the state beside it, and the output of the block inside; y what that block is
        given, the next state, and the next hidden state.
        """
        blocks = {name: layer for name, layer in layers.items() if isinstance(layer, ShadowLayer)}
        came: dict[str, ShadowCarrier] = {}
        went: dict[str, ShadowCarrier] = {}
        handles = []
        for name, block in blocks.items():
            # inside PEFT's own hooks, which pair the states before the first block and part them after the last
            def arrives(module: nn.Module, args: tuple, name: str = name) -> None:
                if isinstance(args[0], ShadowCarrier):
                    came[name] = args[0]

            def leaves(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
                if isinstance(output, ShadowCarrier):
                    went[name] = output

            handles.append(block.register_forward_pre_hook(arrives))
            handles.append(block.register_forward_hook(leaves, prepend=True))
        try:
            seen = recorded({**layers, **{name: block.base_layer for name, block in blocks.items()}}, run)
        finally:
            for handle in handles:
                handle.remove()
        for name in came.keys() & went.keys():
            inside = seen[name]
            x = torch.stack((came[name].hidden, came[name].shadow, inside.y))
            seen[name] = Record(x.detach(), torch.stack((inside.x, went[name].shadow, went[name].hidden)).detach())
        return seen
