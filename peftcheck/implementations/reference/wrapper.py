"""The module that stands where an adapted layer stood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Method(Protocol):
    """An adapter on a layer (`LowRank`, `Gate`, ...): an nn.Module with its name, options, forward and merge.

    `bare()` returns the layer's tensors as they are with nothing merged.
    """

    site: str
    name: str
    roles: dict[str, str]

    def around(self, layer, plain, x: Tensor, bare) -> Tensor: ...
    def merge(self, layer, tensors: Tensors, bare) -> Tensors: ...
    def unmerge(self, layer, tensors: Tensors) -> Tensors: ...
    def delta(self, layer) -> Tensors: ...
    def rescale(self, factor: float) -> None: ...
    def configuration(self) -> dict[str, Any]: ...
    def restore(self, configuration: dict[str, Any]) -> None: ...


class Wrapper(nn.Module):
    """Hold a layer and its adapters; run the active ones that are not merged.

    `merged` lists the adapters in the layer's tensors, in the order in which they went in.
    """

    def __init__(self, site: str, layer: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.layer = layer
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self.merged: list[str] = []
        self.enabled = True
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """Return the layer's weight: models read its dtype or its device, whatever stands at the layer's place."""
        return self.layer.weight

    def put(self, adapter: nn.Module) -> None:
        """Take an adapter in. Its key is prefixed: a dictionary of modules forbids names of its own attributes."""
        self.adapters[f"adapter {adapter.name}"] = adapter.train(self.training)

    def take(self, name: str) -> None:
        """Let an adapter go, if it is here."""
        if name in self:
            del self.adapters[f"adapter {name}"]
            self.active = [other for other in self.active if other != name]

    def __contains__(self, name: str) -> bool:
        return f"adapter {name}" in self.adapters

    def __getitem__(self, name: str) -> Method:
        return self.adapters[f"adapter {name}"]

    def names(self) -> Iterator[str]:
        """Yield the names of the adapters here."""
        return (adapter.name for adapter in self.adapters.values())

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer and its adapters; intermediate results keep the wider dtype and are rounded once."""
        live = [name for name in self.active if name not in self.merged] if self.enabled else []
        call = self._plain
        for name in live:
            call = partial(self[name].around, self.layer, call, bare=self.bare)
        return call(x).to(self.layer.weight.dtype) if live else self.layer(x)

    def _plain(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype) if x.is_floating_point() else x)

    def bare(self) -> Tensors:
        """Return the layer's tensors as they are with nothing merged, computed where something is."""
        return {**dict(self.layer.named_parameters()), **self.unmerging()}

    def merging(self, names: Iterable[str], safe: bool) -> Tensors:
        """Return the layer's tensors with `names` merged, in order; write nothing.

        With `safe`, raise ValueError, naming the adapter, where a tensor is not finite in the layer's own dtype: an
        overflow may come of the cast alone.
        """
        tensors, changed = dict(self.layer.named_parameters()), {}
        for name in names:
            step = self[name].merge(self.layer, {**tensors, **changed}, self.bare)
            for key, tensor in step.items():
                if safe and not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"adapter '{name}' makes {self.site}.{key} infinite or NaN: nothing was merged")
            changed.update(step)
        return changed

    def unmerging(self) -> Tensors:
        """Return the layer's tensors without what is merged, undone in reverse order; write nothing."""
        tensors, changed = dict(self.layer.named_parameters()), {}
        for name in reversed(self.merged):
            changed.update(self[name].unmerge(self.layer, {**tensors, **changed}))
        return changed

    def write(self, tensors: Tensors) -> None:
        """Write new values into the tensors that there are: what shares their storage keeps sharing it."""
        for key, tensor in tensors.items():
            getattr(self.layer, key).copy_(tensor)
