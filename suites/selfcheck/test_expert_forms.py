"""The closed form of Arrow against the same routing written token by token, and its direction against an iteration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.experts import direction
from peftcheck.rounding import Arithmetic, leaf, precision
from peftcheck.values import normal

DOUBLE = machine(torch.float64, torch.float64, False)
SPEC = LayerSpec("l", "linear", 5, 4)


def site(experts: int, general: int, **options) -> Site:
    tensors = {f"{r}.{e}": normal(f"{r}{e}", s) for r, s in (("A", (1, 5)), ("B", (4, 1))) for e in range(experts)}
    tensors |= {
        f"general.{r}.{g}": normal(f"g{r}{g}", s) for r, s in (("A", (1, 5)), ("B", (4, 1))) for g in range(general)
    }
    adapter = AdapterSpec("arrow_router", (0,), 1, 3.0, tuple(sorted(options.items())))
    return Site(SPEC, adapter, {role: leaf(tensor) for role, tensor in tensors.items()})


def routed(one: Site, weight: Tensor, x: Tensor) -> Tensor:
    tensors = {role: tensor.value for role, tensor in one.tensors.items()}
    pick = lambda prefix: [tensors[f"{prefix}.{i}"] for i in range(4) if f"{prefix}.{i}" in tensors]  # noqa: E731
    downs, ups = pick("A"), pick("B")
    if general := pick("general.A"):
        downs = [a - sum(general) / len(general) for a in downs]
        ups = [b - sum(pick("general.B")) / len(general) for b in ups]
    y = x @ weight.T
    for token in range(len(x)):
        near = torch.stack([(a[0] / a.norm() @ x[token]).abs() for a in downs])
        best = near.topk(one.adapter.option("most")).indices
        chances = torch.softmax(near[best] / one.adapter.option("temperature"), 0)
        for expert, chance in zip(best.tolist(), chances, strict=True):
            y[token] += chance * 3.0 * ups[expert] @ (downs[expert] @ x[token])
    return y


@pytest.mark.parametrize("general", [0, 2])
@pytest.mark.parametrize(("experts", "most", "temperature"), [(2, 1, 1.0), (3, 2, 0.5), (4, 3, 2.0)])
def test_each_token_goes_through_the_experts_whose_directions_it_lies_along(experts, most, temperature, general):
    one, weight, x = (
        site(experts, general, most=most, temperature=temperature),
        normal("w", (4, 5)),
        normal("x", (7, 5)),
    )
    form = FORMULAS["lora.arrow"].forward(DOUBLE, [one], {"weight": leaf(weight)}, leaf(x))
    assert torch.allclose(form.value, routed(one, weight, x))
    assert float(form.bound.max()) < 1e-2, "of rank one the direction is known to single precision"


def test_where_two_experts_are_alike_the_choice_may_be_either():
    one = site(2, 0, most=1, temperature=1.0)
    one = Site(one.spec, one.adapter, {**one.tensors, "A.1": one.tensors["A.0"].map(lambda t: t * (1 + 1e-9))})
    weight, x = normal("w", (4, 5)), normal("x", (7, 5))
    form = FORMULAS["lora.arrow"].forward(DOUBLE, [one], {"weight": leaf(weight)}, leaf(x))
    for e in range(2):
        a, b = one.tensors[f"A.{e}"].value, one.tensors[f"B.{e}"].value
        alone = x @ weight.T + 3.0 * x @ a.T @ b.T
        assert bool(((form.value - alone).abs() <= form.bound).all())


def iterated(a: Tensor, b: Tensor, seed: int) -> Tensor:
    a, b = a.float(), b.float()
    v = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(seed))
    for _ in range(16):
        v = a.T @ (b.T @ (b @ (a @ (v / (v.norm() + 1e-8)))))
    return (v / (v.norm() + 1e-8)).double()


def test_the_bound_of_a_direction_holds_and_knows_when_nothing_is_known():
    known, worst = 0, 0.0
    for seed in range(60):
        a, b = normal(f"a{seed}", (2, 6)), normal(f"b{seed}", (5, 2))
        a[1] *= 2.0 ** -(seed % 8)
        b[:, 1] *= 2.0 ** -(seed % 8)
        form, found = direction(Arithmetic(precision(torch.float64)), leaf(a), leaf(b)), iterated(a, b, seed)
        off = torch.minimum((found - form.value).abs(), (found + form.value).abs())
        off = off if bool(off.max() < 0.5) else (found - form.value * torch.sign(found @ form.value)).abs()
        assert bool((off <= form.bound).all())
        known += bool(form.bound.max() < 1e-4)
        worst = max(worst, float((off / form.bound).max()))
    assert known > 20
    assert 1e-3 < worst <= 1
