"""X-LoRA in PEFT: its experts are LoRA adapters that were saved before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peftcheck import checkpoint
from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method
from peftcheck.implementations.peft.script import source
from peftcheck.implementations.peft.weighed import WeighedAttached
from peftcheck.spelling import text

_SIZE = 7  # of the classifier's layers


def _config(adapter: AdapterSpec, targets: list[str]) -> XLoraConfig:
    over, top = adapter.option("softmax"), adapter.option("top")
    return XLoraConfig(
        hidden_size=1,  # of the model: see _before
        adapters={str(expert): "" for expert in range(adapter.option("experts"))},
        enable_softmax=over == "all",
        enable_softmax_topk=over == "top",
        softmax_temperature=adapter.option("temperature"),
        layerwise_scalings=adapter.option("layerwise"),
        top_k_lora=top,
        xlora_depth=adapter.option("depth"),
        xlora_size=_SIZE,
        xlora_dropout_p=0.0,
        global_scaling_weight=adapter.option("weight"),
    )


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Have no more experts kept than there are, and a softmax over those kept only where some are not."""
    own = dict(adapter.options)
    top = own["top"] if own["softmax"] != "all" or own["top"] else None
    if own["softmax"] == "top":
        top = top or 1
    return replace(adapter, options=tuple(sorted({**own, "top": min(top, own["experts"]) if top else None}.items())))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """X-LoRA weighs its experts by the input: no weight holds that, and a merge must be refused.

    A model has one classifier: none is added to it (test_whole_methods.py shows how that ends).
    """
    if op in MERGES:
        return Claim.REFUSES
    return Claim.ABSENT if op in (Op.ADD, Op.RESCALE, Op.COMBINE) else Claim.YES


def _before(model: nn.Module, config: XLoraConfig, adapter: str, case: Case) -> None:
    """Do what the documentation asks for: no cache, the model's width; and save the experts, where it will find them."""
    if not hasattr(model, "config"):
        return
    model.config.use_cache = False
    config.hidden_size = model.config.hidden_size
    own = next((one for one in case.adapters if one.name == adapter), case.adapters[0])
    folder = checkpoint.temporary(model)
    targets = [case.layers[target] for target in own.targets]
    for expert in config.adapters:
        path = f"{folder}/{expert}"
        LoraConfig(
            r=own.rank, lora_alpha=own.alpha, target_modules=[spec.name for spec in targets], task_type=config.task_type
        ).save_pretrained(path)
        tensors = {}
        for spec in targets:
            prefix = f"base_model.model.{spec.name}"
            # of the size of what training leaves: larger ones would drive an attention to where it has no gradient
            tensors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(own.rank, spec.n_in)
            tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(spec.n_out, own.rank)
        save_file(tensors, f"{path}/adapter_model.safetensors")
        config.adapters[expert] = path


def _scripted(case: Case, config: XLoraConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the imports and the lines that do the same in a script."""
    own = case.adapters[0]
    targets = [case.layers[target].name for target in own.targets]
    paths = {expert: f"experts/{expert}" for expert in config.adapters}
    given = replace(config, hidden_size=case.setting("hidden"), adapters=paths)
    half = case.sweep.dtype in ("bfloat16", "float16") and case.adapter_dtype == case.sweep.dtype
    imports = ("from copy import deepcopy", "from peft import LoraConfig, XLoraConfig, get_peft_model")
    lines = (
        "model.config.use_cache = False",
        f"lora = LoraConfig(r={own.rank}, lora_alpha={own.alpha}, target_modules={targets!r})",
        f"for expert in {list(paths)!r}:",
        '    get_peft_model(deepcopy(model), deepcopy(lora)).save_pretrained("experts/" + expert)',
        f"model = get_peft_model(model, {source(given)}, {text(own.name)}{', autocast_adapter_dtype=False' if half else ''})",
    )
    return imports, lines


def _attach(model: nn.Module, config: Any, adapter: AdapterSpec, autocast: bool, mixed: bool) -> PeftModel:
    return get_peft_model(model, config, adapter.name, autocast_adapter_dtype=autocast)


METHODS = (
    Method(
        Variant(
            "xlora",
            "xlora",
            frozenset(),
            options={
                "experts": (2, 3),
                "depth": (1, 1, 2, 3),
                "layerwise": (False, True),
                "softmax": ("all", "all", "top", "none"),
                "temperature": (1.0, 0.5, 2.0),
                "top": (None, None, 1, 2),
                "weight": (1.0, 1.7),
            },
            fit=fit,
            claim=claim,
            within=frozenset({"linear"}),
            unasked=frozenset({"model.bert", "model.gpt2", "model.vit", "model.resnet"}),
            most_adapters=1,
            keeps=lambda adapter: frozenset(f"{f}.{e}" for f in "AB" for e in range(adapter.option("experts"))),
        ),
        _config,
        before=_before,
        attach=_attach,
        scripted=_scripted,
        port=WeighedAttached,
    ),
)
