"""LoRA-GA in PEFT: a start along the gradient of the base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from peftcheck import values
from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.lora import ROLES, claim, configured
from peftcheck.implementations.peft.methods.lora_inits import BOTH, SINGLE, calibration


def _config(adapter: AdapterSpec, targets: list[str]) -> LoraConfig:
    own = LoraGAConfig(
        direction=adapter.option("direction"), scale=adapter.option("scale"), stable_gamma=adapter.option("gamma")
    )
    return configured(init_lora_weights="lora_ga", lora_ga_config=own)(adapter, targets)


def _gradients(model: nn.Module, config: Any, adapter: str, case: Case) -> None:
    """Give LoRA-GA one step on random data, its loss linear in the outputs.

    PEFT finds no layer to take gradients of where LoRA stands already; what is added there starts as any LoRA does.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        return

    def step() -> None:
        outputs = model(*calibration(case))
        for index, y in enumerate(outputs if isinstance(outputs, tuple) else (outputs[0],)):
            if y.requires_grad:
                (y.double() * values.normal(f"{case.values}|gradient|{index}", tuple(y.shape))).sum().backward()

    preprocess_loraga(model, config, step)


def half_as_wide(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Keep twice the rank within every target's smaller side: A and B start from directions of their own."""
    most = min(min(layers[target].n_in, layers[target].n_out) for target in adapter.targets) // 2
    rank = max(1, min(adapter.rank, most))
    return replace(adapter, rank=rank, alpha=adapter.alpha * rank / adapter.rank if exact else adapter.alpha)


def two_wide(layer: LayerSpec) -> LayerSpec:
    """Make a layer one of at least two inputs and outputs."""
    return replace(layer, n_in=max(2, layer.n_in), n_out=max(2, layer.n_out))


METHODS = (
    Method(
        Variant(
            "lora.ga",
            "lora",
            BOTH,
            like="lora",
            options={
                "direction": ("ArBr", "A2rBr", "ArB2r", "random"),
                "scale": ("stable", "weight_svd", "gd_scale", "unit"),
                "gamma": (16, 4),
                "rslora": (False, True),
            },
            admit=two_wide,
            fit=half_as_wide,
            claim=claim,
            rewrites_base=True,
            most_adapters=1,  # gradients are taken on plain layers, not on PEFT's
            dtypes=SINGLE - {"float16"},
        ),
        _config,
        ROLES,
        before=_gradients,
    ),
)
