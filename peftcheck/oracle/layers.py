"""What the layers themselves compute, with its bound: linear maps, convolutions, look-ups."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, LayerSpec
from peftcheck.oracle import decoder, rotary
from peftcheck.oracle.attention import attend
from peftcheck.oracle.form import Base
from peftcheck.oracle.normalization import layer_norm
from peftcheck.rounding import Arithmetic, Bounded

_CONVOLVE = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


def linear_map(ar: Arithmetic, spec: LayerSpec, weight: Bounded, x: Bounded) -> Bounded:
    """Return the layer's linear part applied to x: the weight has the shape that the layer stores.

    fan-in products are summed per output, in any order, then stored once. A look-up moves elements and rounds
    nothing; a scaled one multiplies once.
    """
    if spec.kind in EMBEDDINGS:
        ids = x.value.long()
        found = weight.map(lambda table: F.embedding(ids, table))
        # the factor is itself a buffer of the model, held in the base's dtype before it is applied
        return found if spec.scale == 1.0 else scaled_lookup(ar, spec, found)
    if spec.kind in CONVOLUTIONS:
        return convolve(ar, spec, weight, x)
    if spec.kind == "conv1d-transformers":
        return ar.bilinear(lambda w, v: v @ w, weight, x, spec.n_in)
    return ar.bilinear(lambda w, v: v @ w.transpose(-1, -2), weight, x, spec.n_in)


def scaled_lookup(ar: Arithmetic, spec: LayerSpec, found: Bounded) -> Bounded:
    """Return a looked-up row times the embedding's factor as its buffer holds it."""
    factor = float(torch.tensor(spec.scale, dtype=torch.float32).to(ar.store.dtype))
    return ar.scale(found, factor)


def convolve(ar: Arithmetic, spec: LayerSpec, weight: Bounded, x: Bounded) -> Bounded:
    """Return the convolution of x (N, C, *size) with any weight of the layer's kernel and hyper-parameters."""

    def op(w: Tensor, v: Tensor) -> Tensor:
        padding = spec.padding
        if spec.padding_mode != "zeros":
            v = F.pad(v, reversed_padding(spec), mode=spec.padding_mode)
            padding = 0
        return _CONVOLVE[spec.kind](v, w, None, spec.stride, padding, spec.dilation, spec.groups)

    return ar.bilinear(op, weight, x, weight.value[0].numel())


def reversed_padding(spec: LayerSpec) -> list[int]:
    """Return the padding as `F.pad` wants it: last dimension first, both sides."""
    pads: list[int] = []
    for axis in reversed(range(len(spec.kernel))):
        if spec.padding == "same":
            total = spec.dilation[axis] * (spec.kernel[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            width = 0 if isinstance(spec.padding, str) else spec.padding[axis]
            pads += [width, width]
    return pads


def with_bias(ar: Arithmetic, spec: LayerSpec, y: Bounded, bias: Bounded | None) -> Bounded:
    """Return y plus the bias along the layer's output dimension.

    Some kernels add it to the finished sum, some start from it, some add it in between: the bound covers them all.
    """
    if bias is None:
        return y
    if spec.kind in CONVOLUTIONS:
        bias = bias.map(lambda b: b.reshape(-1, *(1,) * len(spec.kernel)))
    return ar.join(y, bias)


def layer_output(ar: Arithmetic, spec: LayerSpec, base: Base, x: Bounded) -> Bounded:
    """Return the plain layer's output for the given weight and bias."""
    if spec.kind == "mha":
        return attend(ar, spec, base, x)
    if spec.kind == "layernorm":
        return layer_norm(ar, base["weight"], base.get("bias"), x)
    if spec.kind == "attention.llama":
        return rotary.attend(ar, spec, base, x)
    if spec.kind == "block.llama":
        return decoder.block(ar, spec, base, x)
    return with_bias(ar, spec, linear_map(ar, spec, base["weight"], x), base.get("bias"))


def oriented(spec: LayerSpec, delta: Bounded) -> Bounded:
    """Turn a matrix (out, in, ...) into the orientation in which the layer stores its weight."""
    if spec.kind == "conv1d-transformers" or spec.kind in EMBEDDINGS:
        return delta.map(lambda d: d.transpose(0, 1))
    return delta


def rows(spec: LayerSpec, vector: Bounded) -> Bounded:
    """Shape a vector over outputs so that it multiplies the stored weight."""
    if spec.kind == "conv1d-transformers" or spec.kind in EMBEDDINGS:
        return vector.map(lambda v: v.reshape(1, -1))
    return vector.map(lambda v: v.reshape(-1, *(1,) * (1 + len(spec.kernel))))


def channels(spec: LayerSpec, vector: Bounded) -> Bounded:
    """Shape a vector over outputs so that it multiplies the layer's output."""
    if spec.kind in CONVOLUTIONS:
        return vector.map(lambda v: v.reshape(-1, *(1,) * len(spec.kernel)))
    return vector.map(lambda v: v.reshape(-1))


def pointwise(spec: LayerSpec) -> LayerSpec:
    """Return the spec of the 1x1 convolution (no stride, no padding) that follows a low-rank convolution."""
    ones = (1,) * len(spec.kernel)
    return replace(
        spec, kernel=ones, stride=ones, dilation=ones, padding=(0,) * len(ones), padding_mode="zeros", groups=1
    )
