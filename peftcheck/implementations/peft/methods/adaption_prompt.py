"""Adaption prompts (LLaMA-Adapter) in PEFT."""

from __future__ import annotations

from dataclasses import replace

from peft import AdaptionPromptConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method
from peftcheck.implementations.peft.prompted import PromptedAttached

_KIND = "attention.llama"


def _config(adapter: AdapterSpec, targets: list[str]) -> AdaptionPromptConfig:
    return AdaptionPromptConfig(adapter_len=adapter.rank, adapter_layers=len(targets))


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Have the adapter in the last blocks, as many as are asked for and there are; `rank` is the prompt's length."""
    own = [index for index, spec in enumerate(layers) if spec.kind == _KIND]
    return replace(adapter, targets=tuple(own[-adapter.option("blocks") :]) or adapter.targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """AdaptionPromptModel is no tuner of layers: it has nothing to merge with, unload, rescale or combine."""
    return Claim.ABSENT if op in MERGES | {Op.UNLOAD, Op.RESCALE, Op.COMBINE} else Claim.YES


METHODS = (
    Method(
        Variant(
            "adaption_prompt",
            "adaption_prompt",
            frozenset(),
            within=frozenset({_KIND}),
            options={"blocks": (1, 2, 11)},
            fit=fit,
            claim=claim,
            unasked=frozenset({"model.gpt2"}),
            most_adapters=1,
        ),
        _config,
        layer=(
            "def layer(name):  # attends causally, from position 0",
            "    def run(x):",
            "        hidden = torch.full((x.shape[1],) * 2, torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)",
            "        turned = model.base_model.model.model.rotary_emb(x, torch.arange(x.shape[1])[None])",
            '        module = model.get_submodule("base_model.model." + name)',
            "        return module(hidden_states=x, position_embeddings=turned, attention_mask=hidden[None, None])[0]",
            "    return run",
        ),
        port=PromptedAttached,
    ),
)
