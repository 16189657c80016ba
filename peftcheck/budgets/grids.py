"""Budgets of quantizers, from the definition of their grids: codebook, block scale, clipping, storage.

Each function bounds abs(DQ(Q(T)) - T) elementwise, a priori, for every T within `error` of `value`: what no
quantizer that rounds to the nearest point of the grid exceeds. Nothing here calls a quantizer. v = 2^-24 is the unit
roundoff of the single precision in which scales, quotients and products are held; u, eta are those of the dtype
that the dequantized values are stored in. All arguments and results are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck.rounding import Precision

V = 2.0**-24
_TINY = 2.0**-126  # below the smallest normal number scales and quotients lose their relative accuracy


def stored(size: Tensor, store: Precision) -> Tensor:
    """Bound one rounding of a value of at most `size` to the dtype that dequantization returns: u size + eta."""
    return store.roundoff * size + store.eta


def blocks(tensor: Tensor, size: int) -> Tensor:
    """Return a tensor laid out row by row in blocks (n, size), the last one filled up with zeros."""
    flat = tensor.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)


def unblocked(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `blocks`."""
    return tensor.reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


def codebook(value: Tensor, error: Tensor, code: Tensor, block: int, store: Precision, double: bool = False) -> Tensor:
    """Bound a quantization to a sorted codebook (k,) in [-1, 1], scaled by the largest magnitude of each block.

    Let a be the block's largest abs(T), x = T / a in [c_k, c_k+1]. The nearest code is at most half a gap away:

        abs(DQ - T) <= a (c_k+1 - c_k) / 2.

    Small constants: 1 / a, the product with T and the midpoint of the codes are rounded, so that x is off by 2v + v^2
    and the threshold by v, relative to numbers of at most 1: 3v a + v^2 a. The chosen code is a single-precision
    number, and its product with a is rounded: 2v a. Together less than 5.001 v a. Then the value is stored:
    u (abs(T) + b) + eta. Where a is not a normal number the quotient means nothing, but codes do not exceed 1: 2a.

    T is known up to e: a lies between the largest abs(T) - e and the largest abs(T) + e, x in an interval that may
    touch several gaps, of which the widest counts.

    `double`: the scales are quantized themselves, see `double_quantized`; off by d, they move the value by
    max(abs(c_k), abs(c_k+1)) d.
    """
    shape = value.shape
    t, e = blocks(value, block), blocks(error, block)
    high = (t.abs() + e).amax(1, keepdim=True)
    low = (t.abs() - e).amax(1, keepdim=True).clamp(min=0)
    first, last = _interval(t - e, t + e, low, high, code)
    gaps, reach = _widest(code[1:] - code[:-1]), _widest(torch.maximum(code[1:].abs(), code[:-1].abs()))
    bound = high * gaps[first, last] / 2 + 5.001 * V * high
    bound = torch.where(high < _TINY, 2 * high, bound)
    if double:
        bound = bound + reach[first, last] * double_quantized(t.abs().amax(1), (high - low).squeeze(1)).unsqueeze(1)
    bound = bound + stored(t.abs() + e + bound, store)
    return unblocked(bound, shape)


def _interval(below: Tensor, above: Tensor, low: Tensor, high: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last gap of the codebook that T / a may lie in."""
    slack = 4 * V
    small = torch.minimum(below / high, torch.where(low > 0, below / low, -1.0)) - slack
    large = torch.maximum(above / high, torch.where(low > 0, above / low, 1.0)) + slack
    ends = len(code) - 2
    places = [torch.nan_to_num(x.clamp(-1, 1), nan=side) for x, side in ((small, -1.0), (large, 1.0))]
    first, last = (torch.searchsorted(code, place.contiguous(), right=True) - 1 for place in places)
    return first.clamp(0, ends), last.clamp(0, ends)


def _widest(sizes: Tensor) -> Tensor:
    """Return the largest of sizes[i..j] for all i <= j, as a matrix."""
    table = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
    for i in range(len(sizes)):
        table[i, i:] = torch.cummax(sizes[i:], 0).values
    return table


def dynamic_map() -> Tensor:
    """Return the signed 8-bit dynamic map (Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2015).

    For each exponent 10^-i, i = 0 ... 6, the interval [0.1, 1] is cut into 2^(6 - i) parts, whose midpoints are the
    codes, with either sign; besides 0 and 1. The most negative code is -0.99297.
    """
    codes = [0.0, 1.0]
    for exponent in range(7):
        parts = 2 ** (6 - exponent)
        middles = [0.1 + 0.9 * (2 * part + 1) / (2 * parts) for part in range(parts)]
        codes += [sign * 10.0**-exponent * middle for middle in middles for sign in (1.0, -1.0)]
    return torch.tensor(sorted(codes), dtype=torch.float64)


HALF_GAP = float((dynamic_map()[1:] - dynamic_map()[:-1]).max()) / 2  # 0.0070313, the overhang at -1 too
LOOKUP = 1.02 / 65535
_GROUP = 256


def double_quantized(scales: Tensor, error: Tensor) -> Tensor:
    """Bound how far off block scales (n,) are after their own quantization; each is known up to `error`.

    Their mean m is subtracted, the rest quantized in groups of 256 to the 8-bit dynamic map, scaled by the group's
    largest A = max abs(a - m). No point of [-A, A] is further than 0.0070313 A from a code: half the widest gap, and
    as much at the lower end, where the map stops at -0.99297. Kernels for CPUs find the code in a table of 65,536
    entries over [-1, 1]: the quotient is first moved by up to 1 / 65535, and 1 / 256 of that more for the place in the
    table, itself rounded to 24 bits. Roundings: the difference v A, the quotient 2v A, the threshold v A, the code and
    its product 2v A, the last sum v abs(a): 6.001 v A + 1.001 v a. Whatever m is, the
    same number is subtracted and added; it matters through A only, and is a mean in single precision:
    gamma(n) of the mean. Errors of the a_i move A by at most their largest plus their mean.
    """
    n = scales.numel()
    mean = float(scales.mean())
    rough = float(error.mean()) + (n + 2) * V * float((scales + error).mean())
    apart = blocks((scales - mean).abs() + error + rough, _GROUP)
    largest = apart.amax(1, keepdim=True).expand_as(apart)
    return unblocked((HALF_GAP + LOOKUP + 6.001 * V) * largest, scales.shape) + 1.001 * V * (scales + error)


HALF = 2.0**-11
_INVERSE = 2.0**-28  # how far the constant 7.874015718698502e-3 is from 1 / 127, relatively


def rows_through_half(value: Tensor, error: Tensor, store: Precision) -> Tensor:
    """Bound int8 codes -127 ... 127 on each row's largest magnitude, after a cast to half precision.

    B = fl16(T): abs(B - T) <= 2^-11 abs(T) + 2^-25, the second where B is subnormal. With s = max abs(B) over the row,
    k = round(127 B / s) is at most 1/2 off, and 127 (2v + v^2) for the two roundings of its argument: in units of
    s / 127, 1/2 + 254.001 v. Dequantized, k s / 127 is computed with two products and a constant that is off by
    2^-28 and rounded: (3v + 2^-28) s = s / 254 (762 v + 16 v). Altogether

        abs(DQ - T) <= s / 254 (1 + 1287 v) + 2^-11 abs(T) + 2^-25,     1287 v < 7.7e-5,

    and one rounding to storage, single precision. B must not overflow: abs(T) <= 65504, which `largest` declares.
    """
    size = value.abs() + error
    cast = HALF * size + 2.0**-25
    largest = (size + cast).amax(1, keepdim=True)
    bound = largest / 254 * (1 + 1287 * V) + cast
    return bound + stored(size + bound, store)


def symmetric(
    value: Tensor,
    error: Tensor,
    codes: int,
    steps: float,
    least: float,
    store: Precision,
    quotient: Precision,
    *,
    roundings: int = 2,
    block: int | None = None,
) -> Tensor:
    """Bound symmetric codes, at most `codes`, with a scale s = max(amax / steps, least) for each row, or each `block`.

    Codes are round(T / s): half a step. With steps = codes + 1/2 the largest magnitude lies half a step beyond the
    last code, with steps = codes upon it, so that clipping costs no more; but s is rounded to the dtype of T (unit
    roundoff w, smallest subnormal e), s' = s (1 +- w) +- e, and where it came out small what is clipped is
    abs(T) - codes s'. `quotient` is the dtype in which q = T / s' is formed: rounded once, the last time to a number in
    the binade of q, off by u 2^floor(log2 q); with `roundings` = 2 (a reciprocal, a product) by u q before. The product
    k s' is rounded to single precision and to storage; half-precision stores hold every code exactly.
    `least`: rows below least x steps err by least / 2 all the same.
    """
    shape = value.shape
    if block is not None:
        value, error = value.reshape(-1, block), error.reshape(-1, block)
    size = value.abs() + error
    high, low = _scale(value, error, steps, least, store)
    q = torch.where(low > 0, size / low, math.inf).clamp(max=steps + 1)
    rounded = high * (0.5 + (roundings - 1) * 1.01 * quotient.u * q + quotient.u * _binade(q * (1 + 4 * quotient.u)))
    bound = torch.maximum(rounded, size - codes * low.clamp(min=0))
    bound = bound + 1.001 * V * (size + bound)
    return (bound + stored(size + bound, store)).reshape(shape)


def _scale(value: Tensor, error: Tensor, steps: float, least: float, store: Precision) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest that the rounded scale max(amax / steps, least) of each row may be."""
    w, e = (store.roundoff, store.eta) if store.u != V else (V, 0.0)
    top = torch.clamp((value.abs() + error).amax(1, keepdim=True) / steps, min=least)
    bottom = torch.clamp((value.abs() - error).amax(1, keepdim=True) / steps, min=least)
    return top * (1 + w) + e, bottom * (1 - w) - e


def _binade(size: Tensor) -> Tensor:
    """Return the largest power of two not above each number; 0 for 0."""
    return torch.where(size > 0, torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1), 0.0)


_EIGHT = 448.0  # the largest number in float8


def float8(value: Tensor, error: Tensor, store: Precision, quotient: Precision) -> Tensor:
    """Bound numbers in float8 (e4m3: four significant bits, at most 448, normal from 2^-6) with s = amax / 448 a row.

    x = T / s' goes to the nearest number: half the spacing of its binade, 2^-4 2^floor(log2 x), and 2^-10 below 2^-6.
    It was rounded to `quotient` before, off by u 2^floor(log2 x). Beyond 448 it is clipped: abs(T) - 448 s', where
    s' = s (1 +- w) +- e is the scale rounded to the dtype of T. The product with s' is rounded to single precision and
    to storage. A row of zeros has no such number: 0 / 0.
    """
    size = value.abs() + error
    high, low = _scale(value, error, _EIGHT, 0.0, store)
    x = torch.where(low > 0, size / low, math.inf).clamp(max=_EIGHT)
    at = _binade(x * (1 + 4 * quotient.u)).clamp(min=2.0**-6, max=256.0)
    bound = torch.maximum(high * at * (2.0**-4 + quotient.u), size - _EIGHT * low.clamp(min=0))
    bound = bound + 1.001 * V * (size + bound)
    return bound + stored(size + bound, store)


def shifted(value: Tensor, error: Tensor, levels: int, block: int, store: Precision) -> Tensor:
    """Bound codes k = 0 ... levels on the range of each group of `block` values, DQ = k s - shift, in the dtype of T.

    shift = -min is exact; s = (max - min) / levels is rounded twice, s' = s (1 +- 2.01 w) +- e. q = (T + shift) / s' is
    off by u q for the sum and by u 2^floor(log2 q) for the quotient; rounding it to a code costs half a step more. What
    s' leaves beyond the last code is T - min - levels s'. Dequantized, k s' is rounded, and the difference stored.
    """
    shape = value.shape
    t, e = value.reshape(-1, block), error.reshape(-1, block)
    bottom, spread = (t - e).amin(1, keepdim=True), (t + e).amax(1, keepdim=True) - (t - e).amin(1, keepdim=True)
    narrow = (spread - 2 * e.amax(1, keepdim=True)).clamp(min=0)
    w, u = store.roundoff, store.u
    high = spread / levels * (1 + 2.01 * w) + store.eta
    low = (narrow / levels * (1 - 2.01 * w) - store.eta).clamp(min=0)
    far = t + e - bottom
    q = torch.where(low > 0, far / low, math.inf).clamp(max=levels + 1)
    rounded = high * (0.5 + 1.01 * u * q + u * _binade(q * (1 + 4 * u)))
    bound = torch.maximum(rounded, far - levels * low)
    bound = bound + w * (far + bound) + store.eta
    return (bound + stored(t.abs() + e + bound, store)).reshape(shape)


def affine(
    value: Tensor, error: Tensor, levels: int, block: int, held: Precision, narrow: float = 0.0, least: float = 0.0
) -> Tensor:
    """Bound codes k = 0 ... levels on the range of each group of `block` values: s = (max - min) / levels, half a step.

    Codes are round(T / s + z), z = -min / s, in single precision: four roundings of numbers of at most
    X = max abs(T) / s + levels steps. Scale and zero are then held in a dtype with roundoff w, in which (k - z) s is
    computed too: w abs(z) + w abs(k - z) for the zero and the difference, 2 w abs(k - z) for the scale and the
    product, in steps, where abs(k - z) s <= abs(T) + s / 2 + w abs(z) s.

    A group whose range is at most `narrow` gets s = 1 by definition, hence the code 0 throughout: it errs by its range.
    Scales below `least` are not used.
    """
    shape = value.shape
    t, e = value.reshape(-1, block), error.reshape(-1, block)
    top, bottom = (t + e).amax(1, keepdim=True), (t - e).amin(1, keepdim=True)
    span, w = top - bottom, held.roundoff
    step = torch.clamp(span / levels, min=max(least, 1e-300))
    zero = bottom.abs()
    reach = (t.abs() + e).amax(1, keepdim=True) / step + levels
    half = step * (0.5 + 4.01 * V * reach)
    bound = half + w * zero + 3.01 * w * (t.abs() + e + half + w * zero) + held.eta * (levels + 2)
    flat = (span - 2 * e.amax(1, keepdim=True) <= narrow * 1.001).expand_as(bound)
    single = span + 2 * w * (zero + span) + held.eta
    return torch.where(flat, torch.maximum(bound, single), bound).reshape(shape)


def moved(
    value: Tensor,
    error: Tensor,
    levels: int,
    block: int,
    held: Precision,
    scale: Tensor,
    zero: Tensor,
    narrow: float = 0.0,
    least: float = 0.0,
) -> Tensor:
    """Bound the same codes after an optimiser has moved the zero: a posteriori, from the `scale` s and `zero` z stored.

    The scale is still that of `affine` (1 for a narrow group), and codes are round(T / s + z), clipped to 0 ... levels.
    Within [-z s, (levels - z) s] that costs half a step, beyond it the distance to the nearer end. s and z are held in
    a dtype with roundoff w: off by w z steps, by w of T's own size for the scale, and as in `affine` for what is
    computed with them. The bound says that T went to the nearest point of the grid, not that the grid was well chosen.
    """
    shape = value.shape
    t, e = value.reshape(-1, block), error.reshape(-1, block)
    s, z, w = scale.reshape(-1, 1), zero.reshape(-1, 1), held.roundoff
    span = (t + e).amax(1, keepdim=True) - (t - e).amin(1, keepdim=True)
    flat = span - 2 * e.amax(1, keepdim=True) <= narrow * 1.001
    due = torch.clamp(span / levels, min=max(least, 1e-300))
    step = torch.minimum(s, torch.where(flat, due.clamp(min=1.0), due) * (1 + 2 * w) + held.eta)
    beyond = torch.maximum(t + e - (levels - z) * s, -z * s - (t - e))
    size = t.abs() + e
    half = torch.maximum(step / 2, beyond) + s * 4.01 * V * (size.amax(1, keepdim=True) / s + z.abs() + levels)
    bound = half + w * (size + z.abs() * s)
    return (bound + 3.01 * w * (size + bound) + held.eta * (levels + 2)).reshape(shape)
