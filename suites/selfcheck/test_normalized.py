"""DoRA's closed form and its round-trip budget from both sides, by hand-made merges in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcheck import budgets
from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.rounding import DTYPES, judged, leaf

torch.set_num_threads(1)
DORA = FORMULAS["dora"]
LINEAR = LayerSpec("layer", "linear", 12, 6, bias=True)
PAIRS = [(name, name) for name in DTYPES] + [("bfloat16", "float32"), ("float16", "float32")]


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype, scale: float = 0.5) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def adapters(count: int, seed: int, dtype: torch.dtype, spec: LayerSpec = LINEAR) -> list[dict[str, Tensor]]:
    kernel = spec.kernel
    return [
        {
            "A": drawn((3 * spec.groups, spec.n_in, *kernel), seed + 10 * k, dtype),
            "B": drawn((spec.n_out, 3, *(1 for _ in kernel)), seed + 10 * k + 1, dtype),
            "magnitude": drawn((spec.n_out,), seed + 10 * k + 2, dtype).abs() + 0.25,
        }
        for k in range(count)
    ]


def sites(drawn_adapters: list[dict[str, Tensor]], spec: LayerSpec = LINEAR) -> list[Site]:
    rank = 3 * spec.groups
    return [
        Site(spec, AdapterSpec(f"a{k}", (0,), rank, float(rank)), {role: leaf(t) for role, t in tensors.items()})
        for k, tensors in enumerate(drawn_adapters)
    ]


def by_hand(weight: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge one DoRA into a linear layer and take it out again."""
    delta = tensors["B"] @ tensors["A"]
    gain = (tensors["magnitude"] / torch.linalg.norm(weight + delta, dim=1)).view(-1, 1)
    merged = (gain * (weight + delta)).to(weight.dtype)
    return merged, (merged / gain - delta).to(weight.dtype)


@pytest.mark.parametrize(("base_dtype", "adapter_dtype"), PAIRS)
def test_a_round_trip_uses_most_of_its_budget_and_never_more(base_dtype, adapter_dtype):
    m, worst = machine(DTYPES[base_dtype], DTYPES[adapter_dtype], False), 0.0
    for seed in range(120):
        weight = drawn((6, 12), 7000 + seed, DTYPES[base_dtype], 10.0 ** (seed % 5 - 2))
        own = adapters(1, 100 * seed, DTYPES[adapter_dtype])
        budget = budgets.roundtrip(m, DORA, sites(own), {"weight": leaf(weight)})["weight"]
        _, restored = by_hand(weight, own[0])
        worst = max(worst, float(((restored.double() - weight.double()).abs() / budget).max()))
    assert 0.5 < worst <= 1


@pytest.mark.parametrize(("base_dtype", "adapter_dtype"), PAIRS)
def test_a_merge_stays_within_the_bound_of_the_closed_form(base_dtype, adapter_dtype):
    m, worst = machine(DTYPES[base_dtype], DTYPES[adapter_dtype], False), 0.0
    for seed in range(60):
        weight, own = drawn((6, 12), 7000 + seed, DTYPES[base_dtype]), adapters(1, 100 * seed, DTYPES[adapter_dtype])
        form = DORA.merge(m, sites(own)[0], {"weight": leaf(weight)})["weight"]
        merged, _ = by_hand(weight, own[0])
        worst = max(worst, float(((merged.double() - form.value).abs() / judged(form, machine=m.base.store)).max()))
    assert 0.1 < worst <= 1


def test_rows_of_the_merged_weight_have_the_learned_magnitude():
    m, own = machine(torch.float64, torch.float64, False), adapters(1, 5, torch.float64)
    merged = DORA.merge(m, sites(own)[0], {"weight": leaf(drawn((6, 12), 6, torch.float64))})["weight"].value
    assert torch.allclose(merged.norm(dim=1), own[0]["magnitude"], rtol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_adapted_layer_computes_what_the_merged_weight_does(count):
    m, own = machine(torch.float64, torch.float64, False), sites(adapters(count, 5, torch.float64))
    base = {"weight": leaf(drawn((6, 12), 6, torch.float64)), "bias": leaf(drawn((6,), 7, torch.float64))}
    x = drawn((4, 12), 8, torch.float64)
    merged = DORA.merge_many(m, own, base)["weight"].value
    adapted = DORA.forward(m, own, base, leaf(x))
    assert torch.allclose(adapted.value, x @ merged.t() + base["bias"].value, rtol=1e-12)


def test_later_adapters_take_the_norm_of_the_unmerged_weight():
    m, own = machine(torch.float64, torch.float64, False), adapters(2, 5, torch.float64)
    weight = drawn((6, 12), 6, torch.float64)
    expected = weight
    for tensors in own:
        delta = tensors["B"] @ tensors["A"]
        expected = (tensors["magnitude"] / (weight + delta).norm(dim=1)).view(-1, 1) * (expected + delta)
    merged = DORA.merge_many(m, sites(own), {"weight": leaf(weight)})["weight"].value
    assert torch.allclose(merged, expected, rtol=1e-12)


def test_a_grouped_convolution_is_normalized_by_the_map_that_it_computes():
    one = (1,)
    spec = LayerSpec("layer", "conv1d", 4, 6, False, one, one, padding=(0,), dilation=one, groups=2, size=one)
    m, own = machine(torch.float64, torch.float64, False), adapters(1, 9, torch.float64, spec)
    base = {"weight": leaf(drawn(spec.weight_shape, 10, torch.float64))}
    unit = torch.eye(4, dtype=torch.float64)[:, :, None]
    rows = DORA.forward(m, sites(own, spec), base, leaf(unit)).value[:, :, 0].t()
    assert torch.allclose(rows.norm(dim=1), own[0]["magnitude"], rtol=1e-12)
