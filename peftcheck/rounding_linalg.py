"""Bounds for what libraries leave to LAPACK: solving, inverting, and the Cayley transform.

Gaussian elimination with partial pivoting, in floating point with accumulator `a`, returns for each right-hand
side a solution of a system nearby (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., theorem 9.4):

    (A + E) x = b,    abs(E) <= gamma(3n) P^T abs(L) abs(U).

With partial pivoting abs(L) <= 1, so that (abs(L) abs(U))_ij <= c_j, the sum of column j of abs(U), whatever the
rows were exchanged with. A library may factor the transpose instead, whose backward error is the transpose of the
same bound. So the elementwise backward error is taken as G_ij = gamma(3n) max(c_j(A), c_i(A^T)); c is that of the
oracle's own elimination (a pivot that ties within rounding can be chosen otherwise; c bounds either choice only to
first order, which is the one place here that is not exact).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftcheck.rounding import Arithmetic, Bounded, precision


def working(ar: Arithmetic) -> Arithmetic:
    """Return the arithmetic that a solver works in: fp32 for half precision, whose formats LAPACK does not know."""
    return ar if ar.store.u == ar.store.a else Arithmetic(precision(torch.float32))


def backward_error(ar: Arithmetic, a: Tensor) -> Tensor:
    """Return G for the square matrices `a` (..., n, n): the elementwise backward error of solving with them."""
    n = a.shape[-1]
    column = torch.linalg.lu_factor_ex(a)[0].triu().abs().sum(-2, keepdim=True)
    row = torch.linalg.lu_factor_ex(a.mT)[0].triu().abs().sum(-2, keepdim=True).mT
    return ar.store.gamma(3 * n) * torch.maximum(column.expand_as(a), row.expand_as(a))


def _geometric(first: Tensor, factor: Tensor) -> Tensor:
    """Return E = first + E factor, the least fixed point: first (I - factor)^-1; infinite unless norm(factor) < 1.

    `factor` is nonnegative; its infinity norm below one makes the Neumann series converge, termwise nonnegative.
    """
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype).expand_as(factor)
    small = factor.sum(-1).amax(-1) < 1
    safe = torch.where(small[..., None, None], factor, torch.zeros_like(factor))
    total = torch.linalg.solve_ex(eye - safe, first, left=False)[0]
    return torch.where(small[..., None, None], total, torch.full_like(total, torch.inf))


def solve_right(ar: Arithmetic, a: Bounded, b: Bounded) -> Bounded:
    """Return X with X A = B, for (..., n, n) and (..., m, n), stored in `ar`.

    The machine's X' solves row by row x' (A' + E) = b' with abs(E) <= G, for its own A' and B'. Subtracting X A = B:

        (X' - X) A = (B' - B) - X' (A' - A) - X' E,
        e(X) <= (e(B) + (abs(X) + e(X)) (e(A) + G)) abs(A^-1),

    a fixed point in e(X) that is solved exactly.
    """
    value = torch.linalg.solve_ex(a.value, b.value, left=False)[0]
    inverse = torch.linalg.inv_ex(a.value)[0].abs()
    moved = a.bound + backward_error(working(ar), a.value)
    error = _geometric((b.bound + value.abs() @ moved) @ inverse, moved @ inverse)
    return ar.rounded(Bounded(value, error))


def invert(ar: Arithmetic, a: Bounded) -> tuple[Bounded, Tensor]:
    """Return the inverse of the machine's A' as the machine computes it, and how far from the inverse of A' it is.

    Column by column (A' + E) x' = e_j: X' - A'^-1 = -A'^-1 E X', then one rounding to store. The bounds:

        against A^-1:   e <= abs(A^-1) (e(A) + G) (abs(A^-1) + e), a fixed point,
        against A'^-1:  (abs(A^-1) + e) G (abs(A^-1) + e), plus the rounding.

    The second is what matters where the same A' was multiplied by before: its own error cancels.
    """
    value = torch.linalg.inv_ex(a.value)[0]
    size = value.abs()
    g = backward_error(working(ar), a.value)
    moved = size @ (a.bound + g)
    error = _geometric((moved @ size).mT, moved.mT).mT
    stored = ar.rounded(Bounded(value, error))
    ceiling = stored.ceiling()
    fresh = ceiling @ g @ ceiling + ar.rounded(Bounded(ceiling)).bound
    return stored, fresh


def cayley(ar: Arithmetic, q: Bounded) -> Bounded:
    """Return (I - Q)(I + Q)^-1 for skew-symmetric Q (..., n, n), stored in `ar`.

    I + Q and I - Q are stored without rounding: the diagonal of Q is zero. I + Q is never singular (its symmetric
    part is I, so that norm2((I + Q)^-1) <= 1), and the result is orthogonal.
    """
    eye = Bounded(torch.eye(q.value.shape[-1], dtype=torch.float64).expand_as(q.value))
    plus = Bounded(eye.value + q.value, q.error)
    minus = Bounded(eye.value - q.value, q.error)
    return solve_right(ar, plus, minus)


def flushing_matmul(ar: Arithmetic, x: Bounded, y: Bounded, n: int) -> Bounded:
    """Return x @ y, where a bfloat16 kernel may take subnormal operands and results for zero.

    The instruction VDPBF16PS always does. An operand below the smallest normal number t that counts as zero costs
    at most t times the other one; a partial sum that does, at most t each of n times.
    """
    product = ar.bilinear(torch.matmul, x, y, n)
    if ar.store.dtype != torch.bfloat16:
        return product
    t = torch.finfo(ar.store.dtype).tiny
    left, right = x.ceiling(), y.ceiling()
    return product.widened(left.clamp_max(t) @ right + left @ right.clamp_max(t) + n * t)


def block_diagonal(blocks: Bounded) -> Bounded:
    """Return the block-diagonal matrix of blocks (r, b, b); nothing rounds."""
    return blocks.map(lambda t: torch.block_diag(*t))
