"""The running error bounds from both sides: no correct computation exceeds them, the worst ones come near."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rational import convolution, exact, ratio, root
from torch import Tensor
from torch.nn import functional as F

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.errors import HarnessError
from peftcheck.oracle.form import Site, machine
from peftcheck.oracle.layers import layer_output
from peftcheck.oracle.lowrank import LORA
from peftcheck.rounding import DTYPES, Arithmetic, Bounded, judged, leaf, precision, quantum_of

torch.set_num_threads(1)
dtypes = st.sampled_from(sorted(DTYPES))
seeds = st.integers(0, 2**20)
CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


def arithmetic(dtype: str) -> Arithmetic:
    return Arithmetic(precision(DTYPES[dtype]))


STYLES = ("normal", "graded", "tiny", "whole", "tied", "positive")


def values(seed: int, role: str, style: str, dtype: str, *shape: int) -> Tensor:
    """Return stored values: of one size, of all sizes, near underflow, integers, near ties, of one sign."""
    generator = torch.Generator().manual_seed(seed * 31 + sum(map(ord, role)))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    numbers = precision(DTYPES[dtype])
    if style == "graded":
        span = 2 if dtype == "float16" else 8
        x = x * 10.0 ** (span * (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1))
    elif style == "tiny":  # products underflow: the square root of the smallest subnormal, and less
        x = x * math.sqrt(numbers.accumulator.eta) * 4
    elif style == "whole":
        x = torch.round(4 * x)
    elif style == "tied":  # odd multiples of u next to 1: sums and products lie half-way between two numbers
        x = x.sign() * (1 + 2 * numbers.u * torch.randint(0, 4, shape, generator=generator).double())
    elif style == "positive":
        x = x.abs() + 0.5
    return x.to(DTYPES[dtype])


def assert_bounded(found: Tensor, due: np.ndarray, form: Bounded) -> float:
    """The stored result is within the bound of the exact one, and within the budget of the fp64 one."""
    assert found.shape == form.value.shape
    worst = ratio(found, due, form.bound)
    assert worst <= 1
    budget = judged(form, machine=precision(found.dtype))
    residual = (found.double() - form.value).abs()
    assert bool(((residual <= budget) | budget.isinf()).all())
    return worst


# one operation


ELEMENTWISE = {
    "add": (torch.add, lambda a, x, y: a.add(x, y), lambda p, q: p + q),
    "sub": (torch.sub, lambda a, x, y: a.sub(x, y), lambda p, q: p - q),
    "mul": (torch.mul, lambda a, x, y: a.mul(x, y), lambda p, q: p * q),
}


@pytest.mark.parametrize("operation", sorted(ELEMENTWISE))
@settings(deadline=None, max_examples=40)
@given(seed=seeds, dtype=dtypes, styles=st.tuples(st.sampled_from(STYLES), st.sampled_from(STYLES)))
def test_elementwise_operations_stay_within_their_bounds(operation, seed, dtype, styles):
    run, bounded, by_hand = ELEMENTWISE[operation]
    x, y = values(seed, "x", styles[0], dtype, 5, 7), values(seed, "y", styles[1], dtype, 1, 7)
    form = bounded(arithmetic(dtype), leaf(x, exact=seed % 2 == 0), leaf(y, exact=seed % 2 == 0))
    assert_bounded(run(x, y), by_hand(exact(x), exact(y)), form)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, dtype=dtypes, style=st.sampled_from(["normal", "graded", "tied", "positive"]))
def test_division_stays_within_its_bound(seed, dtype, style):
    x, y = values(seed, "x", "normal", dtype, 40), values(seed, "y", style, dtype, 40)
    y = torch.where(y == 0, torch.ones_like(y), y)
    assert_bounded(x / y, exact(x) / exact(y), arithmetic(dtype).div(leaf(x), leaf(y)))


FACTORS = (1 / 3, 0.1, 3.7, 2.0, 16 / 17, -0.5, 1.0)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, dtype=dtypes, style=st.sampled_from(STYLES), factor=st.sampled_from(FACTORS))
def test_scaling_by_a_python_number_stays_within_its_bound(seed, dtype, style, factor):
    x = values(seed, "x", style, dtype, 40)
    for measured in (True, False):  # also where the operand is an exact one and the factor is not
        form = arithmetic(dtype).scale(leaf(x, exact=measured), factor)
        assert_bounded(x * factor, exact(x) * Fraction(factor), form)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, source=dtypes, target=dtypes, style=st.sampled_from(STYLES))
def test_casting_stays_within_its_bound(seed, source, target, style):
    x = values(seed, "x", style, source, 40)
    assert_bounded(x.to(DTYPES[target]), exact(x), arithmetic(target).rounded(leaf(x, exact=True)))


@settings(deadline=None, max_examples=30)
@given(seed=seeds, dtype=dtypes, style=st.sampled_from(STYLES), n=st.sampled_from([0, 1, 2, 7, 64, 513]))
def test_sums_and_norms_stay_within_their_bounds(seed, dtype, style, n):
    a, x = arithmetic(dtype), values(seed, "x", style, dtype, 3, n)
    due = np.array([[sum(row, Fraction(0))] for row in exact(x)], dtype=object)
    assert_bounded(x.sum(1, keepdim=True), due, a.sum(leaf(x), 1))
    assert_bounded(x.sum(1, keepdim=True), due, a.sum(leaf(x, exact=True), 1))
    if n:
        due = np.array([[root(sum((p * p for p in row), Fraction(0)))] for row in exact(x)], dtype=object)
        wide = x.to(a.store.accumulator.dtype)
        for found in (torch.linalg.norm(x, dim=1, keepdim=True), (wide * wide).sum(1, keepdim=True).sqrt().to(x.dtype)):
            assert_bounded(found, due, a.norm(leaf(x), 1))


@settings(deadline=None, max_examples=20)
@given(seed=seeds, dtype=dtypes, style=st.sampled_from(["normal", "graded", "tied"]))
def test_roots_and_functions_stay_within_their_bounds(seed, dtype, style):
    a, x = arithmetic(dtype), values(seed, "x", style, dtype, 30).abs()
    due = np.array([root(value) for value in exact(x)], dtype=object)
    assert_bounded(x.sqrt(), due, a.sqrt(leaf(x)))
    form = a.apply(leaf(x), torch.tanh, slope=1.0)
    assert bool(((x.tanh().double() - form.value).abs() <= judged(form, machine=a.store)).all())


# sums of products


SHAPES = st.tuples(st.sampled_from([1, 3]), st.sampled_from([0, 1, 2, 9, 40]), st.sampled_from([1, 4]))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, dtype=dtypes, styles=st.tuples(st.sampled_from(STYLES), st.sampled_from(STYLES)), shape=SHAPES)
def test_matrix_products_stay_within_their_bounds_in_every_order(seed, dtype, styles, shape):
    m, k, n = shape
    x, y = values(seed, "x", styles[0], dtype, m, k), values(seed, "y", styles[1], dtype, k, n)
    due = exact(x) @ exact(y) if k else np.full((m, n), Fraction(0), dtype=object)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    for measured in (True, False):
        form = arithmetic(dtype).matmul(leaf(x, exact=measured), leaf(y, exact=measured))
        assert_bounded(x @ y, due, form)
        assert_bounded(x[:, order] @ y[order], due, form)
        assert_bounded(torch.einsum("mk,kn->mn", x, y), due, form)
        assert_bounded(torch.stack([torch.mv(y.t(), row) for row in x]), due, form)
        assert_bounded(F.linear(x, y.t().contiguous()), due, form)


def layer(seed: int, kind: str, bias: bool) -> tuple[LayerSpec, tuple[int, ...]]:
    """Return a spec and the shape of its input."""
    pick = np.random.default_rng(seed)
    if kind == "linear":
        n_in = int(pick.choice([1, 3, 16, 80]))
        return LayerSpec("l", kind, n_in, 3, bias), ((), (2,), (2, 1, 2))[seed % 3] + (n_in,)
    dims = int(kind[4])
    groups = int(pick.choice([1, 1, 2]))
    per = tuple(tuple(int(pick.integers(1, most)) for _ in range(dims)) for most in (4, 3, 3))
    kernel, stride, dilation = per
    padding = tuple(int(pick.integers(0, 2)) for _ in range(dims))
    size = tuple((k - 1) * d + 1 + int(pick.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True))
    n_in = groups * int(pick.integers(1, 4))
    spec = LayerSpec("c", kind, n_in, 2 * groups, bias, kernel, stride, padding, dilation, groups, size=size)
    return spec, (1 + seed % 2, n_in, *size)


def run_layer(spec: LayerSpec, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if spec.kind == "linear":
        return F.linear(x, w, b)
    return CONVOLVE[len(spec.kernel) - 1](x, w, b, spec.stride, spec.padding, spec.dilation, spec.groups)


def layer_by_hand(spec: LayerSpec, x: Tensor, w: Tensor, b: Tensor | None) -> np.ndarray:
    if spec.kind == "linear":
        y = exact(x) @ exact(w).T
        return y if b is None else y + exact(b)
    y = convolution(exact(x), exact(w), spec.stride, spec.dilation, spec.padding, spec.groups)
    return y if b is None else y + exact(b).reshape(-1, *(1,) * len(spec.kernel))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
@settings(deadline=None, max_examples=25)
@given(
    seed=seeds,
    dtype=dtypes,
    bias=st.sampled_from([None, "normal", "graded", "tied"]),
    styles=st.tuples(st.sampled_from(STYLES), st.sampled_from(STYLES)),
)
def test_layers_stay_within_their_bounds(kind, seed, dtype, bias, styles):
    spec, shape = layer(seed, kind, bias is not None)
    x, w = values(seed, "x", styles[0], dtype, *shape), values(seed, "w", styles[1], dtype, *spec.weight_shape)
    b = None if bias is None else values(seed, "b", bias, dtype, spec.n_out)
    due = layer_by_hand(spec, x, w, b)
    for measured in (True, False):
        base = {"weight": leaf(w, exact=measured)} | ({} if b is None else {"bias": leaf(b, exact=measured)})
        form = layer_output(arithmetic(dtype), spec, base, leaf(x, exact=measured))
        assert_bounded(run_layer(spec, x, w, b), due, form)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_a_kernel_that_starts_from_the_bias_stays_within_the_bound(dims, dtype):
    """512 products, each too small to move a sum that has reached the bias, are all lost if the bias comes first."""
    numbers = precision(DTYPES[dtype])
    kernel = (2,) * dims
    x = torch.full((2, 512 // 2**dims, *kernel), 0.99 * numbers.u / 2, dtype=DTYPES[dtype])
    w, b = torch.ones(3, *x.shape[1:], dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    spec = LayerSpec("c", f"conv{dims}d", x.shape[1], 3, True, kernel, (1,) * dims, (0,) * dims, (1,) * dims)
    spec = spec if dims else LayerSpec("l", "linear", 512, 3, True)
    form = layer_output(arithmetic(dtype), spec, {"weight": leaf(w), "bias": leaf(b)}, leaf(x))
    assert_bounded(run_layer(spec, x, w, b), layer_by_hand(spec, x, w, b), form)
    first = b[0].clone()
    for product in (x[0] * w[0]).reshape(-1):
        first = first + product
    assert first == 1
    due = layer_by_hand(spec, x, w, b)[(0, 0, *(0,) * dims)]
    assert 1 >= ratio(first.reshape(1), np.array([due]), form.bound.reshape(-1)[:1]) >= 0.25


def test_an_embedding_rounds_nothing_and_a_scaled_one_once():
    table, ids = values(1, "t", "normal", "bfloat16", 6, 4), torch.tensor([[5, 0], [2, 2]])
    spec = LayerSpec("e", "embedding", 6, 4)
    form = layer_output(arithmetic("bfloat16"), spec, {"weight": leaf(table)}, leaf(ids))
    assert form.error is None and torch.equal(form.value, F.embedding(ids, table).double())
    spec = LayerSpec("e", "embedding.scaled", 6, 4, scale=3.7)
    form = layer_output(arithmetic("bfloat16"), spec, {"weight": leaf(table)}, leaf(ids))
    factor = torch.tensor(3.7).to(torch.bfloat16)
    assert_bounded(F.embedding(ids, table) * factor, exact(table)[ids.numpy()] * Fraction(float(factor)), form)


# LoRA in several associations


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    dtype=dtypes,
    wide=st.booleans(),
    rank=st.sampled_from([1, 2, 5, 17]),
    alpha=st.sampled_from([1.0, 3.0, 16.0]),
    styles=st.tuples(*[st.sampled_from(STYLES)] * 4),
    cancel=st.booleans(),
)
def test_lora_stays_within_its_bounds_in_every_association(seed, dtype, wide, rank, alpha, styles, cancel):
    """The delta, the merge and the forward, computed in storage precision or in fp32 and rounded at the end."""
    store = DTYPES[dtype]
    own = "float32" if wide and dtype in ("bfloat16", "float16") else dtype
    spec, adapter = LayerSpec("l", "linear", 6, 4, True), AdapterSpec("a", (0,), rank, alpha)
    a, b = values(seed, "a", styles[0], own, rank, 6), values(seed, "b", styles[1], own, 4, rank)
    x, bias = values(seed, "x", styles[2], dtype, 3, 6), values(seed, "bias", "normal", dtype, 4)
    s = alpha / rank
    due = exact(b) @ exact(a) * Fraction(s)
    w = values(seed, "w", styles[3], dtype, 4, 6)
    if cancel:
        w = (-(b.double() @ a.double() * s)).clamp(-6e4, 6e4).to(store)
    for measured in (True, False):
        m = machine(store, DTYPES[own], measured)
        site = Site(spec, adapter, {"A": leaf(a, measured), "B": leaf(b, measured)})
        base = {"weight": leaf(w, measured), "bias": leaf(bias, measured)}
        stored = (b @ a) * s
        in_fp32 = ((b.float() @ a.float()) * s).to(a.dtype) if own in ("bfloat16", "float16") else stored
        change = LORA.delta(m, site)["weight"]
        merged = LORA.merge(m, site, base)["weight"]
        for delta in (stored, in_fp32, (b.to(a.dtype) @ a).mul_(s)):
            assert_bounded(delta, due, change)
            assert_bounded(w.clone().add_(delta), exact(w) + due, merged)
            assert_bounded(w + delta.to(store), exact(w) + due, merged)
        y = exact(x) @ (exact(w) + due).T + exact(bias)
        form = LORA.forward(m, [site], base, leaf(x, measured))
        path = (x.to(a.dtype) @ a.t() @ b.t()) * s
        assert_bounded((F.linear(x, w, bias) + path).to(store), y, form)
        assert_bounded((torch.addmm(bias, x, w.t()) + F.linear(F.linear(x.to(a.dtype), a), b) * s).to(store), y, form)


# the worst cases come near


def worst_rounding(dtype: str, operation) -> float:
    """Return the largest part of its bound that an operation uses over values next to 1 and odd ones."""
    worst = 0.0
    for seed in range(30):
        x, y = values(seed, "x", "tied", dtype, 60), values(seed, "y", "normal", dtype, 60)
        found, due, form = operation(arithmetic(dtype), x, y)
        worst = max(worst, assert_bounded(found, due, form))
    return worst


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_one_rounding_uses_most_of_its_bound(dtype):
    factor = 0.7 if dtype == "float64" else float(torch.tensor(0.7, dtype=torch.float32))
    near = {
        "add": lambda a, x, y: (x + y, exact(x) + exact(y), a.add(leaf(x), leaf(y))),
        "mul": lambda a, x, y: (x * y, exact(x) * exact(y), a.mul(leaf(x), leaf(y))),
        "div": lambda a, x, y: (x / y, exact(x) / exact(y), a.div(leaf(x), leaf(y))),
        "scale": lambda a, x, y: (y * factor, exact(y) * Fraction(factor), a.scale(leaf(y), factor)),
    }
    for name, operation in near.items():
        assert worst_rounding(dtype, operation) >= 0.8, name


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("n", [2, 16, 512])
def test_a_sum_in_the_worst_order_uses_a_quarter_of_its_bound(n, dtype):
    """One, then n - 1 products that are each lost against it: gamma(n) is needed, up to a factor of two."""
    numbers = precision(DTYPES[dtype])
    kept = numbers.accumulator.dtype
    size = 0.98 * numbers.a / 2
    x, w = torch.full((n,), size, dtype=kept), torch.ones(n, dtype=kept)
    x[0] = 1
    total = torch.zeros((), dtype=kept)
    for product in x * w:
        total = total + product
    assert total == 1
    form = Arithmetic(numbers.accumulator).matmul(leaf(x[None]), leaf(w[:, None]))
    due = np.array([[sum(exact(x * w), Fraction(0))]], dtype=object)
    assert 1 >= ratio(total.reshape(1, 1), due, form.bound) >= (0.25 if n > 2 else 0.1)
    norm = Arithmetic(numbers.accumulator).norm(leaf(x.sqrt()[None]), 1)
    due = np.array([[root(sum((p * p for p in exact(x.sqrt())), Fraction(0)))]], dtype=object)
    squares = x.sqrt() * x.sqrt()
    total = torch.zeros((), dtype=kept)
    for square in squares:
        total = total + square
    assert 1 >= ratio(total.sqrt().reshape(1, 1), due, norm.bound) >= (0.25 if n > 16 else 0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_products_use_a_quarter_of_their_bounds(dtype):
    worst = {"matmul": 0.0, "conv2d": 0.0, "lora": 0.0}
    for seed in range(20):
        x, w = values(seed, "x", "positive", dtype, 3, 80), values(seed, "w", "positive", dtype, 4, 80)
        form = arithmetic(dtype).matmul(leaf(x), leaf(w.t()))
        worst["matmul"] = max(worst["matmul"], assert_bounded(x @ w.t(), exact(x) @ exact(w).T, form))
        spec, shape = layer(seed, "conv2d", True)
        x, w = values(seed, "x", "normal", dtype, *shape), values(seed, "w", "normal", dtype, *spec.weight_shape)
        b = values(seed, "b", "normal", dtype, spec.n_out)
        form = layer_output(arithmetic(dtype), spec, {"weight": leaf(w), "bias": leaf(b)}, leaf(x))
        due = layer_by_hand(spec, x, w, b)
        worst["conv2d"] = max(worst["conv2d"], assert_bounded(run_layer(spec, x, w, b), due, form))
        a, b = values(seed, "a", "normal", dtype, 3, 6), values(seed, "b", "normal", dtype, 5, 3)
        site = Site(LayerSpec("l", "linear", 6, 5), AdapterSpec("a", (0,), 3, 5.0), {"A": leaf(a), "B": leaf(b)})
        change = LORA.delta(machine(DTYPES[dtype], DTYPES[dtype], False), site)["weight"]
        due = exact(b) @ exact(a) * Fraction(5 / 3)
        worst["lora"] = max(worst["lora"], assert_bounded((b @ a) * (5 / 3), due, change))
    assert min(worst.values()) >= 0.25, worst


# the exact regime


@settings(deadline=None, max_examples=80)
@given(
    seed=seeds,
    dtype=dtypes,
    k=st.sampled_from([1, 4, 30, 200]),
    most=st.sampled_from([1, 3, 20]),
    cut=st.sampled_from([1.0, 0.5, 2.0**-9]),
)
def test_what_is_called_exact_is_exact_in_every_order(seed, dtype, k, most, cut):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-most, most + 1, (2, k), generator=generator).double() * cut
    w = torch.randint(-most, most + 1, (k, 3), generator=generator).double()
    b = torch.randint(-most, most + 1, (3,), generator=generator).double() * 0.25
    a, store = arithmetic(dtype), DTYPES[dtype]
    if not all(torch.equal(t.to(store).double(), t) for t in (x, w, b)):
        return
    form = a.join(a.matmul(leaf(x, True), leaf(w, True)), leaf(b, True))
    due = exact(x) @ exact(w) + exact(b)
    x, w, b = x.to(store), w.to(store), b.to(store)
    order = torch.randperm(k, generator=generator)
    for found in (x @ w + b, x[:, order] @ w[order] + b, F.linear(x, w.t().contiguous(), b)):
        assert_bounded(found, due, form)
    if form.error is None:
        first = b.expand(2, 3)
        for step in order.tolist():  # even kept in storage precision
            first = first + x[:, step, None] * w[None, step]
        assert np.array_equal(exact(first), due)
        assert bool((judged(form, machine=a.store) == 0).all())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_exact_regime_ends_where_the_significand_does(dtype):
    a, bits = arithmetic(dtype), precision(DTYPES[dtype]).bits

    def number(*values: float) -> Bounded:
        return leaf(torch.tensor(values, dtype=torch.float64), exact=True)

    one, tiny = number(1.0), number(precision(DTYPES[dtype]).eta)
    assert a.add(one, number(2.0**bits - 2)).error is None
    assert a.sum(number(2.0**bits - 2, -1.0), 0).error is None
    assert a.sum(number(2.0**bits - 1, -2.0), 0).error is not None  # not every order of a longer sum would do
    assert a.add(one, number(2.0**bits)).error is not None
    assert a.sum(number(1.0, *[2.0**bits] * 3), 0).error is not None
    assert a.mul(number(3.0), number(2.0**bits - 1)).error is not None
    assert a.mul(tiny, one).error is None
    assert a.mul(tiny, number(0.5)).error is not None  # below the smallest subnormal


def test_an_addend_that_is_too_fine_for_the_partial_sums_ends_the_exact_regime():
    """y = 2^20 - 2^20 is exact, y + 1/16 too; but a kernel that starts from 1/16 meets 2^20 + 1/16 on its way."""
    a = arithmetic("float32")
    x = torch.tensor([[2.0**10, -(2.0**10)]])
    y = a.matmul(leaf(x, True), leaf(x.abs().t(), True))
    b = leaf(torch.tensor([2.0**-6]), True)
    assert y.error is None and a.add(y, b).error is None
    assert a.join(y, b).error is not None
    assert a.join(y, leaf(torch.tensor([1.0]), True)).error is None


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_the_quantum_divides_every_value_and_its_double_does_not(numbers):
    quantum = Fraction(quantum_of(torch.tensor(numbers, dtype=torch.float64)))
    multiples = [Fraction(number) / quantum for number in numbers]
    assert all(multiple.denominator == 1 for multiple in multiples)
    assert not any(multiples) or any(multiple.numerator % 2 for multiple in multiples)


# the edges


def test_a_bound_is_infinite_where_a_result_may_overflow_or_a_divisor_vanish():
    a = arithmetic("float16")
    big = leaf(torch.tensor([6e4, 1.0]))
    assert a.add(big, big).bound.isinf().tolist() == [True, False]
    assert a.matmul(big.map(lambda t: t[None]), big.map(lambda t: t[:, None])).bound.isinf().all()
    unsure = Bounded(torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64))
    zero = leaf(torch.zeros(3))
    assert a.div(zero, unsure).bound.isinf().tolist() == [True, True, False]
    assert arithmetic("float32").norm(leaf(torch.tensor([1e30])), 0).bound.isinf().all()


def test_what_comes_after_an_overflow_is_never_called_sound():
    a = arithmetic("float16")
    lost = a.add(leaf(torch.tensor([6e4])), leaf(torch.tensor([6e4])))
    zero = leaf(torch.zeros(1))
    product = a.matmul(lost.map(lambda t: t[None]), leaf(torch.zeros(1, 1)))
    for after in (a.sub(lost, lost), a.mul(lost, zero), product):
        assert not bool((after.ceiling() <= precision(torch.float16).largest).all())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_empty_tensors_round_nothing(dtype):
    a, empty = arithmetic(dtype), leaf(torch.zeros(0, 3), exact=True)
    wide, flat = leaf(torch.zeros(3, 2), True), leaf(torch.zeros(0, 2), True)
    products = a.matmul(empty, wide), a.matmul(empty.map(torch.t), flat)
    others = a.add(empty, empty), a.scale(empty, 1 / 3), a.div(empty, empty), a.norm(empty, 1), a.rounded(empty)
    assert products[1].error is None
    for form in (*products, *others):
        assert form.bound.shape == form.value.shape and not bool(form.bound.isnan().any())


def test_gamma_refuses_what_it_cannot_bound():
    with pytest.raises(HarnessError, match="gamma"):
        precision(torch.float32).gamma(2**23)
    assert precision(torch.bfloat16).gamma(4096) < 2**-11  # of the accumulator, never of bf16 itself


def test_the_formats_are_those_of_torch():
    for dtype in DTYPES.values():
        numbers, info = precision(dtype), torch.finfo(dtype)
        assert info.eps == 2 * numbers.u and numbers.largest == info.max
        assert torch.tensor(numbers.eta, dtype=torch.float64).to(dtype) == numbers.eta
        assert torch.tensor(numbers.eta, dtype=dtype) / 2 == 0
        twice = (1 + Fraction(numbers.u)) * (1 + Fraction(numbers.a)) - 1
        assert Fraction(numbers.roundoff) == (numbers.u if numbers.u == numbers.a else twice)
