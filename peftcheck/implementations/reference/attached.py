"""A model whose adapted layers are wrapped, behind the port."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from peftcheck.case import AdapterSpec
from peftcheck.implementation import BASE
from peftcheck.implementations.reference import checkpoint
from peftcheck.implementations.reference.combine import combined
from peftcheck.implementations.reference.lora import LowRank
from peftcheck.implementations.reference.wrapper import Wrapper

Make = Callable[[str, nn.Module, AdapterSpec, torch.dtype], nn.Module]


class ReferenceAttached:
    """Wrap layers in place: `model` is the user's own, and stays the one to call.

    `names` are the pristine names of the layers, to which the targets of an adapter refer; `others` those of modules
    that hold tensors besides. `make` builds an adapter for a layer, in `dtype`. The base is frozen while adapters are
    attached.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], make: Make, dtype: torch.dtype, others: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.names = tuple(names)
        self.others = tuple(others)
        self.make = make
        self.dtype = dtype
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    # accessors: storage is read here, never through merge or delta

    def roots(self) -> Sequence[object]:
        return (self.model,)

    def layer(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def _wrappers(self) -> Iterator[tuple[str, Wrapper]]:
        for name in self.names:
            module = self.layer(name)
            if isinstance(module, Wrapper):
                yield name, module

    def sites(self, adapter: str) -> tuple[str, ...]:
        return tuple(name for name, wrapper in self._wrappers() if adapter in wrapper)

    def base_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name in self.names:
            module = self.layer(name)
            layer = module.layer if isinstance(module, Wrapper) else module
            tensors.update({f"{name}.{key}": parameter for key, parameter in layer.named_parameters()})
        for name in self.others:
            module = self.layer(name)
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            tensors.update({f"{name}.{key}": tensor for key, tensor in own})
        return tensors

    def base_values(self) -> dict[str, Tensor]:
        return self.base_tensors()

    def adapter_tensors(self, adapter: str) -> dict[tuple[str, str], Tensor]:
        return {
            (name, wrapper[adapter].roles[key]): parameter
            for name, wrapper in self._wrappers()
            if adapter in wrapper
            for key, parameter in wrapper[adapter].named_parameters()
        }

    def trainable(self, adapter: str) -> frozenset[tuple[str, str]]:
        return frozenset(key for key, tensor in self.adapter_tensors(adapter).items() if tensor.requires_grad)

    def merged(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(wrapper.merged) for name, wrapper in self._wrappers()}

    def adapters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, wrapper in self._wrappers() for name in wrapper.names()))

    def described(self, site: str, adapter: str) -> AdapterSpec:
        """Return the rank and, as alpha / rank, the scale in force: that of a combination follows from no option."""
        own = self.layer(site)[adapter]
        return AdapterSpec(adapter, (self.names.index(site),), own.rank, own.factor * own.scale * own.rank)

    # adapters

    def add(self, adapter: AdapterSpec) -> None:
        """Add an adapter to its targets, inactive; every target is checked before the first is wrapped."""
        self._fresh(adapter.name)
        sites = [self.names[target] for target in adapter.targets]
        made = {site: self._made(site, adapter) for site in sites}
        self._install(made)

    def _fresh(self, name: str) -> None:
        if not name or not name.isprintable() or any(sign in name for sign in "./\\"):
            raise ValueError(
                f"'{name}' cannot name an adapter: it becomes a module and a folder, so no '.', '/' or '\\'"
            )
        if self.sites(name):
            raise ValueError(f"there is an adapter '{name}' already")

    def _bare(self, site: str) -> nn.Module:
        module = self.layer(site)
        return module.layer if isinstance(module, Wrapper) else module

    def _made(self, site: str, adapter: AdapterSpec) -> nn.Module:
        layer = self._bare(site)
        made = self.make(site, layer, adapter, self.dtype)
        for other, wrapper in self._wrappers():
            if other != site and wrapper.layer.weight is layer.weight:
                raise ValueError(f"'{site}' and '{other}' share one weight: adapt one of them")
        return made

    def _install(self, made: dict[str, nn.Module]) -> None:
        for parameter, _ in self.trained:
            parameter.requires_grad_(False)
        for site, adapter in made.items():
            if not isinstance(self.layer(site), Wrapper):
                self.model.set_submodule(site, Wrapper(site, self.layer(site)))
            self.layer(site).put(adapter)

    def activate(self, adapters: Sequence[str]) -> None:
        self._known(adapters)
        self._refuse_merged("activate other adapters")
        for _, wrapper in self._wrappers():
            wrapper.active = [name for name in adapters if name in wrapper]

    def _known(self, adapters: Sequence[str]) -> None:
        for name in adapters:
            if not self.sites(name):
                raise ValueError(f"there is no adapter '{name}'")

    def _refuse_merged(self, what: str, adapter: str | None = None) -> None:
        for name, wrapper in self._wrappers():
            if wrapper.merged and (adapter is None or adapter in wrapper.merged):
                raise ValueError(f"cannot {what} while '{wrapper.merged[-1]}' is merged into '{name}': unmerge first")

    def rescale(self, adapter: str, factor: float) -> None:
        self._known([adapter])
        self._refuse_merged(f"rescale '{adapter}'", adapter)
        for _, wrapper in self._wrappers():
            if adapter in wrapper:
                wrapper[adapter].rescale(factor)

    def delete(self, adapter: str) -> None:
        self._known([adapter])
        self._refuse_merged(f"delete '{adapter}'", adapter)
        for _, wrapper in self._wrappers():
            wrapper.take(adapter)

    # merging

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # weights are stored: they are no activations
    def merge(self, adapters: Sequence[str] | None = None, safe: bool = False) -> None:
        """Merge the given (else the active) adapters, in order, where they are and are not merged yet.

        All or nothing over the model: every layer is computed, and if `safe` checked, before the first is written.
        """
        if adapters is not None:
            self._known(adapters)
        if not all(wrapper.enabled for _, wrapper in self._wrappers()):
            raise ValueError("cannot merge while adapters are disabled: enable them first")
        plan = []
        for _, wrapper in self._wrappers():
            names = wrapper.active if adapters is None else dict.fromkeys(adapters)
            wanted = [name for name in names if name in wrapper and name not in wrapper.merged]
            if wanted:
                plan.append((wrapper, wanted, wrapper.merging(wanted, safe)))
        for wrapper, wanted, tensors in plan:
            wrapper.write(tensors)
            wrapper.merged.extend(wanted)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # weights are stored: they are no activations
    def unmerge(self) -> None:
        """Undo every merge, in reverse order; nothing is written unless all of it can be undone."""
        plan = [(wrapper, wrapper.unmerging()) for _, wrapper in self._wrappers() if wrapper.merged]
        for wrapper, tensors in plan:
            wrapper.write(tensors)
            wrapper.merged.clear()

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # weights are stored: they are no activations
    def delta(self, site: str, adapter: str) -> Tensor:
        wrapper = self.layer(site)
        if not isinstance(wrapper, Wrapper) or adapter not in wrapper:
            raise ValueError(f"there is no adapter '{adapter}' on '{site}'")
        return wrapper[adapter].delta(wrapper.layer)["weight"]

    # running

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def forward(self, inputs: Sequence[Tensor], adapters: Sequence[str] | None = None) -> Sequence[Tensor]:
        if adapters is None:
            return self.model(*inputs)
        self._known(set(adapters) - {BASE})
        self._refuse_merged("run a mixed batch")
        for site, wrapper in self._wrappers():
            if any(not getattr(wrapper[name], "mixes", True) for name in wrapper.names()):
                raise ValueError(f"'{site}' has an adapter that cannot share a batch with others")
        rows = {name: [row for row, own in enumerate(adapters) if own == name] for name in dict.fromkeys(adapters)}
        if any(x.dim() < 1 or x.shape[0] != len(adapters) for x in inputs):
            raise ValueError(f"a mixed batch needs one adapter per row: {len(adapters)} were given")
        active = {name: wrapper.active for name, wrapper in self._wrappers()}
        order = torch.argsort(torch.tensor([row for own in rows.values() for row in own]))
        parts = []
        try:
            for name, own in rows.items():
                self.activate([] if name == BASE else [name])
                parts.append(self.model(*(x[own] for x in inputs)))
        finally:
            for name, wrapper in self._wrappers():
                wrapper.active = active[name]
        return tuple(torch.cat(outputs)[order] for outputs in zip(*parts, strict=True))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Give the base back for a while: what is merged is unmerged on the way in and merged again on the way out.

        Meanwhile nothing can be merged; what is deleted meanwhile stays away.
        """
        merged = self.merged()
        self.unmerge()
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                for name, wrapper in self._wrappers():
                    again = [adapter for adapter in merged.get(name, ()) if adapter in wrapper]
                    wrapper.write(wrapper.merging(again, safe=False))
                    wrapper.merged.extend(again)

    def _enable(self, enabled: bool) -> None:
        for _, wrapper in self._wrappers():
            wrapper.enabled = enabled

    # leaving

    def unload(self) -> nn.Module:
        """Take the wrappers away and return the base as it was before anything was attached."""
        self.unmerge()
        return self._unwrapped()

    def merge_and_unload(self, safe: bool = False, adapters: Sequence[str] | None = None) -> nn.Module:
        """Merge for good and take the wrappers away; a refused merge leaves everything in place."""
        self.merge(adapters, safe)
        return self._unwrapped()

    def _unwrapped(self) -> nn.Module:
        for name, wrapper in list(self._wrappers()):
            self.model.set_submodule(name, wrapper.layer)
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)
        return self.model

    # combining and storing

    @torch.no_grad()
    def combine(self, adapters: Sequence[str], weights: Sequence[float], kind: str, into: str, **options) -> None:
        """Add, inactive, the weighted combination of adapters: 'cat', 'linear' (both exact) or 'svd'."""
        self._known(adapters)
        self._fresh(into)
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights cannot be combined into '{into}'")
        # the rank that an SVD keeps by default is the largest of any member, on layers without it too
        ranks = [
            getattr(wrapper[own], "rank", 0) for _, wrapper in self._wrappers() for own in adapters if own in wrapper
        ]
        rank = options.get("svd_rank") or max(ranks, default=0)
        made = {}
        for name, wrapper in self._wrappers():
            pairs = [(wrapper[own], w) for own, w in zip(adapters, weights, strict=True) if own in wrapper]
            if any(not isinstance(part, LowRank) for part, _ in pairs):
                raise ValueError(f"cannot combine into '{into}': only LoRA adapters add up")
            if pairs:
                parts, own = zip(*pairs, strict=True)
                made[name] = combined(wrapper.layer, parts, own, kind, into, rank)
        self._install(made)

    def save(self, folder: Path, adapters: Sequence[str]) -> None:
        self._known(adapters)
        for adapter in adapters:
            sites = {site: self.layer(site)[adapter].configuration() for site in self.sites(adapter)}
            checkpoint.save(Path(folder), adapter, sites, self.adapter_tensors(adapter))

    @torch.no_grad()
    def load(self, folder: Path, adapter: str) -> None:
        """Add a stored adapter, inactive, under a name of its own choice; refuses one that does not fit the model."""
        self._fresh(adapter)
        stored = checkpoint.load(Path(folder), adapter)
        made = {}
        for site, configuration in stored.sites.items():
            if site not in self.names:
                raise ValueError(f"the stored adapter '{adapter}' needs a layer '{site}', which the model lacks")
            options = tuple((key, value) for key, value in configuration["options"].items())
            spec = AdapterSpec(adapter, (), configuration["rank"], configuration["alpha"], options)
            made[site] = self._made(site, spec)
            made[site].restore(configuration)
            for key, parameter in made[site].named_parameters():
                value = stored.tensors.get((site, made[site].roles[key]))
                if value is None or value.shape != parameter.shape:
                    raise ValueError(
                        f"the stored adapter '{adapter}' does not fit '{site}': {key} is missing or misshapen"
                    )
                parameter.copy_(value)
        self._install(made)
