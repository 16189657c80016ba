"""A model with PEFT's X-LoRA behind the port: LoRA layers whose adapters are the experts, and one classifier for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from peft import XLoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from peftcheck.implementations.peft.attached import PeftAttached


class WeighedAttached(PeftAttached):
    """The same port; an adapter's tensors on a layer are its experts' factors there, and the classifier's."""

    def sites(self, adapter: str) -> tuple[str, ...]:
        if not isinstance(self.model.peft_config.get(adapter), XLoraConfig):  # the experts are listed there too
            return ()
        return tuple(name for name, module in self._tuner_layers() if isinstance(module, LoraLayer) and module.lora_A)

    def adapter_tensors(self, adapter: str) -> dict[tuple[str, str], Tensor]:
        classifier = dict(self._classifier())
        return {
            (name, role): tensor
            for name in self.sites(adapter)
            for role, tensor in (*_factors(self.layer(name)), *classifier.items())
        }

    def activate(self, adapters: Sequence[str]) -> None:
        (adapter,) = adapters
        self.model.set_adapter(adapter)

    def save(self, folder: Path, adapters: Sequence[str]) -> None:
        with patch.object(self.model, "create_or_update_model_card", lambda folder: None):
            self.model.save_pretrained(str(folder))  # the experts are saved with what weighs them

    def _classifier(self) -> Iterator[tuple[str, Tensor]]:
        layers = (one for one in self.model.base_model.internal_xlora_classifier.layers if isinstance(one, nn.Linear))
        for number, layer in enumerate(layers):
            yield f"classifier.{number}.weight", layer.weight
            yield f"classifier.{number}.bias", layer.bias


def _factors(layer: LoraLayer) -> Iterator[tuple[str, Tensor]]:
    for expert in layer.lora_A:
        yield f"A.{expert}", layer.lora_A[expert].weight
        yield f"B.{expert}", layer.lora_B[expert].weight
