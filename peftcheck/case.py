"""What is checked: sweeps, cases and the tokens that replay them.

A case determines everything: the model's shape, the adapters, the values, the poison. It is plain data, so that
a token made on one machine replays on any other.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from typing import Any

from peftcheck import tokens
from peftcheck.errors import UsageError
from peftcheck.rounding import DTYPES

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
EMBEDDINGS = ("embedding", "embedding.scaled")
LAYERS = (
    "linear",
    "conv1d-transformers",
    *CONVOLUTIONS,
    *EMBEDDINGS,
    "mha",
    "layernorm",
    "parameter",
)
# Whole models. What is adapted in them is of the kinds above: here it is structure, sharing and dispatch that counts.
MODELS = ("model.llama", "model.bert", "model.gpt2", "model.vit", "model.resnet")
SUBJECTS = (*LAYERS, *MODELS)
"""What the layer of a sweep may be."""
PARTS = ("attention.llama", "block.llama")
"""What else is adapted in whole models: modules that hold layers. A case whose setting `part` names one has them too."""


@dataclass(frozen=True)
class Sweep:
    """What shares one walk over the cases: an implementation's variant on a layer kind, dtype and quantizer."""

    implementation: str
    variant: str
    layer: str
    dtype: str
    quantizer: str | None = None

    def __str__(self) -> str:
        return "-".join(part for part in (self.variant, self.layer, self.dtype, self.quantizer) if part)


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the model.

    `n_in`, `n_out`: features, channels, or (embedding) entries and dimension. `kernel`, `stride`, `dilation` and
    `padding` have one entry per spatial dimension (padding also 'same' or 'valid'); `size` is the input's spatial
    extent. `scale` is the factor of a scaled embedding. `tied` names the layer whose weight this one shares.
    `depth` is the number of matrices of a stacked parameter (0: a plain matrix). An attention layer has `heads`; its
    `size` is the length of what it attends to itself, or those of the query and of what that attends to; `causal`: no
    position sees a later one; a Llama's has `groups` heads of keys and values. `max_norm`: an embedding shortens what it
    looks up to so many times its own longest row, more than once, so that none of its own is.
    """

    name: str
    kind: str
    n_in: int
    n_out: int
    bias: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    size: tuple[int, ...] = ()
    padding_idx: int | None = None
    scale: float = 1.0
    tied: str | None = None
    depth: int = 0
    heads: int = 1
    batch_first: bool = True
    causal: bool = False
    max_norm: float | None = None

    @property
    def fan_in(self) -> int:
        """The number of products that one output element sums."""
        if self.kind in EMBEDDINGS:
            return 1
        return self.n_in // self.groups * math.prod(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the pristine weight as the layer stores it."""
        if self.kind == "conv1d-transformers" or self.kind in EMBEDDINGS:
            return (self.n_in, self.n_out)
        if self.kind in CONVOLUTIONS:
            return (self.n_out, self.n_in // self.groups, *self.kernel)
        if self.kind == "layernorm":
            return (self.n_in,)
        if self.kind == "parameter":
            return (self.depth, self.n_out, self.n_in) if self.depth else (self.n_out, self.n_in)
        if self.kind == "mha":
            return (3 * self.n_in, self.n_in)
        return (self.n_out, self.n_in)

    @property
    def weight_name(self) -> str:
        """The name of the tensor that `weight_shape` is the shape of."""
        return "in_proj_weight" if self.kind == "mha" else "weight"

    def words(self) -> str:
        """Say in words what the layer is."""
        text = f"{self.name}: {self.kind} {self.n_in}->{self.n_out}"
        if self.kernel:
            text += f", kernel {'x'.join(map(str, self.kernel))}"
            for label in ("stride", "dilation"):
                values = getattr(self, label)
                if any(v != 1 for v in values):
                    text += f", {label} {'x'.join(map(str, values))}"
            if self.padding and self.padding != (0,) * len(self.kernel):
                text += (
                    f", padding {self.padding if isinstance(self.padding, str) else 'x'.join(map(str, self.padding))}"
                )
            if self.groups != 1:
                text += f", groups {self.groups}"
            if self.padding_mode != "zeros":
                text += f", {self.padding_mode}"
        if self.padding_idx is not None:
            text += f", padding_idx {self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm {self.max_norm:g} times its longest row"
        if self.kind == "mha":
            text += f", heads {self.heads}, length {'x'.join(map(str, self.size)) or 1}"
            text += (", causal" if self.causal else "") + ("" if self.batch_first else ", sequence first")
        if self.scale != 1.0:
            text += f", scale {self.scale:g}"
        if self.tied:
            text += f", tied to {self.tied}"
        return text + (", with bias" if self.bias else "")


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter: its name, the layers it targets, and its options.

    `rank` and `alpha` mean what the variant makes of them; `options` holds the rest, sorted by name.
    """

    name: str
    targets: tuple[int, ...]
    rank: int = 1
    alpha: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str, default: Any = None) -> Any:
        """Return an option's value, or `default`."""
        return dict(self.options).get(name, default)

    def at(self, target: int) -> AdapterSpec:
        """Return the adapter as it is on one layer: with the rank and alpha that the options `ranks`, `alphas` give it.

        Either holds pairs (index of a layer, value): what libraries call a rank or alpha pattern.
        """
        rank = dict(self.option("ranks", ())).get(target, self.rank)
        alpha = dict(self.option("alphas", ())).get(target, self.alpha)
        return dataclasses.replace(self, rank=rank, alpha=alpha)


@dataclass(frozen=True)
class Poison:
    """One element of one adapter tensor made hostile: `value` is 'nan', 'inf', '-inf', 'overflow' or 'largest'.

    `adapter`, `target` and `tensor` are indices (taken modulo the number there is).
    """

    value: str = "nan"
    adapter: int = 0
    target: int = 0
    tensor: int = 0
    element: int = 0


@dataclass(frozen=True)
class Case:
    """A fully determined experiment on a sweep.

    `values` seeds every tensor; `profile` names their distribution (`values.PROFILES`); `batch` is the leading
    shape of each layer's input; `safe` asks for safe merges; `joint` merges several adapters in one call;
    `cycles` counts the merges and unmerges of a drift; `extra` holds what single laws need (weights, sequences).
    """

    sweep: Sweep
    seed: int
    index: int
    layers: tuple[LayerSpec, ...]
    adapters: tuple[AdapterSpec, ...]
    adapter_dtype: str
    profile: str
    values: int = 0
    batch: tuple[int, ...] = (2,)
    safe: bool = False
    joint: bool = True
    cycles: int = 3
    train: bool = False
    poison: Poison = field(default_factory=Poison)
    extra: tuple[tuple[str, Any], ...] = ()

    def setting(self, name: str, default: Any = None) -> Any:
        """Return an entry of `extra`, or `default`."""
        return dict(self.extra).get(name, default)

    @property
    def whole(self) -> bool:
        """Whether the layers are those of a whole model, which runs them one after the other."""
        return self.sweep.layer in MODELS

    def words(self) -> str:
        """Say in words what the case is, in one line."""
        layers = self.sweep.layer if self.whole else "; ".join(spec.words() for spec in self.layers)
        adapters = "; ".join(
            f"'{a.name}' on {', '.join(self.layers[t].name for t in a.targets)} (rank {a.rank}, alpha {a.alpha:g}"
            + "".join(f", {key} {value}" for key, value in a.options)
            + ")"
            for a in self.adapters
        )
        dtype = self.sweep.dtype + ("" if self.adapter_dtype == self.sweep.dtype else f", adapter {self.adapter_dtype}")
        extra = "".join(f", {key} {value}" for key, value in self.extra)
        return (
            f"{self.sweep.variant} on [{layers}], {dtype}, values '{self.profile}' ({self.values}){extra}: {adapters}"
        )


def to_plain(value: Any) -> Any:
    """Return a case (or a part of one) as JSON data, defaults left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for f in fields(value):
            item = getattr(value, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if item != default:
                plain[f.name] = to_plain(item)
        return plain
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def encode(case: Case, law: str) -> str:
    """Return the token of a case and a law: text that `decode` turns back, on any machine."""
    return tokens.pack(law, _text(case))


_TEXTS: OrderedDict[int, tuple[Case, str]] = OrderedDict()  # by id: 1, 1.0 and True compare equal and are written apart
_KEPT = 32  # cases of which the text is kept: many laws ask for tokens of a few


def _text(case: Case) -> str:
    found = _TEXTS.get(id(case))
    if found is None:
        found = _TEXTS[id(case)] = case, json.dumps(to_plain(case), separators=(",", ":"), sort_keys=True)
        if len(_TEXTS) > _KEPT:
            _TEXTS.popitem(last=False)
    return found[1]


def decode(token: str) -> tuple[Case, str]:
    """Return the case and the law of a token; raises UsageError if it is none."""
    text = tokens.unpack(token)
    try:
        law, plain = json.loads(text)
        case = _case(plain)
        known = case.sweep.dtype in DTYPES and case.adapter_dtype in DTYPES and isinstance(law, str)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise tokens.broken(error) from error
    if not known:
        raise UsageError("broken token: unknown dtype or law; was it made by a newer peftcheck?")
    return case, law


def _case(plain: dict[str, Any]) -> Case:
    data = dict(plain)
    return Case(
        **{
            **{key: _tuples(value) for key, value in data.items()},
            "sweep": Sweep(**data["sweep"]),
            "layers": tuple(LayerSpec(**{k: _tuples(v) for k, v in spec.items()}) for spec in data["layers"]),
            "adapters": tuple(AdapterSpec(**{k: _tuples(v) for k, v in spec.items()}) for spec in data["adapters"]),
            "poison": Poison(**data.get("poison", {})),
        }
    )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
