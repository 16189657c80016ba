"""Attention layers: what they are given, what they compute, and what an adapter of their projections adds."""

from __future__ import annotations

import pytest
import torch

from peftcheck import attention, models
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import DTYPES, Arithmetic, leaf, precision

SPECS = {
    "itself": LayerSpec("a", "mha", 6, 6, True, size=(4,), heads=2),
    "another": LayerSpec("a", "mha", 6, 6, True, size=(2, 5), heads=3),
    "causal": LayerSpec("a", "mha", 8, 8, False, size=(4,), causal=True),
    "sequence first": LayerSpec("a", "mha", 8, 8, True, size=(3, 2), heads=4, batch_first=False),
}


def case(spec: LayerSpec, dtype: str = "float64", batch: tuple[int, ...] = (2,), profile: str = "normal") -> Case:
    sweep = Sweep("none", "lora", "mha", dtype)
    return Case(sweep, 0, 0, (spec,), (AdapterSpec("x", (0,), 2, 3.0),), dtype, profile, 5, batch)


def pristine(here: Case):
    return {name: leaf(tensor) for name, tensor in models.build(here).get_submodule("a").named_parameters()}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("profile", ["normal", "graded", "huge"])
@pytest.mark.parametrize("name", SPECS)
def test_the_layer_computes_what_the_oracle_says_of_it(name, profile, batch, dtype):
    here = case(SPECS[name], dtype, batch, profile)
    model, x = models.build(here).requires_grad_(False), models.inputs(here)["a"]
    form = layer_output(Arithmetic(precision(DTYPES[dtype])), SPECS[name], pristine(here), leaf(x))
    (output,) = model(x)
    assert output.shape == form.value.shape
    assert bool(((output.double() - form.value).abs() <= 2 * form.bound).all())


@pytest.mark.parametrize("name", SPECS)
def test_the_bound_tells_wrong_heads_a_missing_mask_and_swapped_inputs_apart(name):
    here, spec = case(SPECS[name]), SPECS[name]
    x, ar = models.inputs(here)["a"], Arithmetic(precision(torch.float64))
    layer = models.build(here).requires_grad_(False).get_submodule("a")
    form = layer_output(ar, spec, pristine(here), leaf(x))
    query, key, value = attention.parts(spec, x)
    wrong = [layer(query, value.flip(-1), value, attn_mask=attention.hidden(spec))[0]]
    if spec.causal:
        wrong.append(layer(query, key, value)[0])
    if spec.heads > 1:
        layer.num_heads, layer.head_dim = 1, spec.n_in
        wrong.append(layer(query, key, value, attn_mask=attention.hidden(spec))[0])
    for output in wrong:
        assert float(((output - form.value).abs() / form.bound).max()) > 1e6


def test_a_layer_that_attends_to_itself_is_given_one_tensor_three_times():
    x = models.inputs(case(SPECS["itself"]))["a"]
    assert all(part is x for part in attention.parts(SPECS["itself"], x))
    query, key, value = attention.parts(SPECS["another"], models.inputs(case(SPECS["another"]))["a"])
    assert query.shape[1] == 2 and key.shape[1] == value.shape[1] == 5


def test_lora_changes_both_projections_each_by_its_own_product():
    here, spec = case(SPECS["itself"]), SPECS["itself"]
    shapes = {"A": (2, 6), "B": (18, 2), "out.A": (2, 6), "out.B": (6, 2), "out.B.bias": (6,)}
    raw = {
        role: torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(1)) for role, shape in shapes.items()
    }
    m, formula = machine(torch.float64, torch.float64, False), FORMULAS["lora"]
    site, base = Site(spec, here.adapters[0], {role: leaf(t) for role, t in raw.items()}), pristine(here)
    merged = formula.merge(m, site, base)
    due = {
        "in_proj_weight": base["in_proj_weight"].value + 1.5 * raw["B"] @ raw["A"],
        "out_proj.weight": base["out_proj.weight"].value + 1.5 * raw["out.B"] @ raw["out.A"],
        "out_proj.bias": base["out_proj.bias"].value + 1.5 * raw["out.B.bias"],
    }
    assert set(merged) == set(due)
    layer, x = models.build(here).requires_grad_(False).get_submodule("a"), models.inputs(here)["a"]
    for name, value in due.items():
        assert bool(((merged[name].value - value).abs() <= merged[name].bound).all())
        layer.get_parameter(name).copy_(value)
    form = formula.forward(m, (site,), base, leaf(x))
    assert bool(((attention.run(spec, layer, x) - form.value).abs() <= 2 * form.bound).all())
