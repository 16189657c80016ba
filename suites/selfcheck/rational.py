"""Exact rational arithmetic on tensors, the judge of the tests of numerics."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


def exact(tensor: Tensor) -> np.ndarray:
    """Return the elements of a finite tensor as an array of Fractions."""
    result = np.empty(tuple(tensor.shape), dtype=object)
    flat = [Fraction(value) for value in tensor.detach().double().reshape(-1).tolist()]
    result.reshape(-1)[:] = flat
    return result


def convolution(x: np.ndarray, w: np.ndarray, stride, dilation, padding, groups: int) -> np.ndarray:
    """Return the convolution (zero padding) of x (N, C, *size) with w (O, C / groups, *kernel)."""
    kernel, size = w.shape[2:], x.shape[2:]
    geometry = zip(size, padding, dilation, kernel, stride, strict=True)
    out = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in geometry]
    y = np.full((x.shape[0], w.shape[0], *out), Fraction(0), dtype=object)
    per_in, per_out = w.shape[1], w.shape[0] // groups
    for n, o, *at in itertools.product(*map(range, y.shape)):
        total = Fraction(0)
        for c, *tap in itertools.product(*map(range, w.shape[1:])):
            place = [a * t + k * d - p for a, t, k, d, p in zip(at, stride, tap, dilation, padding, strict=True)]
            if all(0 <= i < s for i, s in zip(place, size, strict=True)):
                total += x[(n, o // per_out * per_in + c, *place)] * w[(o, c, *tap)]
        y[(n, o, *at)] = total
    return y


def root(value: Fraction) -> Fraction:
    """Return the square root to 200 bits."""
    return Fraction(math.isqrt(value.numerator * value.denominator << 400), value.denominator << 200)


def ratio(found: Tensor, due: np.ndarray, bound: Tensor) -> float:
    """Return the worst of abs(found - due) / bound: 0 for 0 / 0, inf over zero; infinite bounds allow anything."""
    assert tuple(found.shape) == due.shape
    limits = torch.broadcast_to(bound, found.shape).reshape(-1).tolist()
    worst = 0.0
    for value, target, limit in zip(found.double().reshape(-1).tolist(), due.reshape(-1), limits, strict=True):
        assert limit >= 0, "a bound is negative or NaN"
        if limit == math.inf:
            continue
        if not math.isfinite(value):
            return math.inf
        error = abs(Fraction(value) - target)
        worst = max(worst, float(error / Fraction(limit)) if limit else (math.inf if error else 0.0))
    return worst
