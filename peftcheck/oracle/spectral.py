"""Deltas given by their transforms: FourierFT, C3A (circular convolution), WaveFT.

The error of a fast Fourier transform. Let it factor into stages of prime radices p (any order, any way of grouping
them into butterflies that themselves factor): in a stage, each output sums p inputs times twiddles. A product of
complex numbers is off by sqrt(2) gamma(2) relatively, the twiddle by a unit roundoff or so, the sum by gamma(p): at
most gamma(p + 8) of the sum of absolute values (Higham, *Accuracy and Stability*, 2nd ed., section 24.1, for p = 2).
The matrix of absolute values has norm p, the butterfly norm sqrt(p): a stage errs normwise by

    eta_p = sqrt(p) gamma(p + 8),     the whole by  eta = prod (1 + eta_p) - 1,   norm(error) <= eta norm(result).

Transforms of prime length by a convolution (Bluestein, Rader) err more; no kernel uses them below length 50.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Machine, Site
from peftcheck.oracle.layers import linear_map, oriented
from peftcheck.oracle.sparse import scattered
from peftcheck.rounding import EXACT_FP64, Arithmetic, Bounded, Precision, precision


def fft_error(numbers: Precision, n: int) -> float:
    """Return eta: the normwise relative error of a discrete Fourier transform of length n in the accumulator."""
    growth, p = 1.0, 2
    while n > 1:
        while n % p == 0:
            growth *= 1 + math.sqrt(p) * numbers.gamma(p + 8)
            n //= p
        p += 1
    return growth - 1


def _working(ar: Arithmetic) -> Arithmetic:
    """Return the arithmetic of the transform: single precision for half, whose formats no transform knows."""
    return Arithmetic(ar.store.accumulator)


def fourierft(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return alpha Re IDFT2(F): alpha / (d1 d2) sum_e c_e cos(2 pi (p j_e / d1 + q k_e / d2)).

    The phases are reduced exactly, as integers. Parseval: the transform's result has norm(c) / sqrt(d1 d2); each of
    its elements errs by no more than the norm of all errors. The sum taken here errs by (n + 8) 2^-53 sum abs(c).
    """
    rows, columns = site.spec.n_out, site.spec.n_in
    wide, c = _working(m.adapter), site.tensors["spectrum"].value
    j, k = site.tensors["entries"].value.long()
    p, q = torch.arange(rows).reshape(-1, 1, 1), torch.arange(columns).reshape(1, -1, 1)
    phase = (p * j % rows).double() / rows + (q * k % columns).double() / columns
    value = (torch.cos(2 * math.pi * phase) * c).sum(-1) / (rows * columns)
    eta = (1 + fft_error(wide.store, rows)) * (1 + fft_error(wide.store, columns)) - 1
    kernel = eta * torch.linalg.vector_norm(c) / math.sqrt(rows * columns)
    own = (c.numel() + 8) * EXACT_FP64.u * c.abs().sum() / (rows * columns)
    transform = wide.rounded(Bounded(value, (kernel + own).expand_as(value)))
    delta = m.adapter.rounded(wide.scale(transform, site.adapter.alpha))
    return {"weight": oriented(site.spec, delta)}


def _on_input(delta):
    def path(m: Machine, site: Site, x: Bounded) -> Bounded:
        return linear_map(m.adapter, site.spec, delta(m, site)["weight"], x)

    return path


_SINGLE = Arithmetic(precision(torch.float32))


def _circulant(kernel: Tensor) -> Tensor:
    """Return the matrix (out, in) whose blocks C[k, i] = w[(i - k) mod b] come from kernels (m, n, b)."""
    b = kernel.shape[-1]
    shift = (torch.arange(b).reshape(1, -1) - torch.arange(b).reshape(-1, 1)) % b
    return kernel[:, :, shift].permute(0, 2, 1, 3).reshape(kernel.shape[0] * b, -1)


def _convolution_error(n: int, b: int) -> float:
    """Return e: sum_n FFT(IFFT(x_n) FFT(w_n)) errs by at most e sqrt(b) sum_n norm(w_n) norm(x_n).

    Three transforms, a product (gamma(4)) and a sum of n blocks in single precision; FFT(w) has elements of at most
    sqrt(b) norm(w), IFFT(x) norm(x) / sqrt(b), and the last transform multiplies norms by sqrt(b).
    """
    numbers = _SINGLE.store
    return (1 + fft_error(numbers, b)) ** 3 * (1 + numbers.gamma(4)) * (1 + numbers.gamma(n)) - 1


def c3a(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return the block-circulant matrix over fan-in, transformed in single precision, which the library announces."""
    kernel = _SINGLE.rounded(site.tensors["kernel"])
    b = kernel.value.shape[-1]
    norms = torch.linalg.vector_norm(kernel.ceiling(), dim=-1)
    error = _convolution_error(1, b) * math.sqrt(b) * norms
    spread = _circulant(kernel.bound) + error.repeat_interleave(b, 0).repeat_interleave(b, 1)
    matrix = m.base.rounded(_SINGLE.rounded(Bounded(_circulant(kernel.value), spread)))
    width = torch.tensor(float(site.spec.n_in), dtype=torch.float64)
    return {"weight": m.base.div(matrix, Bounded(width))}


def c3a_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return the circular convolution of x with each kernel, summed over the input's blocks, over fan-in."""
    kernel, x = _SINGLE.rounded(site.tensors["kernel"]), _SINGLE.rounded(x)
    n, b = kernel.value.shape[1:]
    matrix = Bounded(_circulant(kernel.value), _circulant(kernel.bound))
    norms = torch.linalg.vector_norm(kernel.ceiling(), dim=-1)
    blocks = torch.linalg.vector_norm(x.ceiling().reshape(*x.value.shape[:-1], n, b), dim=-1)
    error = _convolution_error(n, b) * math.sqrt(b) * (blocks @ norms.T).repeat_interleave(b, -1)
    value = x.value @ matrix.value.T
    moved = x.ceiling() @ matrix.bound.T + x.bound @ matrix.value.abs().T
    y = _SINGLE.rounded(Bounded(value, moved + error))
    width = torch.tensor(float(site.spec.n_in), dtype=torch.float64)
    return m.base.rounded(_SINGLE.div(y, Bounded(width)))


LOW_PASS = {
    "db1": [1 / math.sqrt(2)] * 2,
    "db2": [(f + g * math.sqrt(3)) / (4 * math.sqrt(2)) for f, g in ((1, 1), (3, 1), (3, -1), (1, -1))],
}
"""Daubechies' orthonormal scaling filters: Daubechies, Ten Lectures on Wavelets, 1992, section 6.4."""


def _filters(ar: Arithmetic, family: str) -> tuple[Bounded, Bounded]:
    """Return the low-pass filter h and the high-pass filter g[k] = (-1)^k h[L - 1 - k], as the machine stores them."""
    low = torch.tensor(LOW_PASS[family], dtype=torch.float64)
    sign = torch.tensor([(-1.0) ** k for k in range(len(low))], dtype=torch.float64)
    stored = ar.rounded(Bounded(low, 4 * EXACT_FP64.u * low.abs()))
    return stored, Bounded(sign * stored.value.flip(0), stored.bound.flip(0))


def _synthesis(taps: Bounded, half: int) -> Bounded:
    """Return the matrix S (2 half - L + 2, half) of one filter: S[i, s] = f[i + L - 2 - 2 s], what wraps cut off."""
    length = taps.value.numel()
    place = torch.arange(2 * half - length + 2).reshape(-1, 1) + length - 2 - 2 * torch.arange(half).reshape(1, -1)
    inside = (place >= 0) & (place < length)
    return taps.map(lambda t: torch.where(inside, t[place.clamp(0, length - 1)], torch.zeros((), dtype=t.dtype)))


def waveft(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return lambda IDWT2(C), cut to (out, in), for one level of an orthonormal wavelet of filter length L.

    The grid of coefficients is the weight's, widened by L - 2 and to even size, the entries in its middle; its
    quadrants are the approximation, the details down (top right), across (bottom left) and both, a layout that the
    paper leaves open: the sum over the bands of S_down C_band S_across^T.
    An output sums L^2 products (L / 2 places and two filters per axis) of a coefficient and a filter of two taps,
    rounded when their product is stored, in the accumulator; half-precision kernels store the up to L^2 / 4 partial
    sums of overlapping places. With T the sum of absolute products, these cost gamma(L^2) T + L^2 / 4 v T.
    """
    ar, spec = m.adapter, site.spec
    filters = _filters(ar, site.adapter.option("wavelet"))
    length = filters[0].value.numel()
    rows, columns = ((n + length - 1) // 2 * 2 for n in (spec.n_out, spec.n_in))
    shift = torch.tensor([[(rows - spec.n_out) // 2], [(columns - spec.n_in) // 2]])
    grid = scattered(site.tensors["spectrum"], site.tensors["entries"].value + shift, (rows, columns)).value
    value, exact, terms = 0.0, 0.0, 0.0
    for down in (0, 1):
        for across in (0, 1):
            left, right = _synthesis(filters[down], rows // 2), _synthesis(filters[across], columns // 2)
            band = grid[across * rows // 2 :, down * columns // 2 :][: rows // 2, : columns // 2]
            value = value + left.value @ band @ right.value.T
            exact = exact + left.value.abs() @ band.abs() @ right.value.abs().T
            terms = terms + left.ceiling() @ band.abs() @ right.ceiling().T
    v, n = ar.store.roundoff, length * length
    terms = terms * (1 + v)
    carried = (terms - exact) + (ar.store.gamma(n) + n / 4 * v) * terms + n * ar.store.eta
    made = ar.scale(ar.rounded(Bounded(value, carried)), site.adapter.alpha)
    top, left = ((have - want) // 2 for have, want in zip(value.shape, (spec.n_out, spec.n_in), strict=True))
    return {"weight": oriented(spec, made.map(lambda t: t[top : top + spec.n_out, left : left + spec.n_in]))}


FORMULAS = {
    "fourierft": additive(
        fourierft,
        _on_input(fourierft),
        "Gao et al., FourierFT, 2024, eq. 2-4, with the 1 / (d1 d2) of the inverse transform of its algorithm 1",
        dyadic=False,
    ),
    "c3a": additive(
        c3a,
        c3a_path,
        "Chen et al., C3A, 2024: block-circular convolution with the kernel as the first row; over the fan-in",
        dyadic=False,
    ),
    "waveft": additive(
        waveft,
        _on_input(waveft),
        "Bilican et al., WaveFT, 2025: W + lambda IDWT(C); Daubechies, Ten Lectures on Wavelets, 1992, section 5.1",
        dyadic=False,
    ),
}
