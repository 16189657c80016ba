"""The closed forms of LoHa, LoKr, VeRA, AdaLoRA and BEFT against the same formulas written another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.products import unfolded
from peftcheck.rounding import DTYPES, Arithmetic, leaf, precision

torch.set_num_threads(1)
M = machine(torch.float64, torch.float64, False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def site(spec: LayerSpec, rank: int, alpha: float, **tensors: Tensor) -> Site:
    named = {role.replace("_", "."): leaf(tensor) for role, tensor in tensors.items()}
    return Site(spec, AdapterSpec("a", (0,), rank, alpha), named)


def convolution(n_in: int, n_out: int, *kernel: int, groups: int = 1) -> LayerSpec:
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    return LayerSpec("c", f"conv{len(kernel)}d", n_in, n_out, False, kernel, ones, zeros, ones, groups, size=kernel)


def weight_delta(method: str, one: Site) -> Tensor:
    return FORMULAS[method].delta(M, one)["weight"].value


@pytest.mark.parametrize("kernel", [(3,), (3, 2)])
def test_lokr_is_a_kronecker_product_at_every_position_of_the_kernel(kernel):
    c, d = drawn(2, 3), drawn(3, 2, *kernel)
    spec = convolution(6, 6, *kernel)
    delta = weight_delta("lokr", site(spec, 4, 8.0, w1=c, w2=d)).reshape(6, 6, -1)
    for position in range(delta.shape[-1]):
        assert torch.allclose(delta[..., position], 2 * torch.kron(c, d.reshape(3, 2, -1)[..., position]))


def test_lokr_unfolds_a_matrix_over_the_inputs_of_the_kernel():
    c, a, b = drawn(2, 3), drawn(3, 4), drawn(4, 2 * 5)
    delta = weight_delta("lokr", site(convolution(6, 6, 5), 4, 4.0, w1=c, w2_a=a, w2_b=b))
    full = weight_delta("lokr", site(convolution(6, 6, 5), 4, 4.0, w1=c, w2=(a @ b).reshape(3, 2, 5)))
    assert torch.allclose(delta, full)


def test_loha_of_a_kernel_is_the_product_of_two_tucker_products():
    tensors = {
        f"{part}{index}{side}": drawn(*shape, seed=index)
        for index in (1, 2)
        for part, side, shape in (("t", "", (2, 2, 3, 1)), ("w", "_a", (2, 4)), ("w", "_b", (2, 5)))
    }
    delta = weight_delta("loha", site(convolution(5, 4, 3, 1), 2, 3.0, **tensors))
    first, second = (
        torch.einsum("ijkl,ip,jq->pqkl", tensors[f"t{k}"], tensors[f"w{k}_a"], tensors[f"w{k}_b"]) for k in (1, 2)
    )
    assert torch.allclose(delta, 1.5 * first * second)


@pytest.mark.parametrize("order", ["ijk,jq,ip->pqk", "ijk,ip,jq->pqk"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_either_order_of_contraction_stays_within_the_bound(order, dtype):
    core, a, b = (t.to(DTYPES[dtype]) for t in (drawn(5, 5, 3), drawn(5, 4), drawn(5, 6)))
    form = unfolded(Arithmetic(precision(DTYPES[dtype])), leaf(core), leaf(a), leaf(b))
    factors = (b, a) if order.startswith("ijk,j") else (a, b)
    found = torch.einsum(order, core, *factors)
    assert bool(((found.double() - form.value).abs() <= 2 * form.bound).all())
    assert float(form.bound.max()) < 200 * precision(DTYPES[dtype]).u


def test_vera_cuts_its_layer_and_rank_out_of_the_shared_projections():
    spec, shared_a, shared_b = LayerSpec("l", "linear", 3, 4), drawn(5, 7), drawn(6, 5)
    d, b = drawn(2), drawn(4)
    delta = weight_delta("vera", site(spec, 2, 1.0, A=shared_a, B=shared_b, d=d, b=b))
    assert torch.allclose(delta, torch.diag(b) @ shared_b[:4, :2] @ torch.diag(d) @ shared_a[:2, :3])
    assert torch.linalg.matrix_rank(delta) == 2


def test_adalora_scales_by_the_ranks_that_its_tensor_counts():
    spec, p, e, q = LayerSpec("l", "linear", 3, 4), drawn(4, 2), drawn(2, 1), drawn(2, 3)
    delta = weight_delta("adalora", site(spec, 2, 6.0, P=p, E=e, Q=q, ranknum=torch.tensor([5.0]).double()))
    assert torch.allclose(delta, 6 / (5 + 1e-5) * p @ torch.diag(e[:, 0]) @ q, rtol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_bias_method_moves_nothing_but_the_bias(count):
    spec, formula = LayerSpec("l", "linear", 3, 4, bias=True), FORMULAS["bias"]
    own = [site(spec, 1, 1.0, bias=drawn(1, 4, seed=k)) for k in range(count)]
    base, x = {"weight": leaf(drawn(4, 3)), "bias": leaf(drawn(4))}, drawn(2, 3)
    total = base["bias"].value + sum(one.tensors["bias"].value[0] for one in own)
    assert torch.allclose(formula.forward(M, own, base, leaf(x)).value, x @ base["weight"].value.t() + total)
    assert set(formula.merge(M, own[0], base)) == {"bias"}


def test_sums_of_subnormal_bf16_products_stay_within_the_bound_where_they_are_flushed():
    x, w = (2.0**-63 * drawn(8, 17)).bfloat16(), (2.0**-64 * drawn(6, 17)).bfloat16()
    form = Arithmetic(precision(torch.bfloat16)).matmul(leaf(x), leaf(w.t()))
    assert bool(((x @ w.t()).double() - form.value).abs().le(form.bound).all())
    tiny = torch.full((4, 8), 2.0**-130).bfloat16()
    form = Arithmetic(precision(torch.bfloat16)).matmul(leaf(tiny), leaf(torch.ones(8, 4)))
    assert bool(((tiny @ torch.ones(8, 4).bfloat16()).double() - form.value).abs().le(form.bound).all())
    assert float(form.bound.max()) < 2.0**-115
