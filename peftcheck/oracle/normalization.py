"""What a LayerNorm computes, with its bound."""

from __future__ import annotations

import torch

from peftcheck.rounding import Arithmetic, Bounded

EPSILON = 1e-5
"""torch's default, which the models under test keep."""


def layer_norm(ar: Arithmetic, weight: Bounded, bias: Bounded | None, x: Bounded) -> Bounded:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al., 2016, eq. 4).

    Kernels keep moments and the result in the accumulator and round once to store. The mean of n numbers is off by
    gamma(2n + 8) of the mean of their absolute values, the variance by gamma(2n + 8) of the mean of
    (abs(x) + abs(mean))^2, whether it is summed in one pass, in two, or by updates (Chan, Golub and LeVeque, 1983,
    table 1: with constants no larger). An error e of the mean moves the variance by at most
    2 e mean(abs(x) + abs(mean)) + e^2. Some kernels subtract the mean first, some mean / deviation afterwards: the
    bound is that of the second, which cancels more.
    """
    wide = Arithmetic(ar.store.accumulator)
    n = x.value.shape[-1]
    gamma = wide.store.gamma(2 * n + 8)
    size = x.ceiling().mean(-1, keepdim=True)
    center = wide.rounded(Bounded(x.value.mean(-1, keepdim=True), gamma * size))
    reach = x.ceiling() + center.ceiling()
    moved = 2 * center.bound * reach.mean(-1, keepdim=True) + center.bound**2
    spread = (x.value - center.value).square().mean(-1, keepdim=True)
    variance = wide.rounded(Bounded(spread, gamma * reach.square().mean(-1, keepdim=True) + moved))
    guard = torch.tensor(EPSILON, dtype=torch.float64)
    deviation = wide.sqrt(wide.add(variance, wide.rounded(Bounded(guard))))
    inverse = wide.div(Bounded(torch.ones((), dtype=torch.float64)), deviation)
    unit = wide.sub(wide.mul(x, inverse), wide.mul(center, inverse))
    y = wide.mul(unit, weight)
    return ar.rounded(y if bias is None else wide.add(y, bias))
