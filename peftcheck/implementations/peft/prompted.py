"""A model with PEFT's adaption prompts behind the port: they wrap attention modules, and one adapter at a time is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
from torch import Tensor, nn

from peftcheck.implementations.peft.attached import PeftAttached

_ROLES = {"prompt": "adaption_prompt", "gate": "adaption_gate"}


class PromptedAttached(PeftAttached):
    """The same port onto attention modules in a wrapper of their own kind, which hides what they hold."""

    def layer(self, name: str) -> nn.Module:
        module = self.bench
        for part in name.split("."):
            module = _inside(module)._modules[part]
        return module

    def base_layer(self, name: str) -> nn.Module:
        return _inside(self.layer(name))

    def sites(self, adapter: str) -> tuple[str, ...]:
        return tuple(name for name, _ in self._wrappers(adapter))

    def adapter_tensors(self, adapter: str) -> dict[tuple[str, str], Tensor]:
        wrappers = tuple(self._wrappers(adapter))
        return {(name, role): getattr(one, attribute) for name, one in wrappers for role, attribute in _ROLES.items()}

    def merged(self) -> dict[str, tuple[str, ...]]:
        return {}  # there is nothing to merge with

    def activate(self, adapters: Sequence[str]) -> None:
        (adapter,) = adapters
        self.model.set_adapter(adapter)

    def _wrappers(self, adapter: str) -> Iterator[tuple[str, nn.Module]]:
        """Yield the adapter's wrappers with the names of the modules that they are for, out of the model or in it."""
        tuner = self.model.base_model
        if adapter not in tuner.peft_config:
            return
        names = {id(module): name for name, module in self.bench.named_modules()}
        target, kept = tuner.peft_config[adapter].target_modules, tuner._cached_adapters.get(adapter)
        for place, parent in enumerate(tuner._parents[adapter]):
            yield f"{names[id(parent)]}.{target}", kept[place] if kept else parent._modules[target]


def _inside(module: nn.Module) -> nn.Module:
    return module.model if isinstance(module, _BaseAdaptedAttention) else module
