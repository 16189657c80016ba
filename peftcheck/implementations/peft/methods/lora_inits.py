"""LoRA in PEFT with starts other than the default one.

A start changes values, not arithmetic, so most of them are asked on few layer kinds. Those that cut their start out
of the base change the base by design (`rewrites_base`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peft import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from peftcheck import models, values
from peftcheck.case import EMBEDDINGS, AdapterSpec, Case, LayerSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.combinations import STARTS
from peftcheck.implementations.peft.methods.lora import LAYERS, ROLES, claim, configured, no_wider
from peftcheck.rounding import DTYPES
from peftcheck.spelling import text

_SAMPLES = 32
BOTH = frozenset({"linear", "conv1d-transformers"})
SINGLE = frozenset({"float32", "bfloat16", "float16"})  # "under float32, float16, or bfloat16"
_IGNORED = frozenset(EMBEDDINGS)  # where PEFT passes over the start's name, and the adapter is any LoRA's


def calibration(case: Case) -> list[Tensor]:
    """Return data for starts that look at activations: per layer (samples, features), in the base's dtype.

    Layers of other kinds get the case's own input, a whole model more of what it takes.
    """
    if case.whole:
        return models.arguments(replace(case, batch=(_SAMPLES // 4, 5)))
    dtype, inputs = DTYPES[case.sweep.dtype], models.inputs(case)
    return [
        values.normal(f"{case.values}|calibration|{spec.name}", (_SAMPLES, spec.n_in)).to(dtype)
        if spec.kind in BOTH
        else inputs[spec.name]
        for spec in case.layers
    ]


def _eva(model: nn.Module, config: Any, adapter: str, case: Case) -> None:
    """Give EVA activations; the same batch again, until its components have converged."""
    data = [{"inputs": calibration(case)}] * 4
    active = model.active_adapters
    model.set_adapter(adapter)
    initialize_lora_eva_weights(
        model,
        data,
        forward_fn=lambda model, batch: model(*batch["inputs"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        adapter_name=adapter,
        show_progress_bar=False,
    )
    model.base_model.set_adapter(active)


def _eva_finished(case: Case, adapter: AdapterSpec) -> tuple[str, str]:
    """Return how a script goes EVA's way without data: with components of its own, over which it then writes."""
    specs = [(case.layers[target], adapter.at(target).rank) for target in adapter.targets]
    components = ", ".join(
        f"{text(f'base_model.model.{spec.name}')}: torch.ones({rank}, {spec.n_in})" for spec, rank in specs
    )
    given = f"eva_state_dict={{{components}}}, adapter_name={text(adapter.name)}"
    return "initialize_lora_eva_weights", f"initialize_lora_eva_weights(model, {given})"


def _corda(model: nn.Module, config: Any, adapter: str, case: Case) -> None:
    """Give CorDA activations, from which it takes each layer's covariance."""
    preprocess_corda(model, config, run_model=lambda: model(*calibration(case)))


def even(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Make the rank even, as PEFT asks of orthogonal starts."""
    rank = adapter.rank + adapter.rank % 2
    return replace(adapter, rank=rank, alpha=adapter.alpha * rank / adapter.rank if exact else adapter.alpha)


def no_wider_in(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Keep the rank within every target's inputs: activations have no more principal directions."""
    rank = min(adapter.rank, *(layers[target].n_in for target in adapter.targets))
    return replace(adapter, rank=rank, alpha=adapter.alpha * rank / adapter.rank if exact else adapter.alpha)


def _start(name: str, layers: frozenset[str], config: Callable, fit: Callable, **given: Any) -> Method:
    """Return a LoRA that starts otherwise; `unasked` are the kinds on which its arithmetic is LoRA's as well."""
    steps: dict[str, Any] = {key: given.pop(key) for key in ("before", "after", "finished") if key in given}
    variant = Variant(
        name,
        "lora",
        layers,
        options={"rslora": (False, True)},
        fit=fit,
        claim=claim,
        **given,
    )
    return Method(variant, config, ROLES, **steps)


METHODS = (
    _start(
        "lora.gaussian",
        frozenset({"linear"}),
        configured(init_lora_weights="gaussian"),
        lambda adapter, layers, exact: adapter,
        unasked=LAYERS - {"linear"} | {"mha"},
    ),
    _start("lora.orthogonal", BOTH, configured(init_lora_weights="orthogonal"), even, combinations=STARTS),
    _start(
        "lora.eva",
        BOTH,
        configured(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)),  # 1: ranks stay where they are
        no_wider_in,
        unasked=_IGNORED,
        after=_eva,
        finished=_eva_finished,
        combinations=STARTS,
    ),
    _start(
        "lora.pissa-niter",
        BOTH,
        configured(init_lora_weights="pissa_niter_2"),
        no_wider,
        unasked=_IGNORED,
        rewrites_base=True,
        dtypes=SINGLE,
        combinations=STARTS,
    ),
    *(
        _start(
            f"lora.corda-{mode}",
            BOTH,
            configured(init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode)),
            no_wider,
            unasked=_IGNORED,
            rewrites_base=True,
            most_adapters=1,  # the covariances are taken on plain layers, not on PEFT's
            dtypes=SINGLE,
            before=_corda,
        )
        for mode in ("ipm", "kpm")
    ),
)
