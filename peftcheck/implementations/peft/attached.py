"""A model with PEFT adapters behind the port."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import IA3Model, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from peftcheck.case import AdapterSpec
from peftcheck.quantizers import Quantizer

Add = Callable[[PeftModel, AdapterSpec], None]
Own = Callable[[BaseTunerLayer, str], Iterator[tuple[str, Tensor]]]
Run = Callable[[PeftModel, Sequence[Tensor]], Sequence[Tensor]]


class PeftAttached:
    """The port onto a `PeftModel`. Storage is read through module attributes, never through PEFT's merge code."""

    def __init__(
        self,
        model: PeftModel,
        names: Sequence[str],
        roles: Mapping[str, str],
        add: Add,
        autocast: bool,
        quantizer: Quantizer | None = None,
        run: Run = lambda model, inputs: model(*inputs),
        whole: bool = False,
        own: Own | None = None,
    ) -> None:
        self.model = model
        self.names = tuple(names)
        self.roles = roles
        self._add = add
        self.autocast = autocast
        self.quantizer = quantizer
        self.run = run
        self.whole = whole
        self._own = own or (lambda module, adapter: _own(module, adapter, roles))

    # accessors

    def roots(self) -> Sequence[object]:
        return (self.model,)

    @property
    def bench(self) -> nn.Module:
        """The user's model inside PEFT's wrappers."""
        return self.model.base_model.model

    def layer(self, name: str) -> nn.Module:
        module = self.bench
        try:  # what `get_submodule` does at the end of three look-ups for each part of the name: this is asked all the time
            for part in name.split("."):
                module = module._modules[part]
        except KeyError:  # a wrapper that hands on what it has not itself
            return self.bench.get_submodule(name)
        return module

    def _tuner_layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        for name in self.names:
            module = self.layer(name)
            while isinstance(module, BaseTunerLayer):  # layers of several methods wrap each other
                yield name, module
                module = module.base_layer

    def _inner_layers(self) -> Iterator[tuple[str, str, BaseTunerLayer]]:
        """Yield the tuner layers as above and those within them, with what begins the roles of their tensors.

        Within are the output projections of attention layers, which are adapted along with the layer.
        """
        for name, module in self._tuner_layers():
            yield name, "", module
            inner = getattr(module.base_layer, "out_proj", None)
            if isinstance(inner, BaseTunerLayer):
                yield name, "out.", inner

    def sites(self, adapter: str) -> tuple[str, ...]:
        """Return the layers that hold a tensor of the adapter's own which its closed form names."""
        own: dict[str, list[Hashable]] = {}
        for name, module in self._tuner_layers():
            own.setdefault(name, []).extend(_place(t) for t in self._named(module, adapter))
        # a bank or a projection that layers share hangs on each of them, adapted by this adapter or not
        seen = Counter(pointer for pointers in own.values() for pointer in set(pointers))
        alone = any(seen[pointer] == 1 for pointers in own.values() for pointer in pointers)
        return tuple(name for name, pointers in own.items() if any(seen[p] == 1 or not alone for p in pointers))

    def _named(self, module: BaseTunerLayer, adapter: str) -> Iterator[Tensor]:
        """Yield an adapter's tensors in a layer that the closed form knows: not what was put in their place."""
        return (t for key, t in self._own(module, adapter) if not self.roles or key in self.roles)

    def base_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name in self.names:
            module = self.base_layer(name)
            held = self._held(module) if self.quantizer is None else self.quantizer.tensors(module)
            tensors |= {f"{name}.{key}": tensor for key, tensor in held.items()}
        return tensors

    def _held(self, module: nn.Module) -> dict[str, Tensor]:
        if isinstance(module, nn.MultiheadAttention):
            return _of_attention(module)
        if not self.whole:
            return dict(module.named_parameters())
        # a module of a whole model may hold others, which are named themselves
        return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}

    def base_values(self) -> dict[str, Tensor]:
        tensors = self.base_tensors()
        if self.quantizer is None:
            return tensors
        with torch.no_grad():
            dense = {f"{name}.weight": self.quantizer.values(self.base_layer(name)) for name in self.names}
        return {**{key: t for key, t in tensors.items() if key.rpartition(".")[2] == "bias"}, **dense}

    def base_layer(self, name: str) -> nn.Module:
        module = self.layer(name)
        while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
        return module

    def adapter_tensors(self, adapter: str) -> dict[tuple[str, str], Tensor]:
        own = {
            (name, prefix + self.roles.get(key, key)): tensor
            for name, prefix, module in self._inner_layers()
            for key, tensor in self._own(module, adapter)
        }
        return own | (self._saved(adapter) if self.whole else {})

    def _saved(self, adapter: str) -> dict[tuple[str, str], Tensor]:
        wrappers = ((name, self.layer(name)) for name in self.names)
        copies = (
            (name, m.modules_to_save[adapter])
            for name, m in wrappers
            if isinstance(m, ModulesToSaveWrapper) and adapter in m.modules_to_save
        )
        return {(name, f"saved.{key}"): tensor for name, copy in copies for key, tensor in copy.named_parameters()}

    def trainable(self, adapter: str) -> frozenset[tuple[str, str]]:
        return frozenset(key for key, tensor in self.adapter_tensors(adapter).items() if tensor.requires_grad)

    def merged(self) -> dict[str, tuple[str, ...]]:
        marked: dict[str, tuple[str, ...]] = {}
        for name, module in self._tuner_layers():  # the innermost method comes last, and is merged first
            marked[name] = (*module.merged_adapters, *marked.get(name, ()))
        return marked

    # operations

    def forward(self, inputs: Sequence[Tensor], adapters: Sequence[str] | None = None) -> Sequence[Tensor]:
        if adapters is None:
            return self.run(self.model, inputs)
        return self.model(*inputs, adapter_names=list(adapters))

    def add(self, adapter: AdapterSpec) -> None:
        self._add(self.model, adapter)

    def activate(self, adapters: Sequence[str]) -> None:
        self.model.base_model.set_adapter(list(adapters))

    def merge(self, adapters: Sequence[str] | None = None, safe: bool = False) -> None:
        self.model.merge_adapter(None if adapters is None else list(adapters), safe_merge=safe)

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def disabled(self) -> AbstractContextManager[None]:
        return self.model.disable_adapter()

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def rescale(self, adapter: str, factor: float) -> None:
        for _, _, module in self._inner_layers():
            module.set_scale(adapter, factor)

    def delta(self, site: str, adapter: str) -> Tensor:
        with torch.no_grad():
            change = self.layer(site).get_delta_weight(adapter)
            return change.to_dense() if change.is_sparse else change

    def unload(self) -> nn.Module:
        return self.model.unload()

    def merge_and_unload(self, safe: bool = False, adapters: Sequence[str] | None = None) -> nn.Module:
        return self.model.merge_and_unload(safe_merge=safe, adapter_names=None if adapters is None else list(adapters))

    def adapters(self) -> tuple[str, ...]:
        return tuple(self.model.peft_config)

    def described(self, site: str, adapter: str) -> AdapterSpec:
        config = self.model.peft_config[adapter]
        options = {
            "rslora": bool(getattr(config, "use_rslora", False)),
            "feedforward": bool(getattr(config, "feedforward_modules", None)),
        }
        options |= _blocks(config)
        rank = getattr(config, "r", 1)
        targets = tuple(self.names.index(site) for site in self.sites(adapter))
        alpha = float(getattr(config, "lora_alpha", rank))
        return AdapterSpec(adapter, targets, rank, alpha, tuple(sorted(options.items())))

    def combine(self, adapters: Sequence[str], weights: Sequence[float], kind: str, into: str, **options) -> None:
        if isinstance(self.model.base_model, IA3Model):  # knows one way only, and does not ask for it
            self.model.add_weighted_adapter(list(adapters), list(weights), into, **options)
            return
        self.model.add_weighted_adapter(list(adapters), list(weights), into, combination_type=kind, **options)

    def delete(self, adapter: str) -> None:
        self.model.delete_adapter(adapter)

    def save(self, folder: Path, adapters: Sequence[str]) -> None:
        # the model card (a README) costs ten times what the tensors do, and says nothing of them
        with patch.object(self.model, "create_or_update_model_card", lambda folder: None):
            self.model.save_pretrained(str(folder), selected_adapters=list(adapters))

    def load(self, folder: Path, adapter: str) -> None:
        self.model.load_adapter(str(folder), adapter, autocast_adapter_dtype=self.autocast)


def _place(tensor: Tensor) -> Hashable:
    """Return what only tensors in the same memory have in common: those without elements have nothing."""
    return tensor.data_ptr() or object()


def _blocks(config: Any) -> dict[str, Any]:
    """Return which factor of a LoRA a configuration makes block-diagonal, and of how many blocks; nothing for others."""
    given = getattr(config, "use_bdlora", None)
    return {} if given is None else {"factor": "A" if given.target_modules_bd_a else "B", "blocks": given.nblocks}


def _of_attention(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    """Return an attention layer's tensors: while it is merged PEFT holds the weights as plain attributes."""
    inner = module.out_proj.get_base_layer() if isinstance(module.out_proj, BaseTunerLayer) else module.out_proj
    held = {"in_proj_weight": module.in_proj_weight, "in_proj_bias": module.in_proj_bias}
    held |= {"out_proj.weight": inner.weight, "out_proj.bias": inner.bias}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


@lru_cache(maxsize=512)
def _attributes(names: tuple[str, ...], roles: tuple[str, ...]) -> tuple[str, ...]:
    """Return the attributes that may hold tensors: those that the library names, then those that only the roles do."""
    return tuple(dict.fromkeys((*names, *(role.partition(".")[0] for role in roles))))


def _own(module: BaseTunerLayer, adapter: str, roles: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield an adapter's tensors in a layer as (attribute[.path], tensor), those that only the roles name included."""
    for attribute in _attributes((*module.adapter_layer_names, *module.other_param_names), tuple(roles)):
        container = getattr(module, attribute, None)
        if not hasattr(container, "keys"):  # neither a mapping nor one of torch's or PEFT's containers by name
            continue
        if adapter not in container:
            continue
        item = container[adapter]
        if isinstance(item, Tensor):
            yield attribute, item
        elif isinstance(item, nn.Module):
            for path, tensor in (*item.named_parameters(), *item.named_buffers()):
                yield f"{attribute}.{path}", tensor
