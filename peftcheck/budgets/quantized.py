"""Budgets of quantizers, from the definition of their grids: codebook, block scale, clipping, storage.

Each function bounds abs(DQ(Q(T)) - T) elementwise, a priori, for every T within `error` of `value`: what no
quantizer that rounds to the nearest point of the grid exceeds. Nothing here calls a quantizer. v = 2^-24 is the unit
roundoff of the single precision in which scales, quotients and products are held; u, eta are those of the dtype
that the dequantized values are stored in. All arguments and results are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftcheck.oracle.form import Base, Formula, Machine, Site, Turn
from peftcheck.rounding import Bounded, Precision

V = 2.0**-24
_TINY = 2.0**-126  # below the smallest normal number scales and quotients lose their relative accuracy
Rule = Callable[[Tensor, Tensor], Tensor]


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
    value: Tensor, error: Tensor, steps: float, least: float, store: Precision, quotient: Precision
) -> Tensor:
    """Bound symmetric int8 codes, at most 127, with a scale s = max(amax / steps, least) for each row.

    Codes are round(T / s): half a step. With 127.5 steps the largest magnitude lies half a step beyond 127, with 127
    upon it, so that clipping costs no more; but s is rounded to the dtype of T (unit roundoff w, smallest subnormal
    e), s' = s (1 +- w) +- e, and where it came out small what is clipped is abs(T) - 127 s'. `quotient` is the
    dtype in which T / s' is formed, two roundings (a reciprocal, a product): 2 x 127.5 of its u in steps. The product
    k s' is rounded once, to storage; half-precision stores hold every code exactly.
    `least`: rows below least x steps err by least / 2 all the same.
    """
    size = value.abs() + error
    w, e = (store.roundoff, store.eta) if store.u != V else (V, 0.0)
    top = torch.clamp(size.amax(1, keepdim=True) / steps, min=least)
    bottom = torch.clamp((value.abs() - error).amax(1, keepdim=True) / steps, min=least)
    high, low = top * (1 + w) + e, bottom * (1 - w) - e
    rounded = high * (0.5 + 128 * 2.001 * quotient.u)
    bound = torch.maximum(rounded, size - 127 * low)
    return bound + stored(size + bound, store)


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


# what a merge makes of it


def cast(m: Machine, base: Bounded) -> Bounded:
    """Return the dense values as a library may first store them: in the base's dtype, at a cost known exactly."""
    moved = (base.value.to(m.base.store.dtype).double() - base.value).abs()
    return base.widened(moved) if bool((moved > 0).any()) else base


def merged(m: Machine, formula: Formula, sites: Sequence[Site], base: Base, rule: Rule) -> Base:
    """Return the tensors after the adapters have been merged in order, each merge requantized: T = DQ(W) + D, b(T).

    The bound of T (the roundings of the merge itself) carries on, and every requantization adds b at whatever T may
    be. Methods that multiply pass on what they received times their gain: running error analysis does it by itself.
    """
    now: Base = {**base, "weight": cast(m, base["weight"])}
    changed: Base = {}
    for site in sites:
        made = formula.merge(m, site, now)
        if "weight" in made:
            made = {**made, "weight": requantized(made["weight"], rule)}
        changed, now = {**changed, **made}, {**now, **made}
        now = {**now, "weight": cast(m, now["weight"])}
    return changed


def requantized(target: Bounded, rule: Rule) -> Bounded:
    """Return T with b(T) added to its bound."""
    return target.widened(rule(target.value, target.bound))


def unmerged(m: Machine, formula: Formula, sites: Sequence[Site], merged_base: Base, rule: Rule) -> Base | None:
    """Return the tensors after the adapters have been taken out again, last first: U = DQ(M) - D, b(U) each time.

    None for a method that does not come back by subtraction or by a matrix.
    """
    now: Base = {**merged_base, "weight": cast(m, merged_base["weight"])}
    for site in reversed(sites):
        back = _back(m, formula, site, now)
        if back is None:
            return None
        if "weight" in back:
            back = {**back, "weight": requantized(back["weight"], rule)}
        now = {**now, **back}
        now = {**now, "weight": cast(m, now["weight"])}
    return now


def _back(m: Machine, formula: Formula, site: Site, now: Base) -> Base | None:
    if formula.delta is not None:
        change = formula.delta(m, site)
        return {name: m.base.sub(now[name], m.base.rounded(form)) for name, form in change.items() if name in now}
    if formula.turn is not None:
        turn = formula.turn(m, site)
        return (
            {} if turn is None else {name: _turned_back(m, turn, name, now[name]) for name in turn.names if name in now}
        )
    return None


def _turned_back(m: Machine, turn: Turn, name: str, tensor: Bounded) -> Bounded:
    """Return a tensor times the inverse of the matrix that it was multiplied by, its rows divided by the gain."""
    rows = tensor.map(lambda t: turn.rows(name, t))
    undone = turn.arithmetic.bilinear(torch.matmul, rows, turn.inverse, turn.n)
    if turn.gain is not None:
        undone = turn.arithmetic.div(undone, turn.gain)
    return m.base.rounded(undone.map(lambda t: turn.back(name, t)))


def cycled(m: Machine, formula: Formula, sites: Sequence[Site], base: Base, rule: Rule, cycles: int) -> Base | None:
    """Return the tensors after `cycles` merges and unmerges, each from where the last one ended.

    An additive method goes back to W each time, so that the value of the k-th trip is W again and only the bound has
    grown: by b(T) + b(U) a trip, with T and U anywhere within it.
    """
    now: Base | None = base
    for _ in range(cycles):
        out = merged(m, formula, sites, now, rule)
        now = unmerged(m, formula, sites, {**now, **out}, rule)
        if now is None:
            return None
    return now
