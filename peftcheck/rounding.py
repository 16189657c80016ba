"""Running error analysis: values in fp64 that carry a proved bound on what a machine makes of them.

The closed form of a method is written once, in the operations of an `Arithmetic`. Each operation computes the
value in fp64 and adds to the bound what one rounding of the arithmetic under test may cost there (Wilkinson's
running error analysis; Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., sections 2.2 and 3.3):

    fl(x op y) = (x op y)(1 + d) + e,    abs(d) <= u,  abs(e) <= eta / 2
    fl(sum of n products) = sum + d,     abs(d) <= gamma(n) sum abs(products) + n eta,  gamma(n) = n a / (1 - n a)

`u` is the unit roundoff of the dtype that a result is stored in, `a` that of the accumulator, `eta` the smallest
subnormal (of the accumulator where products are summed). The bound is first order nowhere: incoming errors are
propagated in full. Where a result may overflow its bound is infinite: such a value vouches for nothing.

The exact regime is the same mechanism. A value may carry a `quantum` q: every element is an integer multiple of
q. Where the sum of absolute products over q fits the significand of the storage and of the accumulator, every
partial sum in every order is representable, nothing rounds, and the operation adds zero to the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from peftcheck.errors import HarnessError

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SIGNIFICAND = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True)
class Precision:
    """The constants of a floating-point format as a store and of the accumulator that feeds it.

    Half-precision kernels accumulate in fp32 (`calibration` measures that they do) and round once to store. `u`,
    `a`: unit roundoffs of store and accumulator; `eta`, `largest`: smallest subnormal and largest number of the store.
    """

    dtype: torch.dtype
    bits: int
    u: float
    a: float
    eta: float
    largest: float

    @property
    def accumulator(self) -> Precision:
        """The format that sums are kept in: fp64 for fp64, else fp32."""
        return _PRECISIONS[torch.float64 if self.dtype == torch.float64 else torch.float32]

    @property
    def roundoff(self) -> float:
        """The relative error of one stored operation: u, or (1 + u)(1 + a) - 1 where it is rounded to a first."""
        return self.u if self.u == self.a else self.u + self.a * (1 + self.u)

    def gamma(self, n: int) -> float:
        """Return `n a / (1 - n a)`; raises HarnessError unless `n a < 1/2`."""
        if n * self.a >= 0.5:
            raise HarnessError(f"gamma({n}) is meaningless with unit roundoff {self.a}")
        return n * self.a / (1 - n * self.a)


def precision(dtype: torch.dtype) -> Precision:
    """Return the constants of `dtype` (one of the four floating-point formats of a base)."""
    return _PRECISIONS[dtype]


def _precision(dtype: torch.dtype) -> Precision:
    info, bits = torch.finfo(dtype), _SIGNIFICAND[dtype]
    accumulator = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    eta = info.tiny * 2.0 ** (1 - bits)
    return Precision(dtype, bits, 2.0**-bits, accumulator, eta, info.max)


_PRECISIONS = {dtype: _precision(dtype) for dtype in DTYPES.values()}
EXACT_FP64 = _PRECISIONS[torch.float64]


@dataclass(frozen=True)
class Bounded:
    """A tensor with a bound on how far a correct computation of it may be off.

    `value` fp64; `error` fp64 of the same shape, or None for zero; `quantum` a power of two of which every
    element of `value` is an integer multiple (only ever set together with `error=None`). `products`, where the value
    comes straight out of a kernel, are the sum of its absolute products and their number (see `Arithmetic.join`).
    """

    value: Tensor
    error: Tensor | None = None
    quantum: float | None = None
    products: tuple[Tensor, int] | None = None

    def map(self, move: Callable[[Tensor], Tensor]) -> Bounded:
        """Apply `move`, which only rearranges or selects elements, to the value and to its bound."""
        products = None if self.products is None else (move(self.products[0]), self.products[1])
        return Bounded(move(self.value), None if self.error is None else move(self.error), self.quantum, products)

    @property
    def bound(self) -> Tensor:
        """The bound as a tensor, zeros where nothing rounds."""
        return torch.zeros_like(self.value) if self.error is None else self.error

    def ceiling(self) -> Tensor:
        """Return `abs(value) + error`: no correct computation exceeds it."""
        known = self.__dict__.get("_ceiling")  # operations ask for it again and again
        if known is None:
            known = self.value.abs() if self.error is None else self.value.abs() + self.error
            self.__dict__["_ceiling"] = known
        return known

    def widened(self, extra: Tensor | float) -> Bounded:
        """Return the value with `extra` added to its bound."""
        return Bounded(self.value, self.bound + extra)


def quantum_of(tensor: Tensor) -> float:
    """Return the largest power of two that divides every element of `tensor` (2^64 if all are zero).

    fp64, finite. Exact: the lowest set bit of each 53-bit significand, scaled by its exponent.
    """
    significand, exponent = np.frexp(tensor.detach().double().numpy())
    integers = np.ldexp(significand, 53).astype(np.int64)
    quanta = np.ldexp((integers & -integers).astype(np.float64), exponent - 53)[integers != 0]
    return float(quanta.min()) if quanta.size else 2.0**64


def leaf(tensor: Tensor, exact: bool = False) -> Bounded:
    """Return a stored tensor as it is, without error; with `exact`, its quantum is measured too."""
    value = tensor.detach().to(torch.float64, copy=True)
    return Bounded(value, None, quantum_of(value) if exact and bool(torch.isfinite(value).all()) else None)


@dataclass(frozen=True)
class Arithmetic:
    """The operations of a machine that stores in `store` and accumulates in its accumulator.

    `single` is what parts of a model keep to in any dtype (the softmax of an attention, angles of positions): single
    precision, unless it is asked what they compute in exact arithmetic.

    Each method returns the fp64 value of the operation and a bound for its result as that machine computes it
    from operands that are themselves within their bounds.
    """

    store: Precision
    single: Precision = _PRECISIONS[torch.float32]

    def _stored(self, value: Tensor, error: Tensor | None, terms: Tensor, n: int, quantum: float | None) -> Bounded:
        """Round a result to storage: `terms` bounds its sum of absolute products, `n` counts its additions."""
        if quantum is not None and error is None and self._representable(terms, quantum):
            return Bounded(value, None, quantum)
        carried = 0.0 if error is None else error
        if n > 1:
            kept = self.store.accumulator
            carried = carried + (self.store.gamma(n) * terms + n * kept.eta)
            if not _below(terms, kept.largest / 2):
                carried = torch.where(terms <= kept.largest / 2, carried, math.inf)
        return self._round(value, carried)

    def _round(self, value: Tensor, carried: Tensor | float) -> Bounded:
        """Round a value that is off by `carried` already to storage, where it may overflow."""
        ceiling = value.abs() + carried
        error = carried + (self.store.roundoff * ceiling + self.store.eta)
        if not _below(ceiling + error, self.store.largest):
            error = torch.where(ceiling + error <= self.store.largest, error, math.inf)
        return Bounded(value, error)

    def _representable(self, terms: Tensor, quantum: float) -> bool:
        """Return whether every partial sum of the terms is a number of the store, hence of its accumulator too.

        Each is an integer multiple of the quantum, less than 2^bits quanta large: such multiples have no more than
        `bits` significant bits. The quantum is no finer than the smallest subnormal, the sum below overflow. `terms`
        is itself summed in fp64, where a partial sum that reaches 2^53 quanta may be rounded, but never below them.
        """
        if terms.numel() == 0:
            return True
        largest = float(terms.max())
        return largest < 2.0**self.store.bits * quantum and quantum >= self.store.eta and largest <= self.store.largest

    def rounded(self, x: Bounded) -> Bounded:
        """Cast to storage: one rounding."""
        if x.quantum is not None and self._representable(x.value.abs(), x.quantum):
            return x
        return self._round(x.value, 0.0 if x.error is None else x.error)

    def add(self, x: Bounded, y: Bounded) -> Bounded:
        """Return x + y."""
        error = _sum(x.error, y.error)
        value = x.value + y.value
        return self._stored(value, error, x.ceiling() + y.ceiling(), 1, _least(x, y))

    def sub(self, x: Bounded, y: Bounded) -> Bounded:
        """Return x - y."""
        return self.add(x, replace(y, value=-y.value))

    def mul(self, x: Bounded, y: Bounded) -> Bounded:
        """Return the elementwise product (with broadcasting)."""
        value = x.value * y.value
        return self._stored(value, _product_error(x, y, torch.mul), x.ceiling() * y.ceiling(), 1, _times(x, y))

    def join(self, x: Bounded, addend: Bounded) -> Bounded:
        """Return x + addend, where the kernel that summed x may have put the addend into its sum (a bias).

        Apart: two roundings, as in `add`. Within: the n products and the addend meet at most n + 1 roundings each,
        gamma(n + 1) of all their absolute values, wherever the sum starts; a large addend makes each of them count.
        The bound covers both. In the exact regime every partial sum with the addend has to be representable.
        """
        apart = self.add(x, addend)
        if x.products is None:
            return apart
        terms, n = x.products
        together = terms + addend.ceiling()
        if apart.quantum is not None:
            if self._representable(together, apart.quantum):
                return apart
            apart = self._round(apart.value, 0.0)
        carried = self.store.gamma(n + 1) * together
        if x.error is not None:
            carried = carried - self.store.gamma(n) * terms  # which is in the bound of x
        return apart.widened(carried * (1 + self.store.roundoff))

    def scale(self, x: Bounded, factor: float) -> Bounded:
        """Return x times a Python number, which the machine holds in fp64 or rounds to its accumulator."""
        if factor == 1.0:
            return x
        held = factor if self.store.dtype == torch.float64 else float(np.float32(factor))
        number = torch.tensor(factor, dtype=torch.float64)
        if held != factor:
            return self.mul(x, Bounded(number, torch.full_like(number, abs(held - factor))))
        return self.mul(x, Bounded(number, None, None if x.quantum is None else quantum_of(number)))

    def div(self, x: Bounded, y: Bounded) -> Bounded:
        """Return x / y; the bound is infinite where y's bound reaches zero.

        (x + dx) / (y + dy) - x / y = (dx - (x / y) dy) / (y + dy).
        """
        value = x.value / y.value
        room = y.value.abs() - y.bound
        error = (x.bound + value.abs() * y.bound) / room
        return self._round(value, torch.where((room > 0) & value.isfinite(), error, math.inf))

    def matmul(self, x: Bounded, y: Bounded) -> Bounded:
        """Return the matrix product; the inner dimension may be summed in any order."""
        return self.bilinear(torch.matmul, x, y, x.value.shape[-1])

    def bilinear(self, op: Callable[[Tensor, Tensor], Tensor], x: Bounded, y: Bounded, n: int) -> Bounded:
        """Return `op(x, y)` for a bilinear `op` that sums at most `n` products per element in any order.

        The dot-product instructions for bf16 (VDPBF16PS) take subnormal operands for zero and flush every subnormal
        product and partial sum: 2n times the smallest normal number, and what the operands lose.
        """
        value = op(x.value, y.value)
        terms = op(x.ceiling(), y.ceiling())
        stored = self._stored(value, _product_error(x, y, op), terms, n, _times(x, y))
        if self.store.dtype == torch.bfloat16 and stored.error is not None:
            tiny = torch.finfo(torch.bfloat16).tiny
            lost_x, lost_y = _subnormal(x, tiny), _subnormal(y, tiny)
            stored = stored.widened(2 * n * tiny)
            if bool(lost_x.any()):
                stored = stored.widened(op(lost_x, y.ceiling()))
            if bool(lost_y.any()):
                stored = stored.widened(op(x.ceiling(), lost_y))
        return replace(stored, products=(terms, n))

    def sum(self, x: Bounded, dim: int | tuple[int, ...], keepdim: bool = True) -> Bounded:
        """Return the sum over `dim`, in any order."""
        dims = (dim,) if isinstance(dim, int) else dim
        n = math.prod(x.value.shape[d] for d in dims)
        error = None if x.error is None else x.error.sum(dims, keepdim)
        return self._stored(x.value.sum(dims, keepdim), error, x.ceiling().sum(dims, keepdim), n, x.quantum)

    def sqrt(self, x: Bounded) -> Bounded:
        """Return the square root of what no correct computation makes negative (a sum of squares).

        abs(sqrt(x + e) - sqrt(x)) = abs(e) / (sqrt(x + e) + sqrt(x)) <= min(e / sqrt(x), sqrt(e)). The second grows
        more slowly than e, so that an fp64 oracle may use up to 2^-14 of it (see `judged`). Vector libraries are
        accurate to one unit in the last place, not to half of one: an `a` more.
        """
        value = x.value.sqrt()
        moved = torch.zeros_like(value)
        if x.error is not None:
            root = x.error.sqrt()
            moved = (1 + 2.0**-14) * torch.where(value > root, x.error / value, root)
        return self._round(value, moved + self.store.a * (value + moved))

    def norm(self, x: Bounded, dim: int | tuple[int, ...]) -> Bounded:
        """Return the 2-norm over `dim`, keeping it.

        The sum of n squares is off by g = gamma(n) relatively, its root by at most g (1 + g) / 2; for the rest see
        `sqrt`. Squares that underflow add n eta to the sum; those that overflow make the bound infinite. An incoming
        error e moves the norm by at most norm(e).
        """
        dims = (dim,) if isinstance(dim, int) else dim
        n = math.prod(x.value.shape[d] for d in dims)
        value = torch.linalg.vector_norm(x.value, dim=dims, keepdim=True)
        moved = 0.0 if x.error is None else torch.linalg.vector_norm(x.error, dim=dims, keepdim=True)
        ceiling, kept, g = value + moved, self.store.accumulator, self.store.gamma(n)
        lost = n * kept.eta
        carried = moved + (g * (1 + g) / 2 + self.store.a) * ceiling
        carried = carried + torch.where(value > math.sqrt(lost), lost / value, math.sqrt(lost))
        return self._round(value, torch.where(ceiling <= math.sqrt(kept.largest) / 2, carried, math.inf))

    def apply(
        self, x: Bounded, function: Callable[[Tensor], Tensor], slope: Tensor | float, ulps: float = 4
    ) -> Bounded:
        """Return `function(x)` elementwise, for a function whose derivative is at most `slope` in absolute value.

        `slope` must hold wherever a correct computation of x may lie. `ulps`: how many units roundoff of the
        accumulator the machine's implementation of the function may err relatively, the last rounding included.
        """
        value = function(x.value)
        moved = x.bound * slope
        return self._round(value, moved + (ulps - 1) * self.store.a * (value.abs() + moved))


def _subnormal(x: Bounded, tiny: float) -> Tensor:
    """Return the magnitudes of what may be subnormal, zeros elsewhere."""
    return torch.where(x.value.abs() - x.bound < tiny, x.ceiling(), 0.0)


def _below(x: Tensor, limit: float) -> bool:
    return x.numel() == 0 or float(x.max()) <= limit


def _product_error(x: Bounded, y: Bounded, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    error = None
    if y.error is not None:
        error = op(x.value.abs(), y.error)
    if x.error is not None:
        error = _sum(error, op(x.error, y.ceiling()))
    return error


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _least(x: Bounded, y: Bounded) -> float | None:
    return None if x.quantum is None or y.quantum is None else min(x.quantum, y.quantum)


def _times(x: Bounded, y: Bounded) -> float | None:
    if x.quantum is None or y.quantum is None:
        return None
    return x.quantum * y.quantum


def judged(x: Bounded, oracle: Precision = EXACT_FP64, machine: Precision | None = None) -> Tensor:
    """Return the budget for comparing a machine's result with this fp64 value.

    The oracle itself computes in fp64, with the same operations, so it errs by at most the machine's bound
    times the quotient of the two unit roundoffs (bounds grow at least linearly in them): twice the bound for an
    fp64 machine, 1 + 2^-29 otherwise. Where nothing rounds the budget is zero.
    """
    if x.error is None:
        return torch.zeros_like(x.value)
    machine = machine or oracle
    return x.error * (1 + oracle.a / machine.a)
