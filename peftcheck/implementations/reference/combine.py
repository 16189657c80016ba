"""Weighted combinations of LoRA adapters on one layer: w_1 D_1 + w_2 D_2 + ..., without cross terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftcheck.case import AdapterSpec
from peftcheck.implementations.reference.layers import geometry
from peftcheck.implementations.reference.lora import LowRank

KINDS = ("cat", "linear", "svd")


def combined(
    layer: nn.Module,
    parts: Sequence[LowRank],
    weights: Sequence[float],
    kind: str,
    into: str,
    rank: int,
) -> LowRank:
    """Return a new adapter of scale 1 whose delta is the weighted sum of the parts' deltas.

    'cat' stacks the factors, each part's weight and scale in its A: exact, at the sum of the ranks. 'linear' stores
    the summed delta itself beside an identity: exact, at full rank. 'svd' keeps the best approximation of `rank`
    by a truncated singular value decomposition in fp64. Raises ValueError
    for any other kind and where a grouped convolution has no delta to sum.
    """
    if kind == "cat":
        a, b = _stacked(layer, parts, weights)
    elif kind in KINDS:
        total = sum(w * part.product(layer) for part, w in zip(parts, weights, strict=True))
        a, b = _with_identity(total) if kind == "linear" else _truncated(total, rank)
    else:
        raise ValueError(f"unknown combination '{kind}': choose from {', '.join(KINDS)}")
    first = parts[0]
    b = b.reshape(*b.shape[:2], *first.B.shape[2:])
    spec = AdapterSpec(into, (), a.shape[0], float(a.shape[0]), first.options)
    made = LowRank(first.site, layer, replace(spec, rank=geometry(first.site, layer).groups), first.A.dtype)
    made.rank, made.alpha, made.scale = spec.rank, spec.alpha, 1.0
    made.A, made.B = nn.Parameter(a.contiguous()), nn.Parameter(b.contiguous())
    if made.bias is not None:
        biases = (w * part.factor * part.scale * part.bias for part, w in zip(parts, weights, strict=True))
        made.bias = nn.Parameter(sum(biases))
    return made


def _stacked(layer: nn.Module, parts: Sequence[LowRank], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Stack along the rank, within each group: B's columns of group g meet A's rows of group g."""
    groups = geometry(parts[0].site, layer).groups
    scaled = [part.A * (w * part.factor * part.scale) for part, w in zip(parts, weights, strict=True)]
    a = torch.cat([t.unflatten(0, (groups, -1)) for t in scaled], dim=1).flatten(0, 1)
    return a, torch.cat([part.B for part in parts], dim=1)


def _with_identity(total: Tensor) -> tuple[Tensor, Tensor]:
    return total, torch.eye(total.shape[0], dtype=total.dtype)


def _truncated(total: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(total.flatten(1).double(), full_matrices=False)
    root = s[:rank].sqrt()
    a = (root[:, None] * vh[:rank]).unflatten(1, total.shape[1:])
    return a.to(total.dtype), (u[:, :rank] * root).to(total.dtype)
