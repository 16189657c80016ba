"""Adapters of several methods on one layer: what is adapted first, and what a round trip may cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcheck import budgets
from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.rounding import leaf

torch.set_num_threads(1)
SPEC = LayerSpec("l", "linear", 4, 6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def site(method: str, **tensors: Tensor) -> Site:
    options = (("method", method), ("neumann", False))
    return Site(SPEC, AdapterSpec(method, (0,), 2, 4.0, options), {role: leaf(t) for role, t in tensors.items()})


def lora(dtype=torch.float64) -> tuple[Site, Tensor]:
    a, b = drawn(2, 4).to(dtype), drawn(6, 2).to(dtype)
    return site("lora", A=a, B=b), 2 * b.double() @ a.double()


def oft(dtype=torch.float64) -> tuple[Site, Tensor]:
    entries = (0.3 * drawn(2, 1)).to(dtype)
    blocks = []
    for angle in entries[:, 0].double():
        q = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64)
        blocks.append((torch.eye(2) + q) @ torch.linalg.inv(torch.eye(2) - q))
    sign = torch.block_diag(*blocks)
    return site("oft", R=entries), sign


@pytest.mark.parametrize("first", ["lora", "oft"])
def test_the_adapter_loaded_first_is_the_inner_one(first):
    (low, change), (turn, r) = lora(), oft()
    m, base, x = machine(torch.float64, torch.float64, False), drawn(6, 4, seed=3), drawn(3, 4)
    sites = [low, turn] if first == "lora" else [turn, low]
    y = FORMULAS["mixed.rotated"].forward(m, sites, {"weight": leaf(base)}, leaf(x)).value
    candidates = [r, r.T]  # which of the two is R depends on a sign that both orders share
    wanted = [(base + change) @ t if first == "lora" else base @ t + change for t in candidates]
    fitting = [w for w in wanted if torch.allclose(y, x @ w.T)]
    assert len(fitting) == 1
    merged = {"weight": leaf(base)}
    for one in sites:
        merged = FORMULAS["mixed.rotated"].merge(m, one, merged)
    assert torch.allclose(merged["weight"].value, fitting[0])


def test_sums_may_be_undone_in_any_order():
    m, base = machine(torch.float32, torch.float32, False), drawn(6, 4, seed=3).float()
    (low, _), changes = lora(torch.float32), []
    other = site("lora", A=drawn(2, 4, seed=9).float(), B=drawn(6, 2, seed=9).float())
    for one in (low, other):
        changes.append((one.tensors["B"].value @ one.tensors["A"].value * 2).float())
    budget = budgets.roundtrip(m, FORMULAS["mixed"], [low, other], {"weight": leaf(base)})["weight"]
    for order in ([0, 1], [1, 0]):
        moved = base.clone()
        for k in order:
            moved += changes[k]
        for k in order:
            moved -= changes[k]
        ratio = (moved.double() - base.double()).abs() / budget
        assert 0.2 < float(ratio.max()) <= 1
