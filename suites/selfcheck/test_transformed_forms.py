"""The closed forms of transforms, random bases, banks, blocks and normalisation, written another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.banks import admixture
from peftcheck.oracle.normalization import layer_norm
from peftcheck.oracle.residual import orthonormal
from peftcheck.oracle.spectral import fft_error
from peftcheck.rounding import DTYPES, Arithmetic, Bounded, leaf, precision

torch.set_num_threads(1)
M = machine(torch.float64, torch.float64, False)
SINGLE = Arithmetic(precision(torch.float32))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def site(n_in: int, n_out: int, rank: int, alpha: float, options: dict | None = None, **tensors: Tensor) -> Site:
    named = {role.replace("_", "."): leaf(tensor) for role, tensor in tensors.items()}
    spec = LayerSpec("l", "linear", n_in, n_out)
    return Site(spec, AdapterSpec("a", (0,), rank, alpha, tuple(sorted((options or {}).items()))), named)


def weight_delta(method: str, one: Site) -> Tensor:
    return FORMULAS[method].delta(M, one)["weight"].value


@pytest.mark.parametrize("n", [1, 2, 7, 8, 12, 17, 23, 24, 64, 255, 512])
def test_a_transform_in_single_precision_stays_within_its_bound(n):
    numbers = precision(torch.float32)
    worst = 0.0
    for seed in range(20):
        x = drawn(n, seed=seed).float()
        exact = torch.fft.fft(x.double())
        error = torch.linalg.vector_norm(torch.fft.fft(x).to(torch.complex128) - exact)
        worst = max(worst, float(error / torch.linalg.vector_norm(exact)))
    assert worst <= fft_error(numbers, n)


def test_the_bound_of_a_transform_grows_with_the_sum_of_its_prime_factors():
    numbers = precision(torch.float64)
    assert fft_error(numbers, 1) == 0
    assert fft_error(numbers, 64) == pytest.approx(6 * math.sqrt(2) * numbers.gamma(10), rel=1e-12)
    assert fft_error(numbers, 23) > fft_error(numbers, 24)


def test_fourierft_is_the_real_part_of_the_inverse_transform():
    entries = torch.tensor([[0, 2, 4, 1], [3, 0, 6, 6]])
    c = drawn(4)
    spectrum = torch.zeros(5, 7, dtype=torch.float64)
    spectrum[entries[0], entries[1]] = c
    delta = weight_delta("fourierft", site(7, 5, 4, 3.0, spectrum=c, entries=entries))
    assert torch.allclose(delta, 3 * torch.fft.ifft2(spectrum).real, atol=1e-15)


def test_c3a_turns_the_kernel_of_each_block_by_one_place_a_row():
    kernel = drawn(2, 3, 4)
    delta = weight_delta("c3a", site(12, 8, 4, 1.0, kernel=kernel))
    for m in range(2):
        for n in range(3):
            for row in range(4):
                block = delta[4 * m + row, 4 * n : 4 * n + 4]
                assert torch.allclose(block, kernel[m, n].roll(row) / 12, atol=1e-7)


@pytest.mark.parametrize("wavelet", ["db1", "db2"])
@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (1, 4)])
def test_waveft_is_linear_and_keeps_the_energy_of_what_no_border_cuts(wavelet, shape):
    rows, columns = shape
    middle = torch.tensor([[rows // 4], [columns // 4]])
    one = site(columns, rows, 1, 1.0, {"wavelet": wavelet}, spectrum=torch.ones(1), entries=middle)
    delta = weight_delta("waveft", one)
    assert delta.shape == shape
    energy = float(torch.linalg.vector_norm(delta))
    assert 0 < energy <= 1 + 1e-12
    if wavelet == "db1":
        assert {round(float(v), 12) for v in delta.abs().flatten()} <= {0.0, 0.5}
        if rows % 2 == 0 and columns % 2 == 0:
            assert energy == pytest.approx(1.0)


def test_randlora_sums_its_bases_whichever_side_is_the_wider():
    r, bases, small, large = 2, 3, 5, 8
    a, b, lam, gamma = drawn(r, 1, small), drawn(large, bases, r), drawn(r, bases), drawn(bases, small)
    columns = b.flatten(1)
    expected = sum(
        torch.outer(columns[:, k * bases + n], lam[k, n] * a[k, 0] * gamma[n]) for k in range(r) for n in range(bases)
    )
    tall = weight_delta("randlora", site(small, large, r, 3.0, A=a, B=b, **{"lambda": lam, "gamma": gamma}))
    wide = weight_delta("randlora", site(large, small, r, 3.0, A=a, B=b, **{"lambda": lam, "gamma": gamma}))
    assert torch.allclose(tall, 1.5 * expected)
    assert torch.allclose(wide, 1.5 * expected.T)


def test_gralora_puts_each_block_where_its_factors_meet():
    k, r, n_in, n_out = 2, 4, 6, 8
    a, b = drawn(k, n_in // k, r), drawn(k, r, n_out // k)
    delta = weight_delta("gralora", site(n_in, n_out, r, 4.0, {"hybrid": 0}, A=a, B=b))
    for i in range(k):  # the block of inputs
        for j in range(k):  # the block of outputs
            block = (a[i][:, 2 * j : 2 * j + 2] @ b[j][2 * i : 2 * i + 2]).T
            assert torch.allclose(delta[4 * j : 4 * j + 4, 3 * i : 3 * i + 3], block)


def test_an_admixture_covers_every_choice_among_tied_logits():
    logits, bank = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]], dtype=torch.float64), drawn(5, 3)
    form = admixture(SINGLE, Bounded(logits), Bounded(bank), 2)
    weights = torch.softmax(torch.tensor([2.0, 1.0], dtype=torch.float64), 0)
    for other in (1, 2, 3):
        choice = weights[0] * bank[0] + weights[1] * bank[other]
        assert bool(((choice - form.value[0]).abs() <= form.bound[0]).all())
    wrong = weights[0] * bank[0] + weights[1] * bank[4]
    assert not bool(((wrong - form.value[0]).abs() <= form.bound[0]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm_stays_within_its_bound_also_far_from_zero(dtype, offset):
    kind = DTYPES[dtype]
    worst = 0.0
    for seed in range(30):
        n = 2 + seed
        x = (drawn(4, n, seed=seed) + offset).to(kind)
        weight, bias = drawn(n, seed=1).to(kind), drawn(n, seed=2).to(kind)
        form = layer_norm(Arithmetic(precision(kind)), leaf(weight), leaf(bias), leaf(x))
        found = F.layer_norm(x, (n,), weight, bias)
        exact = F.layer_norm(x.double(), (n,), weight.double(), bias.double())
        assert torch.allclose(form.value, exact, rtol=1e-9, atol=1e-9)
        worst = max(worst, float(((found.double() - form.value).abs() / form.bound).max()))
    assert worst <= 1
    assert worst >= (0.25 if offset == 0 and dtype in ("bfloat16", "float16") else 0.0)


@pytest.mark.parametrize("shape", [(2, 1), (5, 5), (24, 3), (24, 17)])
def test_an_orthonormal_basis_in_single_precision_stays_within_its_bound(shape):
    for seed in range(10):
        p = drawn(*shape, seed=seed).float()
        form = orthonormal(SINGLE, leaf(p))
        assert bool(torch.isfinite(form.bound).all())
        assert bool(((torch.linalg.qr(p)[0].double() - form.value).abs() <= form.bound).all())
