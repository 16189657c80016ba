"""An implementation of the port by forward hooks: nothing is wrapped, and nothing is ever merged.

The model keeps its modules and its state dict; adapters are plain tensors beside it. Every operation that such a
library lacks is claimed ABSENT, so that only what remains is checked: the forward pass, disabling, unloading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, AdapterSpec, Case, LayerSpec
from peftcheck.errors import UsageError
from peftcheck.implementation import Absent, Claim, Op, Variant
from peftcheck.implementations.reference import layers as shapes
from peftcheck.rounding import DTYPES

_HAS = frozenset({Op.ATTACH, Op.ADD, Op.FORWARD, Op.DISABLED, Op.UNLOAD, Op.DELETE})
_PLAIN = frozenset({"linear", "conv1d-transformers", *CONVOLUTIONS})


@dataclass(frozen=True)
class Low:
    """LoRA on one layer, its scale included."""

    tensors: dict[str, Tensor]
    scale: float

    def before(self, layer: nn.Module, g: shapes.Geometry, x: Tensor) -> Tensor:
        """Leave the input alone."""
        return x

    def after(self, layer: nn.Module, g: shapes.Geometry, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A x."""
        a, b = self.tensors["A"], self.tensors["B"]
        if g.kind == "embedding":
            change = self.scale * (nn.functional.embedding(x, a.t()) @ b.t())
            return y + (change if g.factor is None else change * g.factor.to(layer.weight.dtype))
        if g.kind == "convolution":
            return y + self.scale * shapes.mix_channels(layer, shapes.convolve(layer, x.to(a.dtype), a), b)
        return y + self.scale * nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b)


@dataclass(frozen=True)
class Gate:
    """(IA)^3 on one layer, on its inputs or on its outputs."""

    tensors: dict[str, Tensor]
    feedforward: bool
    dropout: float = 0.0

    def gate(self, training: bool) -> Tensor:
        """Return l; in training, dropout lets some channels pass as they are."""
        gate = self.tensors["scale"]
        return 1 + nn.functional.dropout(gate - 1, self.dropout) if self.dropout and training else gate

    def before(self, layer: nn.Module, g: shapes.Geometry, x: Tensor) -> Tensor:
        """Return l * x in feed-forward layers."""
        return x * shapes.per_input(g, self.gate(layer.training)) if self.feedforward else x

    def after(self, layer: nn.Module, g: shapes.Geometry, x: Tensor, y: Tensor) -> Tensor:
        """Return l * y in all others."""
        return y if self.feedforward else y * shapes.per_output(g, self.gate(layer.training))


def _low(site: str, layer: nn.Module, adapter: AdapterSpec, dtype: torch.dtype) -> Low:
    g = shapes.geometry(site, layer)
    if adapter.rank % g.groups:
        raise ValueError(f"LoRA on '{site}': rank {adapter.rank} is not a multiple of {g.groups} groups")
    a = torch.randn(adapter.rank, g.n_in, *g.kernel, dtype=dtype) / g.n_in**0.5
    b = torch.zeros(g.n_out, adapter.rank // g.groups, *(1,) * len(g.kernel), dtype=dtype)
    return Low({"A": a.requires_grad_(), "B": b.requires_grad_()}, adapter.alpha / adapter.rank)


def _gate(site: str, layer: nn.Module, adapter: AdapterSpec, dtype: torch.dtype) -> Gate:
    g, feedforward = shapes.geometry(site, layer), bool(adapter.option("feedforward"))
    if feedforward and g.kind == "embedding":
        raise TypeError(f"(IA)^3 on '{site}': the input of an embedding has no features to scale")
    return Gate(
        {"scale": torch.ones(g.n_in if feedforward else g.n_out, dtype=dtype, requires_grad=True)},
        feedforward,
        float(adapter.option("dropout", 0.0)),
    )


class Hooked:
    """A model with hooks on its adapted layers, behind the port."""

    def __init__(self, model: nn.Module, names: Sequence[str], make, dtype: torch.dtype) -> None:
        self.model = model
        self.names = tuple(names)
        self.make = make
        self.dtype = dtype
        self.adapters: dict[str, dict[str, Low | Gate]] = {}
        self.active: list[str] = []
        self.enabled = True
        self.handles: dict[str, list] = {}
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def roots(self) -> Sequence[object]:
        return (self.model, self)

    def sites(self, adapter: str) -> tuple[str, ...]:
        return tuple(self.adapters.get(adapter, {}))

    def layer(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def base_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": p for name in self.names for key, p in self.layer(name).named_parameters()}

    def base_values(self) -> dict[str, Tensor]:
        return self.base_tensors()

    def adapter_tensors(self, adapter: str) -> dict[tuple[str, str], Tensor]:
        own = self.adapters.get(adapter, {})
        return {(site, role): tensor for site, method in own.items() for role, tensor in method.tensors.items()}

    def trainable(self, adapter: str) -> frozenset[tuple[str, str]]:
        return frozenset(self.adapter_tensors(adapter))

    def merged(self) -> dict[str, tuple[str, ...]]:
        return {}

    def add(self, adapter: AdapterSpec) -> None:
        """Add an adapter, inactive; every target is checked before the first hook is set."""
        if adapter.name in self.adapters:
            raise ValueError(f"there is an adapter '{adapter.name}' already")
        sites = [self.names[target] for target in adapter.targets]
        made = {site: self.make(site, self.layer(site), adapter, self.dtype) for site in sites}
        for parameter, _ in self.trained:
            parameter.requires_grad_(False)
        self.adapters[adapter.name] = made
        for site in made.keys() - self.handles.keys():
            layer = self.layer(site)
            self.handles[site] = [
                layer.register_forward_pre_hook(partial(self._before, site)),
                layer.register_forward_hook(partial(self._after, site)),
            ]

    def _live(self, site: str) -> list[Low | Gate]:
        own = [self.adapters[name] for name in self.active] if self.enabled else []
        return [methods[site] for methods in own if site in methods]

    def _before(self, site: str, layer: nn.Module, args: tuple) -> tuple | None:
        g, live = shapes.geometry(site, layer), self._live(site)
        x = args[0]
        for method in live:
            x = method.before(layer, g, x)
        return None if x is args[0] else (x.to(layer.weight.dtype),)

    def _after(self, site: str, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        g, live = shapes.geometry(site, layer), self._live(site)
        y = output
        for method in live:
            y = method.after(layer, g, args[0], y)
        return y.to(output.dtype)

    def activate(self, adapters: Sequence[str]) -> None:
        for name in adapters:
            if name not in self.adapters:
                raise ValueError(f"there is no adapter '{name}'")
        self.active = list(adapters)

    def forward(self, inputs: Sequence[Tensor], adapters: Sequence[str] | None = None) -> Sequence[Tensor]:
        if adapters is not None:
            raise Absent("no mixed batches")
        return self.model(*inputs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def delete(self, adapter: str) -> None:
        self.adapters.pop(adapter)
        self.active = [name for name in self.active if name != adapter]

    def unload(self) -> nn.Module:
        """Take the hooks away and return the model."""
        for handles in self.handles.values():
            for handle in handles:
                handle.remove()
        self.handles.clear()
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)
        return self.model

    def merge(self, adapters: Sequence[str] | None = None, safe: bool = False) -> None:
        raise Absent("hooks do not merge")

    def unmerge(self) -> None:
        raise Absent("hooks do not merge")

    def merge_and_unload(self, safe: bool = False, adapters: Sequence[str] | None = None) -> nn.Module:
        raise Absent("hooks do not merge")

    def delta(self, site: str, adapter: str) -> Tensor:
        raise Absent("hooks report no delta")

    def rescale(self, adapter: str, factor: float) -> None:
        raise Absent("the scale is fixed")

    def combine(self, adapters: Sequence[str], weights: Sequence[float], kind: str, into: str, **options) -> None:
        raise Absent("hooks do not combine")

    def save(self, folder: Path, adapters: Sequence[str]) -> None:
        raise Absent("nothing is stored")

    def load(self, folder: Path, adapter: str) -> None:
        raise Absent("nothing is stored")


def _claims(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    return Claim.YES if op in _HAS else Claim.ABSENT


def _whole_groups(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Make the rank a multiple of every target's groups, and keep alpha / rank."""
    rank = adapter.rank
    while any(rank % layers[target].groups for target in adapter.targets):
        rank += 1
    return AdapterSpec(adapter.name, adapter.targets, rank, adapter.alpha * rank / adapter.rank, adapter.options)


def _gates(name: str, kinds: frozenset[str], feedforward: bool) -> Variant:
    return Variant(
        name,
        "ia3",
        kinds,
        options={"feedforward": (feedforward,), "dropout": (0.0, 0.1, 0.5, 0.9)},
        claim=_claims,
        source="Liu et al., 2022",
    )


METHODS = {
    "lora": (
        Variant(
            "lora",
            "lora",
            _PLAIN | set(EMBEDDINGS),
            fit=_whole_groups,
            claim=_claims,
            source="Hu et al., 2021",
        ),
        _low,
    ),
    "ia3": (_gates("ia3", _PLAIN | set(EMBEDDINGS), False), _gate),
    "ia3.feedforward": (_gates("ia3.feedforward", _PLAIN, True), _gate),
}


class Hooks:
    """The implementation by hooks; loads as `peftcheck.implementations.hooks:Hooks`."""

    name = "hooks"
    version = "1"
    folders = (Path(__file__), Path(shapes.__file__))
    ledger = None

    def variants(self) -> Mapping[str, Variant]:
        return {name: variant for name, (variant, _) in METHODS.items()}

    def attach(self, model: nn.Module, case: Case) -> Hooked:
        """Attach the case's adapters, all of them active, in order; raises UsageError for an unknown variant."""
        if case.sweep.variant not in METHODS:
            raise UsageError(f"hooks has no variant '{case.sweep.variant}': choose from {', '.join(METHODS)}")
        _, make = METHODS[case.sweep.variant]
        attached = Hooked(model, [spec.name for spec in case.layers], make, DTYPES[case.adapter_dtype])
        for adapter in case.adapters:
            attached.add(adapter)
        attached.activate([adapter.name for adapter in case.adapters])
        return attached
