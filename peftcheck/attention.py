"""What an attention layer is given: query, key and value, held by a case in one tensor.

Where a layer attends to itself all three are that tensor; else it holds them one after the other along the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftcheck.case import LayerSpec

ROTARY_BASE = 10000.0
"""The base of the frequencies of rotary positions, as the models under test have it."""


def shape(spec: LayerSpec, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the input: (batch, sequence, features), or (sequence, batch, features), or without a batch."""
    targets, sources = lengths(spec)
    length = targets if attends_to_itself(spec) else targets + 2 * sources
    if not batch:
        return (length, spec.n_in)
    return (batch[0], length, spec.n_in) if spec.batch_first else (length, batch[0], spec.n_in)


def attends_to_itself(spec: LayerSpec) -> bool:
    """Return whether query, key and value are one tensor."""
    return len(spec.size) < 2


def lengths(spec: LayerSpec) -> tuple[int, int]:
    """Return the lengths of the query and of what it attends to."""
    return (spec.size[0], spec.size[-1]) if spec.size else (1, 1)


def axis(spec: LayerSpec, x: Tensor) -> int:
    """Return the dimension of the sequence."""
    return 1 if spec.batch_first and x.dim() == 3 else 0


def parts(spec: LayerSpec, x: Tensor) -> tuple[Tensor, ...]:
    """Return query, key and value: the very same object where the layer attends to itself, as kernels look for that."""
    if attends_to_itself(spec):
        return (x, x, x)
    targets, sources = lengths(spec)
    return x.split([targets, sources, sources], axis(spec, x))


def hidden(spec: LayerSpec) -> Tensor | None:
    """Return what a position may not attend to, (query, key), True where hidden; None where all is seen."""
    return torch.ones(lengths(spec), dtype=torch.bool).triu(1) if spec.causal else None


def _in_place(spec: LayerSpec, x: Tensor) -> dict[str, Any]:
    """Return what a Llama tells its attention besides the input (batch, length, features): positions from 0 on, the mask."""
    length, width = x.shape[-2], spec.n_in // spec.heads
    frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(length, dtype=torch.float32).unsqueeze(-1) * frequencies.to(x.dtype).float()
    angles = torch.cat((angles, angles), -1).unsqueeze(0)
    unseen = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    turned = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return {"position_embeddings": turned, "attention_mask": unseen[None, None] if spec.causal else None}


def run(spec: LayerSpec, module: nn.Module, x: Tensor) -> Any:
    """Return the output of a layer of any kind on the tensor that a case gives it."""
    if spec.kind == "attention.llama":
        return module(hidden_states=x, **_in_place(spec, x))[0]
    if spec.kind == "block.llama":
        return module(x, **_in_place(spec, x))
    if spec.kind != "mha":
        return module(x)
    return module(*parts(spec, x), attn_mask=hidden(spec))[0]
