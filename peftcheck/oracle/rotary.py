"""What an attention layer with rotary positions computes, with its bound, as Llama has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftcheck.attention import ROTARY_BASE
from peftcheck.case import LayerSpec
from peftcheck.oracle.form import Base
from peftcheck.oracle.softmax import softmax
from peftcheck.rounding import Arithmetic, Bounded


def attend(ar: Arithmetic, spec: LayerSpec, base: Base, x: Bounded) -> Bounded:
    """Return W_o softmax(Q K^T / sqrt(d)) V + b_o for x (batch, length, features), queries and keys turned by position.

    Su et al., RoFormer, 2021, eq. 34; `spec.groups` heads of keys and values serve `spec.heads` of queries each in turn.
    Every stage may be stored in the base's dtype.
    """
    keys = turned(ar, projected(ar, spec, base, x, "k_proj", spec.groups))
    values = projected(ar, spec, base, x, "v_proj", spec.groups)
    length = x.value.shape[-2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) if spec.causal else None
    weights = weighed(ar, queries(ar, spec, base, x), shared(spec, keys), hidden)
    y = output(ar, base, ar.matmul(weights, shared(spec, values)))
    return y if "o_proj.bias" not in base else ar.join(y, base["o_proj.bias"])


def queries(ar: Arithmetic, spec: LayerSpec, base: Base, x: Bounded) -> Bounded:
    """Return the queries of every head, turned by position: (batch, heads, length, features of a head)."""
    return turned(ar, projected(ar, spec, base, x, "q_proj", spec.heads))


def projected(ar: Arithmetic, spec: LayerSpec, base: Base, x: Bounded, name: str, heads: int) -> Bounded:
    """Return a projection of every position, apart by heads: (batch, heads, length, features of a head)."""
    y = ar.matmul(x, base[f"{name}.weight"].map(torch.t))
    y = y if f"{name}.bias" not in base else ar.join(y, base[f"{name}.bias"])
    return y.map(lambda t: t.unflatten(-1, (heads, -1)).transpose(-2, -3))


def shared(spec: LayerSpec, t: Bounded) -> Bounded:
    """Return keys or values of each head of queries: (batch, heads, length, features of a head)."""
    return t.map(lambda v: v.repeat_interleave(spec.heads // spec.groups, -3))


def weighed(ar: Arithmetic, query: Bounded, key: Bounded, hidden: Tensor | None = None) -> Bounded:
    """Return softmax(Q K^T / sqrt(d)) over the keys, the softmax in single precision.

    Kernels multiply by 1 / sqrt(d) or divide by sqrt(d): of the root, its reciprocal and the number held, three roundoffs.
    """
    factor = torch.tensor(1.0 / math.sqrt(query.value.shape[-1]), dtype=torch.float64)
    scores = ar.matmul(query, key.map(lambda t: t.transpose(-1, -2)))
    scores = ar.mul(scores, Bounded(factor, 3 * ar.store.roundoff * factor))
    single = Arithmetic(ar.single)
    return ar.rounded(softmax(single, single.rounded(scores), hidden))


def output(ar: Arithmetic, base: Base, mixed: Bounded) -> Bounded:
    """Return what the heads give (batch, heads, length, features), side by side, through the output's weight, no bias."""
    joined = mixed.map(lambda t: t.transpose(-2, -3).flatten(-2))
    return ar.matmul(joined, base["o_proj.weight"].map(torch.t))


def turned(ar: Arithmetic, t: Bounded) -> Bounded:
    """Return every vector of a head turned by the angles of its position: t cos + (-t2, t1) sin."""
    cosine, sine = _angles(ar, *t.value.shape[-2:])
    half = t.value.shape[-1] // 2
    swapped = t.map(lambda v: torch.cat((v[..., half:], v[..., :half]), -1))
    swapped = Bounded(torch.cat((-swapped.value[..., :half], swapped.value[..., half:]), -1), swapped.error)
    return ar.add(ar.mul(t, cosine), ar.mul(swapped, sine))


def _angles(ar: Arithmetic, length: int, width: int) -> tuple[Bounded, Bounded]:
    """Return cosine and sine of p theta^(-2 i / d), (length, width), the second half of the width like the first.

    The frequencies are a buffer, which a model of half precision holds in its own dtype.
    """
    single = Arithmetic(ar.single)
    exponents = single.rounded(Bounded(torch.arange(0, width, 2, dtype=torch.float64) / width))
    slope = math.log(ROTARY_BASE) * ROTARY_BASE ** (exponents.value + exponents.bound)
    powers = single.apply(exponents, lambda e: ROTARY_BASE**e, slope)
    frequencies = ar.rounded(single.div(Bounded(torch.ones((), dtype=torch.float64)), powers))
    places = Bounded(torch.arange(length, dtype=torch.float64).unsqueeze(-1))
    angles = single.mul(places, frequencies).map(lambda t: torch.cat((t, t), -1))
    return ar.rounded(single.apply(angles, torch.cos, 1.0)), ar.rounded(single.apply(angles, torch.sin, 1.0))
