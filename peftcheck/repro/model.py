"""A case's model and tensors as source text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftcheck import values
from peftcheck.case import Case, LayerSpec
from peftcheck.spelling import text
from peftcheck.transformer_models import BLUEPRINTS, settings

_CONVOLUTION = {"conv1d": "Conv1d", "conv2d": "Conv2d", "conv3d": "Conv3d"}
_DEFINITIONS = {
    "embedding.scaled": (
        "class ScaledEmbedding(nn.Embedding):",
        "    def __init__(self, *args, embed_scale, **kwargs):",
        "        super().__init__(*args, **kwargs)",
        '        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)',
        "    def forward(self, ids):",
        "        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)",
    ),
    "parameter": (
        "class Matrix(nn.Module):",
        "    def __init__(self, *shape, dtype):",
        "        super().__init__()",
        "        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))",
        "    def forward(self, x):",
        "        return x @ self.weight.transpose(-1, -2)",
    ),
}
FILL = (
    "def tensors(m):",
    "    return dict([*m.named_parameters(remove_duplicate=False), *m.named_buffers(remove_duplicate=False)])",
    "def fill(model, values):",
    "    with torch.no_grad():",
    "        for name, value in values.items():",
    "            tensors(model)[name].copy_(torch.tensor(value, dtype=torch.float64))",
)


def number(value: Any) -> str:
    """Return a number (or nested lists of numbers) so that it reads back bit for bit."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(number(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def literal(tensor: Tensor) -> str:
    """Return an expression for a tensor, its dtype included; exact."""
    values = number(tensor.detach().tolist())
    return f"torch.tensor({values})" if tensor.dtype == torch.int64 else f"torch.tensor({values}, dtype={tensor.dtype})"


def imports(case: Case) -> tuple[str, ...]:
    """Return the import lines that the layers need."""
    if case.whole:
        blueprint = BLUEPRINTS[case.sweep.layer]
        return (f"from transformers import {blueprint.config}, {blueprint.model}",)
    if any(spec.kind == "conv1d-transformers" for spec in case.layers):
        return ("from transformers.pytorch_utils import Conv1D",)
    return ()


def definitions(case: Case) -> list[str]:
    """Return the classes that the layers need."""
    if case.whole:
        return []
    kinds = dict.fromkeys(spec.kind for spec in case.layers)
    return [line for kind in kinds for line in _DEFINITIONS.get(kind, ())]


def build(case: Case) -> list[str]:
    """Return the lines that make `model`, every layer under its (dotted) name; a whole model from its configuration."""
    mode = "train" if case.train else "eval"
    if case.whole:
        blueprint = BLUEPRINTS[case.sweep.layer]
        options = blueprint.arguments(settings(case))
        given = ", ".join(
            f"{name}={text(value) if isinstance(value, str) else value}" for name, value in options.items()
        )
        return [f"model = {blueprint.model}({blueprint.config}({given})).to(torch.{case.sweep.dtype}).{mode}()"]
    tree: dict[str, Any] = {}
    for spec in case.layers:
        *containers, last = spec.name.split(".")
        node = tree
        for part in containers:
            node = node.setdefault(part, {})
        node[last] = _layer(spec, case.sweep.dtype, values.max_norm(case, spec))
    lines = [f"model = {_modules(tree)}.{mode}()"]
    for spec in case.layers:
        if spec.tied is not None:
            lines.append(
                f"model.get_submodule({text(spec.name)}).weight = model.get_submodule({text(spec.tied)}).weight"
            )
    return lines


def _modules(tree: Mapping[str, Any]) -> str:
    items = (f"{text(name)}: {_modules(item) if isinstance(item, dict) else item}" for name, item in tree.items())
    return "nn.ModuleDict({" + ", ".join(items) + "})"


def _layer(spec: LayerSpec, dtype: str, longest: float | None = None) -> str:
    numbers = f"{spec.n_in}, {spec.n_out}"
    if spec.kind == "conv1d-transformers":
        return f"Conv1D({spec.n_out}, {spec.n_in}).to(torch.{dtype})"
    if spec.kind in _CONVOLUTION:
        return f"nn.{_CONVOLUTION[spec.kind]}({numbers}, {spec.kernel}{_options(spec)}, dtype=torch.{dtype})"
    if spec.kind in ("embedding", "embedding.scaled"):
        scaled = spec.kind == "embedding.scaled"
        index = "" if spec.padding_idx is None else f", padding_idx={spec.padding_idx}"
        index += "" if longest is None else f", max_norm={longest!r}"
        scale = f", embed_scale={spec.scale!r}" if scaled else ""
        return f"{'ScaledEmbedding' if scaled else 'nn.Embedding'}({numbers}{index}{scale}, dtype=torch.{dtype})"
    if spec.kind == "layernorm":
        return f"nn.LayerNorm({spec.n_in}, bias={spec.bias}, dtype=torch.{dtype})"
    if spec.kind == "parameter":
        return f"Matrix({', '.join(map(str, spec.weight_shape))}, dtype=torch.{dtype})"
    if spec.kind == "mha":
        options = f"bias={spec.bias}, batch_first={spec.batch_first}, dtype=torch.{dtype}"
        return f"nn.MultiheadAttention({spec.n_in}, {spec.heads}, {options})"
    return f"nn.Linear({numbers}, bias={spec.bias}, dtype=torch.{dtype})"


def _options(spec: LayerSpec) -> str:
    ones = (1,) * len(spec.kernel)
    options = {
        "stride": ones,
        "padding": (0,) * len(ones),
        "dilation": ones,
        "groups": 1,
        "padding_mode": "zeros",
    }
    shown = {name: getattr(spec, name) for name, usual in options.items() if getattr(spec, name) != usual}
    shown["bias"] = spec.bias
    return "".join(f", {name}={text(value) if isinstance(value, str) else value}" for name, value in shown.items())


def table(name: str, values: Mapping[str, Tensor], wide: bool) -> list[str]:
    """Return a `fill(name, {...})` call for tensors by name: an entry per line, or all on one where `wide`."""
    entries = [f"{text(key)}: {number(value.detach().double().tolist())}" for key, value in values.items()]
    if wide or len(entries) == 1:
        return [f"fill({name}, {{{', '.join(entries)}}})"]
    return [f"fill({name}, {{", *(f"    {entry}," for entry in entries), "})"]


def indented(lines: Sequence[str]) -> list[str]:
    """Return lines one level deeper."""
    return ["    " + line for line in lines]
