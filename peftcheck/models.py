"""From a case to a model: one bench of layers, each fed its own input, or a whole model of transformers.

The layers stand side by side rather than in a chain, so that nothing but the layer under test acts on what is
compared, while names, nesting, sharing and untargeted neighbours are those of a real model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftcheck import attention, transformer_models, values
from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, Case, LayerSpec
from peftcheck.errors import UsageError
from peftcheck.rounding import DTYPES

_CONVOLUTION = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


class ScaledEmbedding(nn.Embedding):
    """An embedding whose forward multiplies by `embed_scale`, as several decoders have."""

    def __init__(self, *args, embed_scale: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Matrix(nn.Module):
    """A module whose forward uses a bare parameter: `x @ weight.T`, or one matrix for each of `depth` experts."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.weight_shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.transpose(-1, -2)


class Bench(nn.Module):
    """The layers of a case under their (dotted) names; `forward` takes one input per layer."""

    def __init__(self, specs: tuple[LayerSpec, ...], layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.specs = specs
        for name, layer in layers.items():
            parent: nn.Module = self
            *containers, last = name.split(".")
            for part in containers:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(last, layer)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            attention.run(spec, self.get_submodule(spec.name), x) for spec, x in zip(self.specs, inputs, strict=True)
        )


def layer(spec: LayerSpec, dtype: torch.dtype) -> nn.Module:
    """Return the layer of a spec, its parameters uninitialised."""
    if spec.kind == "linear":
        return nn.Linear(spec.n_in, spec.n_out, bias=spec.bias, dtype=dtype)
    if spec.kind == "conv1d-transformers":
        return _transformers_conv1d(spec, dtype)
    if spec.kind in CONVOLUTIONS:
        return _CONVOLUTION[spec.kind](
            spec.n_in,
            spec.n_out,
            spec.kernel,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            groups=spec.groups,
            padding_mode=spec.padding_mode,
            bias=spec.bias,
            dtype=dtype,
        )
    if spec.kind == "embedding":
        return nn.Embedding(spec.n_in, spec.n_out, padding_idx=spec.padding_idx, dtype=dtype)
    if spec.kind == "embedding.scaled":
        return ScaledEmbedding(spec.n_in, spec.n_out, spec.padding_idx, embed_scale=spec.scale, dtype=dtype)
    if spec.kind == "layernorm":
        return nn.LayerNorm(spec.n_in, bias=spec.bias, dtype=dtype)
    if spec.kind == "parameter":
        return Matrix(spec, dtype)
    if spec.kind == "mha":
        return nn.MultiheadAttention(spec.n_in, spec.heads, bias=spec.bias, batch_first=spec.batch_first, dtype=dtype)
    raise UsageError(f"unknown layer kind '{spec.kind}'")


def _transformers_conv1d(spec: LayerSpec, dtype: torch.dtype) -> nn.Module:
    try:
        from transformers.pytorch_utils import Conv1D
    except ModuleNotFoundError as error:
        raise UsageError("layer conv1d-transformers needs transformers: pip install transformers") from error
    return Conv1D(spec.n_out, spec.n_in).to(dtype)


def build(case: Case) -> nn.Module:
    """Build the pristine model of a case, in eval mode, every parameter filled from the case's values."""
    if case.whole:
        return transformer_models.build(case)
    dtype = DTYPES[case.sweep.dtype]
    made = {spec.name: layer(spec, dtype) for spec in case.layers}
    for spec in case.layers:
        if spec.max_norm is not None:
            made[spec.name].max_norm = values.max_norm(case, spec)
    for spec in case.layers:
        if spec.tied is not None:
            made[spec.name].weight = made[spec.tied].weight
    with torch.no_grad():
        for spec in case.layers:
            for name, tensor in _own_tensors(spec, made[spec.name]):
                tensor.copy_(values.base(case, spec, name, tuple(tensor.shape)))
    return Bench(case.layers, made).train(case.train)


def _own_tensors(spec: LayerSpec, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if spec.tied is None or name != "weight":
            yield name, parameter


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, those that are shared under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def holders(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that hold tensors of their own."""
    return tuple(name for name, module in model.named_modules() if module._parameters or module._buffers)


def arguments(case: Case) -> list[Tensor]:
    """Return what the model's forward takes: a bench one input per layer, a whole model its own."""
    return transformer_models.arguments(case) if case.whole else list(inputs(case).values())


def inputs(case: Case) -> dict[str, Tensor]:
    """Return the input of each layer of a bench, by the layer's name."""
    dtype = DTYPES[case.sweep.dtype]
    return {spec.name: _input(case, spec, dtype) for spec in case.layers}


def _input(case: Case, spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    if spec.kind in EMBEDDINGS:
        return values.indices(case, spec, case.batch)
    if spec.kind in CONVOLUTIONS:
        shape = (*case.batch[:1], spec.n_in, *spec.size)
    elif spec.kind == "parameter" and spec.depth:
        shape = (spec.depth, max(1, case.batch[-1] if case.batch else 1), spec.n_in)
    elif spec.kind == "mha":
        shape = attention.shape(spec, case.batch)
    elif spec.kind == "conv1d-transformers":
        shape = (*(case.batch or (1,)), spec.n_in)
    else:
        shape = (*case.batch, spec.n_in)
    return values.activations(case, spec, shape).to(dtype)
