"""What an attention layer computes, with its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from peftcheck import attention
from peftcheck.case import LayerSpec
from peftcheck.oracle.softmax import softmax
from peftcheck.rounding import Arithmetic, Bounded


def attend(ar: Arithmetic, spec: LayerSpec, base: Mapping[str, Bounded], x: Bounded) -> Bounded:
    """Return softmax(Q K^T / sqrt(d)) V per head, side by side, through the output projection (Vaswani et al., 2017, 3.2).

    Every stage may be stored in the base's dtype: projections, the scaled query, scores, weights, what the heads
    give. Kernels hold the factor 1 / sqrt(d) in fp64, in the accumulator or in the base's dtype: one roundoff of it.
    """
    query, key, value = (_heads(spec, _projected(ar, spec, base, x, which)) for which in range(3))
    factor = torch.tensor(1.0 / math.sqrt(spec.n_in // spec.heads), dtype=torch.float64)
    query = ar.mul(query, Bounded(factor, ar.store.roundoff * factor))
    scores = ar.matmul(query, key.map(lambda t: t.transpose(-1, -2)))
    mixed = ar.matmul(softmax(ar, scores, attention.hidden(spec)), value)
    joined = mixed.map(lambda t: t.transpose(-2, -3).flatten(-2))
    y = _biased(ar, ar.matmul(joined, base["out_proj.weight"].map(torch.t)), base.get("out_proj.bias"))
    return y.map(lambda t: _turned(spec, t))


def _projected(ar: Arithmetic, spec: LayerSpec, base: Mapping[str, Bounded], x: Bounded, which: int) -> Bounded:
    """Return query (0), key (1) or value (2) of each position, (batch, sequence, features)."""
    own = slice(which * spec.n_in, (which + 1) * spec.n_in)
    x = x.map(lambda t: _turned(spec, attention.parts(spec, t)[which]))
    bias = base["in_proj_bias"].map(lambda t: t[own]) if "in_proj_bias" in base else None
    return _biased(ar, ar.matmul(x, base["in_proj_weight"].map(lambda t: t[own].t())), bias)


def _biased(ar: Arithmetic, y: Bounded, bias: Bounded | None) -> Bounded:
    return y if bias is None else ar.join(y, bias)


def _turned(spec: LayerSpec, t: Tensor) -> Tensor:
    """Swap batch and sequence where the layer has the sequence first."""
    return t if spec.batch_first or t.dim() < 3 else t.transpose(0, 1)


def _heads(spec: LayerSpec, t: Bounded) -> Bounded:
    """Return (batch, heads, sequence, features of one head)."""
    return t.map(lambda v: v.unflatten(-1, (spec.heads, -1)).transpose(-2, -3))
