"""Measure what the budgets assume of this machine's kernels, before anything is judged by them.

The budgets stand on five facts: a kernel that sums K products of half precision keeps its sum in fp32 and rounds it
once; elementwise operations round once; subnormal numbers are not flushed; sums of integers that fit the
accumulator are exact; and Python factors are not rounded to half precision. None of it is in torch's contract, and a
fast path of another processor could break any. The judge is exact: `math.fsum` over products that fp64 holds
exactly, and rationals.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcheck import processor
from peftcheck.errors import HarnessError
from peftcheck.rounding import DTYPES, Precision, precision

FAN_INS = (64, 512, 4096)
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
Probe = tuple[Kernel, Callable[[Tensor], Tensor], Callable[[int], tuple[int, ...]]]
_BATCH = 2


def _outputs(n: int) -> int:
    """Return how many outputs to look at: of short sums so many that some nearly cancel, where products show."""
    return 24 if n <= 64 else 2


def _patches(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return the windows that a convolution sums over, (positions, channels x kernel)."""
    dims = len(kernel)
    for axis, width in enumerate(kernel):
        x = x.unfold(2 + axis, width, 1)
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.permute(order).reshape(-1, x.shape[1] * math.prod(kernel))


def _convolution(convolve: Kernel, dims: int) -> Probe:
    kernel = (2,) * dims

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = convolve(x, w.reshape(len(w), -1, *kernel), b)
        return y.movedim(1, -1).reshape(-1, len(w))

    return run, lambda x: _patches(x, kernel), lambda n: (_BATCH, n // 2**dims, *(2 if d else 3 for d in range(dims)))


def _rows(shape: Callable[[int], tuple], run: Kernel) -> Probe:
    return run, lambda x: x.reshape(-1, x.shape[-1]), shape


# name: how to run (x, w (out, K), bias) -> (positions, out), the rows that it sums over, and the shape of x
KERNELS: dict[str, Probe] = {
    "linear": _rows(lambda n: (_BATCH, n), F.linear),
    "linear.vector": _rows(lambda n: (n,), lambda x, w, b: F.linear(x, w, b)[None]),
    "matmul": _rows(lambda n: (_BATCH, n), lambda x, w, b: x @ w.t().contiguous() + 0 * b),
    "conv1d": _convolution(F.conv1d, 1),
    "conv2d": _convolution(F.conv2d, 2),
    "conv3d": _convolution(F.conv3d, 3),
    "sum": _rows(lambda n: (_BATCH, n), lambda x, w, b: x.sum(-1)[:, None] + 0 * b),
}


def calibrate(fan_ins: tuple[int, ...] = FAN_INS) -> dict:
    """Measure the machine and return what was found, as JSON data; takes less than a second.

    `accumulation[kernel][dtype]`: the worst error over `gamma(K + 1) (abs(W) abs(x) + abs(b)) + u abs(y)`, at most 1;
    `elementwise[dtype]`: the worst error of one operation over one rounding, at most 1; `flushes`: the (kernel,
    dtype) whose products of subnormal numbers come out as zero (which no budget relies on). Raises HarnessError where
    a fact does not hold, naming kernel and dtype. Run it under `engine.pinned()`, as everything that it vouches for.
    """
    accumulation: dict[str, dict[str, float]] = {}
    flushes = []
    for kernel in KERNELS:
        accumulation[kernel] = {}
        for name, dtype in DTYPES.items():
            worst = max(_accumulation(kernel, dtype, n, positive) for n in fan_ins for positive in (True, False))
            _require(worst <= 1, f"{kernel} in {name} errs by {worst:.3g} times what its accumulator allows")
            _require(_exact(kernel, dtype, max(fan_ins)), f"{kernel} in {name} does not sum small integers exactly")
            accumulation[kernel][name] = worst
            if _flushes(kernel, dtype):
                flushes.append([kernel, name])
    accumulation["norm"] = {}
    elementwise = {}
    for name, dtype in DTYPES.items():
        accumulation["norm"][name] = worst = max(_norm(dtype, n) for n in fan_ins)
        _require(worst <= 1, f"norm in {name} errs by {worst:.3g} times what its accumulator allows")
        elementwise[name] = worst = _elementwise(dtype)
        _require(worst <= 1, f"elementwise operations in {name} err by {worst:.3g} times one rounding")
        _require(_keeps_subnormals(dtype), f"subnormal numbers are flushed in {name}")
    return {
        "fan_in": max(fan_ins),
        "accumulation": accumulation,
        "elementwise": elementwise,
        "flushes": flushes,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": sorted(processor.features()),
    }


def _require(fact: bool, message: str) -> None:
    if not fact:
        raise HarnessError(f"calibration: {message}; the budgets do not hold on this machine")


def _operands(kernel: str, dtype: torch.dtype, n: int, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, w and bias: positive ones drive the sum up, others cancel; their products are exact in fp64.

    A sum of positive terms stops growing at 2^8 in bf16, at 2^11 in fp16: nothing shows more plainly where it is kept.
    """
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        real = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.25
        if not positive:
            real = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (torch.round(real * 2.0**22) * 2.0**-22).to(dtype)  # 26 bits at most: products fit 53

    x, w, b = draw(*KERNELS[kernel][2](n)), draw(_outputs(n), n), 16 * draw(_outputs(n))
    if kernel == "sum":
        w = torch.ones_like(w)
    if kernel in ("sum", "matmul"):
        b = torch.zeros_like(b)
    return x, w, b


def _accumulation(kernel: str, dtype: torch.dtype, n: int, positive: bool) -> float:
    run, rows, _ = KERNELS[kernel]
    numbers = precision(dtype)
    x, w, b = _operands(kernel, dtype, n, positive)
    found = run(x, w, b).double()
    products = rows(x.double())[:, None, :] * w.double()
    worst = 0.0
    for position, outputs in enumerate(products.tolist()):
        for output, terms in enumerate(outputs):
            addend = float(b[output])
            terms.append(addend)
            due = math.fsum(terms)
            # the exact sum is not rounded to fp64 before the difference is taken
            error = abs(math.fsum([*terms, -float(found[position, output])]))
            summed = numbers.gamma(n + 1) * math.fsum(map(abs, terms))
            worst = max(worst, error / (summed + numbers.u * (abs(due) + summed)))
    return worst


def _norm(dtype: torch.dtype, n: int) -> float:
    """Return the worst error of a 2-norm along either axis over gamma(n + 1) + u of it."""
    numbers = precision(dtype)
    x, _, _ = _operands("linear", dtype, n, positive=True)
    due = [math.sqrt(math.fsum(p * p for p in row)) for row in x.tolist()]
    found = [*torch.linalg.norm(x, dim=1).tolist(), *torch.linalg.norm(x.t().contiguous(), dim=0).tolist()]
    allowed = numbers.gamma(n + 1) + numbers.u
    return max(abs(p - q) / (allowed * q) for p, q in zip(found, due + due, strict=True))


def _exact(kernel: str, dtype: torch.dtype, n: int) -> bool:
    """Return whether integers whose absolute products sum to less than 2^24 come out as if added by hand."""
    run, rows, shape = KERNELS[kernel]
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(-1, 2, shape(n), generator=generator)
    w = torch.ones(_outputs(n), n, dtype=torch.int64)
    if kernel != "sum":
        w = torch.randint(-64, 65, (_outputs(n), n), generator=generator)
    due = rows(x) @ w.t()
    found = run(x.to(dtype), w.to(dtype), torch.zeros(_outputs(n), dtype=dtype))
    return torch.equal(found, due.to(dtype))


def _flushes(kernel: str, dtype: torch.dtype) -> bool:
    run, _, shape = KERNELS[kernel]
    tiny = precision(dtype).eta * 2
    x, w = torch.full(shape(64), tiny, dtype=dtype), torch.ones(1, 64, dtype=dtype)
    return not bool((run(x, w, torch.zeros(1, dtype=dtype)).double() == 64 * tiny).all())


def _elementwise(dtype: torch.dtype) -> float:
    numbers, generator = precision(dtype), torch.Generator().manual_seed(1)
    x, y = (torch.randn(64, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    worst = 0.0
    for operation in (operator.add, operator.sub, operator.mul, operator.truediv):
        due = [operation(Fraction(p), Fraction(q)) for p, q in zip(x.tolist(), y.tolist(), strict=True)]
        worst = max(worst, _one_rounding(numbers, operation(x, y), due))
    third = 1 / 3
    held = third if dtype == torch.float64 else float(torch.tensor(third, dtype=torch.float32))
    due = [Fraction(p) * Fraction(held) for p in x.tolist()]
    worst = max(worst, _one_rounding(numbers, x * third, due))
    roots = [_root(Fraction(p)) for p in x.abs().tolist()]
    worst = max(worst, _one_rounding(numbers, x.abs().sqrt(), roots) / 2)  # one unit in the last place is allowed
    if dtype != torch.float64:
        wide = torch.randn(64, generator=generator, dtype=torch.float32)
        cast = _one_rounding(numbers, wide.to(dtype), [Fraction(p) for p in wide.tolist()])
        due = [Fraction(p) + Fraction(q) for p, q in zip(x.tolist(), wide.tolist(), strict=True)]
        worst = max(worst, cast, _one_rounding(numbers, x.clone().add_(wide), due))
    return worst


def _one_rounding(numbers: Precision, found: Tensor, due: list[Fraction]) -> float:
    unit, pairs = Fraction(numbers.roundoff), zip(found.tolist(), due, strict=True)
    return float(max(abs(Fraction(p) - q) / (unit * abs(q)) if q else Fraction(p != 0) for p, q in pairs))


def _root(value: Fraction) -> Fraction:
    """Return the square root to 100 bits or more."""
    shift = 256
    return Fraction(math.isqrt(value.numerator * value.denominator << shift), value.denominator << shift // 2)


def _keeps_subnormals(dtype: torch.dtype) -> bool:
    """Return whether halving, subtracting and casting keep numbers below the smallest normal one."""
    tiny = torch.full((64,), torch.finfo(dtype).tiny, dtype=dtype)
    half = precision(dtype).eta * 2.0 ** (precision(dtype).bits - 2)
    halved, left, cast = tiny * 0.5, tiny * 1.5 - tiny, torch.full((64,), half, dtype=torch.float64).to(dtype)
    return all(bool((t.double() == half).all()) for t in (halved, left, cast))
