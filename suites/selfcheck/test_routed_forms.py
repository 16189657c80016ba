"""The closed forms of AdaMSS, Lily and Poly against the same formulas written another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.routed import TASKS, softmax
from peftcheck.rounding import Arithmetic, Bounded, leaf, precision

torch.set_num_threads(1)
M = machine(torch.float64, torch.float64, False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def site(spec: LayerSpec, rank: int, alpha: float, tensors: dict[str, Tensor]) -> Site:
    return Site(spec, AdapterSpec("a", (0,), rank, alpha), {role: leaf(tensor) for role, tensor in tensors.items()})


def output(method: str, one: Site, base: dict[str, Tensor], x: Tensor) -> Tensor:
    return FORMULAS[method].forward(M, [one], {name: leaf(t) for name, t in base.items()}, leaf(x)).value


@pytest.mark.parametrize("bias", [False, True])
def test_adamss_changes_each_row_by_its_own_subspace(bias):
    spec = LayerSpec("l", "linear", 3, 4, bias)
    rows, basis = torch.tensor([2, 0, 3, 1]), drawn(2, 3 + bias)
    factors = {"A.0": drawn(1, 2), "B.0": drawn(1, 1), "A.1": drawn(2, 2), "B.1": drawn(3, 2)}
    one = site(spec, 2, 1.0, {**factors, "basis": basis, "rows": rows})
    full = torch.zeros(4, 3 + bias, dtype=torch.float64)
    full[2] = (factors["B.0"] @ factors["A.0"] @ basis)[0]
    for place, row in enumerate((0, 3, 1)):
        full[row] = (factors["B.1"] @ factors["A.1"] @ basis)[place]
    change = FORMULAS["adamss"].delta(M, one)
    assert torch.allclose(change["weight"].value, full[:, :3])
    assert ("bias" in change) == bias and (not bias or torch.allclose(change["bias"].value, full[:, 3]))
    base, x = {"weight": drawn(4, 3, seed=7)} | ({"bias": drawn(4)} if bias else {}), drawn(2, 5, 3)
    merged = {name: tensor + change[name].value for name, tensor in base.items()}
    expected = torch.nn.functional.linear(x, merged["weight"], merged.get("bias"))
    assert torch.allclose(output("adamss", one, base, x), expected)


def test_adamss_vouches_for_nothing_where_its_factors_do_not_fit():
    tensors = {"A.0": drawn(1, 1), "B.0": drawn(4, 2), "basis": drawn(1, 3), "rows": torch.arange(4)}
    one = site(LayerSpec("l", "linear", 3, 4), 1, 1.0, tensors)
    assert torch.isinf(FORMULAS["adamss"].delta(M, one)["weight"].bound).all()


def test_lily_weighs_its_experts_by_the_mean_over_the_tokens():
    spec, tensors = LayerSpec("l", "linear", 3, 4), {"A": drawn(2, 3), "B": drawn(3 * 2, 4), "router": drawn(3, 2)}
    x, weight = drawn(2, 5, 3), drawn(4, 3, seed=3)
    hidden = x @ tensors["A"].T
    chances = torch.softmax(hidden @ tensors["router"].T, -1).flatten(0, 1).mean(0)
    mixed = sum(chances[e] * tensors["B"][2 * e : 2 * e + 2] for e in range(3))
    expected = x @ weight.T + 0.5 * (hidden @ mixed)
    assert torch.allclose(output("lily", site(spec, 2, 0.5, tensors), {"weight": weight}, x), expected)


@pytest.mark.parametrize("splits", [1, 2])
def test_poly_mixes_the_skills_of_each_rows_task(splits):
    tensors = {
        "A": drawn(splits, 3, 4 // splits, 2),
        "B": drawn(splits, 3, 2, 6 // splits),
        "logits": drawn(3, splits * 3),
    }
    x, weight = drawn(3, 5, 4), drawn(6, 4, seed=3)
    expected = x @ weight.T
    for row in range(3):
        gates = torch.sigmoid(tensors["logits"][row % TASKS].reshape(splits, 3))
        gates = gates / gates.sum(-1, keepdim=True)
        down = torch.cat([sum(gates[q, s] * tensors["A"][q, s] for s in range(3)) for q in range(splits)], 0)
        up = torch.cat([sum(gates[q, s] * tensors["B"][q, s] for s in range(3)) for q in range(splits)], 1)
        expected[row] += x[row] @ down @ up / 2
    one = site(LayerSpec("l", "linear", 4, 6), 2, 1.0, tensors)
    assert torch.allclose(output("poly", one, {"weight": weight}, x), expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_of_the_softmax_holds_and_is_not_loose(dtype):
    ar, worst = Arithmetic(precision(dtype)), 0.0
    for seed in range(40):
        logits = (4 * drawn(6, 5, seed=seed)).to(dtype)
        form = softmax(ar, leaf(logits))
        worst = max(worst, float(((torch.softmax(logits, -1).double() - form.value).abs() / form.bound).max()))
    assert 0.05 < worst <= 1  # kernels round once where the bound counts every step


def test_the_bound_of_the_softmax_covers_logits_that_are_off():
    ar, logits, off = Arithmetic(precision(torch.float32)), drawn(20, 4), 1e-2
    form = softmax(ar, Bounded(logits, torch.full_like(logits, off)))
    moved = torch.softmax(logits + off * torch.sign(drawn(20, 4, seed=5)), -1)
    assert bool(((moved - form.value).abs() <= form.bound).all())
    assert float(form.bound.max()) <= 1.01
