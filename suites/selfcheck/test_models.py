"""The bench: the model of a case is what its spec says, filled from the case's values alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peftcheck import models, values
from peftcheck.case import LAYERS, AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.errors import UsageError
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import DTYPES, Arithmetic, leaf, precision

SPECS = {
    "linear": LayerSpec("a.b", "linear", 5, 3, True),
    "conv1d-transformers": LayerSpec("a.b", "conv1d-transformers", 5, 3, True),
    "conv1d": LayerSpec("a.b", "conv1d", 4, 6, True, (3,), (2,), (1,), (2,), 2, "circular", (7,)),
    "conv2d": LayerSpec("a.b", "conv2d", 4, 6, False, (3, 2), (1, 1), "same", (1, 2), 2, "reflect", (6, 7)),
    "conv3d": LayerSpec(
        "a.b", "conv3d", 2, 3, True, (1, 2, 3), (1, 2, 1), (0, 1, 1), (1, 1, 1), 1, "replicate", (2, 3, 4)
    ),
    "embedding": LayerSpec("a.b", "embedding", 9, 4, padding_idx=2),
    "embedding.scaled": LayerSpec("a.b", "embedding.scaled", 9, 4, scale=3.7),
    "mha": LayerSpec("a.b", "mha", 4, 4, True),
    "layernorm": LayerSpec("a.b", "layernorm", 6, 6, True),
    "parameter": LayerSpec("a.b", "parameter", 5, 3, depth=2),
}
TYPES = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "embedding": nn.Embedding,
    "embedding.scaled": models.ScaledEmbedding,
    "mha": nn.MultiheadAttention,
    "layernorm": nn.LayerNorm,
    "parameter": models.Matrix,
}


def case(*layers: LayerSpec, dtype: str = "float32", batch: tuple[int, ...] = (2,), train: bool = False) -> Case:
    sweep = Sweep("none", "lora", layers[0].kind, dtype)
    return Case(sweep, 0, 0, layers, (AdapterSpec("x", (0,)),), dtype, "normal", 5, batch, train=train)


def spec_of(kind: str) -> LayerSpec:
    if kind == "conv1d-transformers":
        pytest.importorskip("transformers")
    return SPECS[kind]


def test_every_layer_kind_has_a_spec_here():
    assert set(SPECS) == set(LAYERS)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_of_its_kind_dtype_and_shape_and_holds_the_case_s_values(kind, dtype):
    spec = spec_of(kind)
    here = case(spec, dtype=dtype)
    layer = models.build(here).get_submodule("a.b")
    assert type(layer) is TYPES.get(kind, type(layer)) and not layer.training
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == DTYPES[dtype] and parameter.requires_grad
        due = values.base(here, spec, name, tuple(parameter.shape)).to(DTYPES[dtype])
        assert torch.equal(parameter.detach(), due)
    assert (getattr(layer, "bias", None) is not None) == (spec.bias and kind != "mha")


@pytest.mark.parametrize("kind", sorted({*LAYERS} - {"layernorm"}))
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_layer_computes_what_the_oracle_says_of_it(kind, dtype):
    here = case(spec_of(kind), dtype=dtype, batch=(2, 3))
    model, inputs = models.build(here), models.inputs(here)
    base = {name: leaf(tensor) for name, tensor in model.get_submodule("a.b").named_parameters()}
    form = layer_output(Arithmetic(precision(DTYPES[dtype])), here.layers[0], base, leaf(inputs["a.b"]))
    with torch.no_grad():
        (output,) = model(inputs["a.b"])
    assert output.shape == form.value.shape
    assert bool(((output.double() - form.value).abs() <= 2 * form.bound).all())


def test_layers_that_are_no_linear_maps_run_too():
    here = case(spec_of("layernorm"))
    model, inputs = models.build(here), models.inputs(here)
    layer = model.get_submodule("a.b")
    (output,) = model(inputs["a.b"])
    assert torch.equal(output, F.layer_norm(inputs["a.b"], (6,), layer.weight, layer.bias))


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_inputs_fit_the_layer_in_every_batch_shape(kind, batch):
    here = case(spec_of(kind), batch=batch)
    inputs = models.inputs(here)
    (output,) = models.build(here)(*inputs.values())
    assert output.numel()
    if kind in ("linear", "layernorm"):
        assert inputs["a.b"].shape[:-1] == batch
    if kind.startswith("embedding"):
        assert inputs["a.b"].shape == batch and inputs["a.b"].dtype == torch.int64


def test_names_may_nest_and_be_prefixes_of_each_other():
    layers = [LayerSpec(name, "linear", 2, 2) for name in ("1", "10", "block.a", "block.ab", "block.sub.a")]
    model = models.build(case(*layers))
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == {s.name for s in layers}
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == 5
    outputs = model(*models.inputs(case(*layers)).values())
    assert len(outputs) == 5


def test_tied_layers_share_one_parameter_and_keep_their_own_bias():
    first, second = LayerSpec("a", "linear", 3, 3, True), LayerSpec("b", "linear", 3, 3, True, tied="a")
    here = case(first, second)
    model = models.build(here)
    assert model.a.weight is model.b.weight and model.a.bias is not model.b.bias
    assert torch.equal(model.a.weight, values.base(here, first, "weight", (3, 3)).float())
    assert torch.equal(model.b.bias, values.base(here, second, "bias", (3,)).float())


def test_a_scaled_embedding_multiplies_in_its_own_dtype():
    here = case(SPECS["embedding.scaled"], dtype="bfloat16")
    layer = models.build(here).get_submodule("a.b")
    ids = torch.tensor([0, 8])
    assert torch.equal(layer(ids), F.embedding(ids, layer.weight) * torch.tensor(3.7).bfloat16())
    assert "a.b.embed_scale" not in models.build(here).state_dict()


def test_the_mode_is_the_case_s():
    assert models.build(case(SPECS["linear"], train=True)).training


def test_an_unknown_kind_is_refused_in_words():
    with pytest.raises(UsageError, match="unknown layer kind 'dense'"):
        models.build(case(LayerSpec("a", "dense", 1, 1)))


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_an_embedding_with_a_max_norm_leaves_its_own_rows_and_shortens_longer_ones(dtype):
    spec = LayerSpec("a.b", "embedding", 9, 4, max_norm=1.25)
    here = case(spec, dtype=dtype, batch=(40,))
    model, x = models.build(here), models.inputs(here)
    layer = model.get_submodule("a.b").requires_grad_(False)
    before = layer.weight.clone()
    model(x["a.b"])
    assert torch.equal(layer.weight, before)
    layer.weight.mul_(2)
    model(x["a.b"])
    assert not torch.equal(layer.weight, 2 * before)
