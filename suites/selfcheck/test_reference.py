"""The reference implementation keeps every law, and does what its docstrings say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from peftcheck import engine, generator
from peftcheck.case import MODELS, AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.errors import UsageError
from peftcheck.implementation import Attached, Implementation, load
from peftcheck.implementations.reference import Reference
from peftcheck.law import laws
from peftcheck.models import build
from peftcheck.outcome import PASS
from peftcheck.rounding import DTYPES

REFERENCE = Reference()
CELLS = [(name, layer) for name, variant in REFERENCE.variants().items() for layer in sorted(variant.layers)]
CASES = 2  # on each of the four dtypes, one of them in the exact regime; of whole models one, in two dtypes


@pytest.mark.parametrize(("variant", "layer"), CELLS, ids=lambda value: value)
def test_keeps_every_law(variant: str, layer: str) -> None:
    offered, passed = REFERENCE.variants()[variant], set()
    chosen = [law for law in laws() if law.name != "forward.compiled"]  # a second a case: in suites/reference/soak.py
    whole = layer in MODELS
    for dtype in ("float32", "bfloat16") if whole else DTYPES:
        for index in range(1 if whole else CASES):
            case = generator.draw(offered, Sweep("reference", variant, layer, dtype), 7, index, index % 2 == 0)
            for outcome in engine.check(REFERENCE, case, chosen):
                assert not outcome.failed, f"{outcome.law}: {outcome.message} on {case.words()}"
                if outcome.status == PASS and outcome.effect > 0:
                    passed.add(outcome.law)
    assert {"forward.oracle", "merge.disable", "merge.unload"} <= passed


def test_is_written_without_the_oracle() -> None:
    for path in Path(__file__).parents[2].glob("peftcheck/implementations/reference/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(("peftcheck.oracle", "peftcheck.budgets"))], path


def test_is_an_implementation_and_loads_by_name() -> None:
    found = load("peftcheck.implementations.reference:Reference")
    assert isinstance(found, Implementation)
    assert isinstance(attached()[0], Attached)


def attached(variant: str = "lora", adapters: int = 2, **layer) -> tuple:
    spec = LayerSpec("proj", **{"kind": "linear", "n_in": 5, "n_out": 4, "bias": True, **layer})
    names = ("a", "b", "c")[:adapters]
    options = tuple((key, values[0]) for key, values in REFERENCE.variants()[variant].options.items())
    made = tuple(AdapterSpec(name, (0,), 2, 3.0, options) for name in names)
    case = Case(Sweep("reference", variant, spec.kind, "float64"), 0, 0, (spec,), made, "float64", "normal")
    model = build(case)
    port = REFERENCE.attach(model, case)
    generator_ = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in names:
            for tensor in port.adapter_tensors(name).values():
                tensor.copy_(1 + torch.rand(tensor.shape, generator=generator_, dtype=torch.float64))
    return port, model


def outputs(model: nn.Module, width: int = 5) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * width, dtype=torch.float64).reshape(3, width))[0]


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_combines_without_cross_terms(kind: str) -> None:
    port, _ = attached()
    due = 2.0 * port.delta("proj", "a") - 0.5 * port.delta("proj", "b")
    port.combine(["a", "b"], [2.0, -0.5], kind, "both", **({"svd_rank": 4} if kind == "svd" else {}))
    assert torch.allclose(port.delta("proj", "both"), due, rtol=1e-13, atol=1e-13)


def test_combines_grouped_convolutions_within_their_groups() -> None:
    layer = dict(
        kind="conv1d",
        n_in=4,
        n_out=4,
        groups=2,
        kernel=(2,),
        stride=(1,),
        padding=(0,),
        dilation=(1,),
        size=(5,),
    )
    port, model = attached(**layer)
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(1, 4, 5)
    with torch.no_grad():
        plain = model.proj.layer(x)
        both = model(x)[0]
        port.combine(["a", "b"], [1.0, 1.0], "cat", "sum")
        port.activate(["sum"])
        assert not torch.allclose(both, plain)
        assert torch.allclose(model(x)[0], both, rtol=1e-12, atol=1e-12)


def test_stores_and_loads(tmp_path: Path) -> None:
    port, model = attached()
    port.combine(["a", "b"], [1.0, 2.0], "cat", "sum")
    port.activate(["sum"])
    before = outputs(model)
    port.save(tmp_path, ["sum"])
    port.delete("sum")
    port.load(tmp_path / "sum", "again")
    port.activate(["again"])
    assert torch.equal(outputs(model), before)
    with pytest.raises(ValueError, match="no adapter 'none'"):
        port.load(tmp_path / "elsewhere", "none")


def test_mixed_batch_gives_each_row_its_adapter() -> None:
    port, model = attached()
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)
    with torch.no_grad():
        mixed = port.forward([x], ["b", "a", "b"])[0]
        alone = {}
        for name in ("a", "b"):
            port.activate([name])
            alone[name] = model(x)[0]
    due = torch.stack([alone["b"][0], alone["a"][1], alone["b"][2]])
    assert torch.allclose(mixed, due, rtol=1e-14, atol=1e-14)  # a matrix product of fewer rows may round otherwise


def test_merging_again_changes_nothing_and_order_is_kept() -> None:
    port, _ = attached()
    port.merge(("b",))
    port.merge(("a", "b"))
    once = {key: tensor.clone() for key, tensor in port.base_tensors().items()}
    port.merge()
    assert port.merged() == {"proj": ("b", "a")}
    assert all(torch.equal(tensor, once[key]) for key, tensor in port.base_tensors().items())


@pytest.mark.parametrize(
    "operation",
    [
        lambda port: port.rescale("a", 2.0),
        lambda port: port.delete("a"),
        lambda port: port.activate(["b"]),
        lambda port: port.forward([torch.ones(1, 5, dtype=torch.float64)], ["b"]),
    ],
    ids=["rescale", "delete", "activate", "mixed batch"],
)
def test_what_a_merged_adapter_forbids_is_refused_and_changes_nothing(operation) -> None:
    port, model = attached()
    port.merge(("a",))
    before = outputs(model)
    with pytest.raises(ValueError, match="'a' is merged"):
        operation(port)
    assert torch.equal(outputs(model), before)


def test_a_zero_gate_cannot_be_unmerged_and_says_so() -> None:
    port, _ = attached("ia3", adapters=1)
    with torch.no_grad():
        port.adapter_tensors("a")["proj", "scale"][0] = 0
    port.merge(safe=True)
    merged = {key: tensor.clone() for key, tensor in port.base_tensors().items()}
    with pytest.raises(ValueError, match="'a' cannot be unmerged from 'proj'"):
        port.unmerge()
    assert all(torch.equal(tensor, merged[key]) for key, tensor in port.base_tensors().items())


def test_two_layers_that_share_a_weight_are_not_both_adapted() -> None:
    port, model = attached(adapters=1)
    model.add_module("twin", nn.Linear(5, 4, dtype=torch.float64))
    model.twin.weight = model.proj.layer.weight
    port.names = (*port.names, "twin")
    with pytest.raises(ValueError, match="share one weight"):
        port.add(AdapterSpec("second", (1,), 2, 1.0))


def test_leaves_requires_grad_as_it_was() -> None:
    port, model = attached()
    model.proj.layer.bias.requires_grad_(False)  # frozen anyway while adapters are attached
    assert not any(tensor.requires_grad for tensor in port.base_tensors().values())
    port.unload()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_unknown_variant_is_a_usage_error() -> None:
    port, _ = attached()
    case = Case(Sweep("reference", "none", "linear", "float64"), 0, 0, (), (), "float64", "normal")
    with pytest.raises(UsageError, match="choose from"):
        REFERENCE.attach(port.model, case)
