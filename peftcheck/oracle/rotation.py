"""OFT and BOFT: the weight is multiplied by an orthogonal matrix, block by block, parametrised by Cayley."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, Turn
from peftcheck.oracle.layers import convolve, layer_output, linear_map, with_bias
from peftcheck.oracle.turning import flat, merge_by_turning, on_patches, seen, turned_width, unflat
from peftcheck.rounding import Arithmetic, Bounded
from peftcheck.rounding_linalg import block_diagonal, cayley, invert, working


def skew(entries: Bounded) -> Bounded:
    """Return skew-symmetric blocks (r, b, b), whose upper triangles, row by row, are `entries` (r, b (b - 1) / 2)."""
    b = (1 + math.isqrt(1 + 8 * entries.value.shape[1])) // 2
    rows, columns = torch.triu_indices(b, b, 1)

    def spread(t: torch.Tensor, sign: float) -> torch.Tensor:
        full = t.new_zeros(t.shape[0], b, b)
        full[:, rows, columns] = t
        full[:, columns, rows] = sign * t
        return full

    error = None if entries.error is None else spread(entries.error, 1.0)
    return Bounded(spread(entries.value, -1.0), error)


def neumann(ar: Arithmetic, q: Bounded, terms: int) -> Bounded:
    """Return the truncated series of (I + Q)(I - Q)^-1 with powers up to `terms` - 1, the last one halved.

    (I + Q)(I + Q + ... + Q^k) = I + 2 Q + ... + 2 Q^k + Q^(k+1), which is k + 2 = `terms` terms (at least two).
    """
    eye = Bounded(torch.eye(q.value.shape[-1], dtype=torch.float64).expand_as(q.value))
    total, power = eye, q
    for exponent in range(1, terms):
        last = exponent == terms - 1
        total = ar.add(total, power if last else ar.scale(power, 2.0))
        if not last:
            power = ar.matmul(power, q)
    return total


def constrained(ar: Arithmetic, q: Bounded, radius: float) -> Bounded:
    """Return Q scaled down to Frobenius norm `radius` where it exceeds that; continuous where it does not."""
    norm = ar.norm(q, (-2, -1))
    outside = norm.ceiling() >= radius
    scaled = ar.scale(ar.div(q, norm), radius)
    value = torch.where(norm.value > radius, scaled.value, q.value)
    return Bounded(value, torch.where(outside & torch.isfinite(scaled.bound), scaled.bound, q.bound))


def oft_blocks(ar: Arithmetic, site: Site) -> Bounded:
    """Return the blocks R (r, b, b) of an OFT adapter in the arithmetic `ar`; shared blocks only once.

    The constrained form holds each block's Q within eps / sqrt(r); the library may project again what it projected
    before, so that the roundings of two projections are allowed.
    """
    entries, adapter = site.tensors["R"], site.adapter
    q = skew(entries)
    if adapter.option("coft") and q.value.numel():
        radius = adapter.option("eps") / math.sqrt(entries.value.shape[0])
        q = constrained(ar, constrained(ar, q, radius), radius)
    if adapter.option("neumann"):
        return neumann(ar, q, adapter.option("terms"))
    return cayley(ar, q)


def _repeated(blocks: Bounded, n: int) -> Bounded | None:
    """Return as many blocks as tile n, a shared one repeated; None where they do not."""
    count, b, _ = blocks.value.shape
    if n % b or count not in (1, n // b):
        return None
    return blocks if count == n // b else blocks.map(lambda t: t.expand(n // b, b, b))


def _fits(site: Site) -> bool:
    entries = site.tensors["R"].value
    b = (1 + math.isqrt(1 + 8 * entries.shape[1])) // 2
    n = turned_width(site.spec)
    return site.spec.groups == 1 and n % b == 0 and entries.shape[0] in (1, n // b)


def oft_turn(m: Machine, site: Site) -> Turn | None:
    """Return R^T, which multiplies the weight (out, fan-in) of a layer, or R for the rows of an embedding.

    Half-precision blocks are computed in fp32 and rounded once. Unmerging multiplies by the inverse of the stored
    blocks, by elimination: abs(X' R' - I) <= abs(X' - R'^-1) abs(R'), and the same from the other side.
    """
    if not _fits(site):
        return None
    n = turned_width(site.spec)
    blocks = m.adapter.rounded(_repeated(oft_blocks(working(m.adapter), site), n))
    inverse, fresh = invert(m.adapter, blocks)
    on_rows = site.spec.kind in EMBEDDINGS
    if on_rows:
        residual = blocks.ceiling() @ fresh
    else:
        residual = (fresh @ blocks.ceiling()).mT
        blocks, inverse = blocks.map(lambda t: t.mT), inverse.map(lambda t: t.mT)
    return Turn(
        block_diagonal(blocks),
        block_diagonal(inverse),
        torch.block_diag(*residual),
        blocks.value.shape[-1],
        m.adapter,
        flat,
        unflat(site.spec.weight_shape),
    )


def oft_rotated(m: Machine, site: Site, vectors: Bounded) -> Bounded:
    """Return R^T x for vectors x (..., n), in the adapter's arithmetic."""
    blocks = _repeated(m.adapter.rounded(oft_blocks(m.adapter, site)), turned_width(site.spec))
    matrix = block_diagonal(blocks)
    return m.adapter.bilinear(torch.matmul, m.adapter.rounded(vectors), matrix, blocks.value.shape[-1])


def oft_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return W R^T x + b; adapters rotate the input (of a look-up: its result) one after the other."""
    spec = sites[0].spec
    if not all(_fits(site) for site in sites):
        return layer_output(m.base, spec, base, x)
    on_rows = spec.kind in EMBEDDINGS
    vectors = linear_map(m.base, spec, base["weight"], x) if on_rows else seen(spec, x)
    for site in sites:
        vectors = oft_rotated(m, site, vectors)
    vectors = m.base.rounded(vectors)
    if on_rows:
        return vectors
    if spec.kind in CONVOLUTIONS:
        return with_bias(m.base, spec, on_patches(m.base, spec, base["weight"], vectors), base.get("bias"))
    return layer_output(m.base, spec, base, vectors)


def _boft_matrix(m: Machine, site: Site) -> Bounded | None:
    """Return R (n, n) of one butterfly factor: Cayley of the skew part (A - A^T) / 2 of each block."""
    blocks, n = site.tensors["R"], turned_width(site.spec)
    factors, count, b, _ = blocks.value.shape
    if factors != 1 or site.spec.groups != 1 or count * b != n:
        return None
    a = blocks.map(lambda t: t[0])
    q = m.adapter.scale(m.adapter.sub(a, a.map(lambda t: t.mT)), 0.5)
    # the difference is antisymmetric to the last bit, so that its diagonal is zero without error
    diagonal = torch.eye(b, dtype=torch.bool)
    return block_diagonal(cayley(m.adapter, replace(q, error=q.bound.masked_fill(diagonal, 0.0))))


def boft_turn(m: Machine, site: Site) -> Turn | None:
    """Return R^T with the gain s. Unmerging multiplies by R, not by an inverse.

    For the exact R R^T = I, so that abs(R' R'^T - I) <= e abs(R)^T + abs(R) e^T + e e^T with e the bound of R'.
    """
    matrix = _boft_matrix(m, site)
    if matrix is None:
        return None
    turned = matrix.map(lambda t: t.mT)
    size, e = turned.value.abs(), turned.bound
    residual = e @ size.mT + size @ e.mT + e @ e.mT
    shape, b = site.spec.weight_shape, site.tensors["R"].value.shape[-1]
    gain = site.tensors["s"].map(lambda t: t.reshape(-1, 1))
    return Turn(turned, matrix, residual, b, m.adapter, flat, unflat(shape), gain=gain)


def boft_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return s * (W R^T x) + b; several rotations and gains multiply up.

    A linear layer rotates its input and takes the bias off its output again before the gain: the cancellation costs
    one rounding of the larger number. A convolution computes its effective kernel.
    """
    spec = sites[0].spec
    turned = [_boft_matrix(m, site) for site in sites]
    if any(matrix is None for matrix in turned):
        return layer_output(m.base, spec, base, x)
    rotation = m.base.rounded(turned[0])
    gain = m.base.rounded(sites[0].tensors["s"].map(lambda t: t.reshape(-1)))
    for site, matrix in zip(sites[1:], turned[1:], strict=True):
        rotation = m.base.matmul(m.base.rounded(matrix), rotation)
        gain = m.base.mul(gain, m.base.rounded(site.tensors["s"].map(lambda t: t.reshape(-1))))
    if spec.kind in CONVOLUTIONS:
        kernel = base["weight"].map(lambda t: t.flatten(1))
        kernel = m.base.mul(m.base.matmul(kernel, rotation.map(lambda t: t.mT)), gain.map(lambda t: t[:, None]))
        kernel = kernel.map(lambda t: t.reshape(spec.weight_shape))
        return with_bias(m.base, spec, convolve(m.base, spec, kernel, x), base.get("bias"))
    y = layer_output(m.base, spec, base, m.base.matmul(x, rotation))
    if "bias" in base:
        y = m.base.sub(y, base["bias"])
    return with_bias(m.base, spec, m.base.mul(y, gain), base.get("bias"))


_CAYLEY = "Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, eq. 2 and section 3.3"

OFT = Formula(
    Family.ROTATION,
    merge_by_turning(oft_turn),
    oft_forward,
    _CAYLEY + "; Qiu et al., Orthogonal Finetuning Made Scalable, 2025, section 3.3 (Cayley-Neumann)",
    hints={"R": "rotation"},
    dyadic=False,
    turn=oft_turn,
)
BOFT = Formula(
    Family.ROTATION,
    merge_by_turning(boft_turn),
    boft_forward,
    "Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2024, eq. 4, with one factor",
    hints={"R": "rotation", "s": "scale"},
    dyadic=False,
    turn=boft_turn,
)

FORMULAS = {"oft": OFT, "boft": BOFT}
