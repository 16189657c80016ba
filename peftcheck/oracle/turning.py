"""What every method shares that multiplies the weight by a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from peftcheck.case import CONVOLUTIONS, LayerSpec
from peftcheck.oracle.form import Base, Machine, Site, Turn
from peftcheck.oracle.layers import reversed_padding
from peftcheck.rounding import Arithmetic, Bounded
from peftcheck.rounding_linalg import flushing_matmul

TurnOf = Callable[[Machine, Site], Turn | None]


def turned_width(spec: LayerSpec) -> int:
    """Return n of the matrices that turn a layer's inputs: the fan-in, or the dimension of an embedding."""
    return math.prod(spec.weight_shape[1:])


def flat(name: str, tensor: Tensor) -> Tensor:
    """Lay a weight (out, in, *kernel) or (entries, dimension) out as a matrix whose columns are turned."""
    return tensor.flatten(1)


def unflat(shape: tuple[int, ...]) -> Callable[[str, Tensor], Tensor]:
    """Return the way back from `flat` to a weight of `shape`."""
    return lambda name, matrix: matrix.reshape(shape)


def multiplied(m: Machine, turn: Turn, name: str, x: Bounded) -> Bounded:
    """Return a layer's tensor times the turn's matrix (and its gain), as the machine stores it."""
    ar = turn.arithmetic
    product = flushing_matmul(ar, x.map(lambda t: turn.rows(name, t)), turn.matrix, turn.n)
    if turn.gain is not None:
        product = ar.mul(product, turn.gain)
    if ar.store.dtype != m.base.store.dtype:
        product = m.base.rounded(product)
    return product.map(lambda t: turn.back(name, t))


def merge_by_turning(turn_of: TurnOf) -> Callable[[Machine, Site, Base], dict[str, Bounded]]:
    """Return the merge of a method that multiplies: W T, for every tensor that is turned.

    Where the adapter's tensors do not fit the layer there is nothing to compute: the base stands in.
    """

    def merge(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
        turn = turn_of(m, site)
        if turn is None:
            return {"weight": base["weight"]}
        return {name: multiplied(m, turn, name, base[name]) for name in turn.names if name in base}

    return merge


def patches(spec: LayerSpec, x: Bounded) -> Bounded:
    """Return what each output position of a 2-d convolution sees: ([N,] *out, in * kernel), nothing rounds."""

    def unfold(t: Tensor) -> Tensor:
        pads = reversed_padding(spec)
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        single, t = t.dim() == 3, t if t.dim() == 4 else t[None]
        t = F.pad(t, pads, mode=mode)
        out = [(t.shape[2 + d] - spec.dilation[d] * (spec.kernel[d] - 1) - 1) // spec.stride[d] + 1 for d in range(2)]
        columns = F.unfold(t, spec.kernel, dilation=spec.dilation, stride=spec.stride)
        seen = columns.transpose(1, 2).reshape(t.shape[0], *out, -1)
        return seen[0] if single else seen

    return x.map(unfold)


def on_patches(ar: Arithmetic, spec: LayerSpec, weight: Bounded, x: Bounded) -> Bounded:
    """Return the convolution as a product of patches ([N,] *out, n) and the weight (out, n): ([N,] out, *size)."""
    y = ar.bilinear(lambda w, v: v @ w.flatten(1).transpose(0, 1), weight, x, spec.fan_in)
    return y.map(lambda t: t.movedim(-1, -3))


def seen(spec: LayerSpec, x: Bounded) -> Bounded:
    """Return the layer's input as vectors of the turned width: itself, or a convolution's patches."""
    return patches(spec, x) if spec.kind in CONVOLUTIONS else x
