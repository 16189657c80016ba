"""Arrow in PEFT: a router over LoRA adapters that were saved each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method
from peftcheck.oracle.experts import MOST

_ROUTER = "arrow_router"  # the name that PEFT gives the adapter that routes, and tells it by
_ROLES = {
    f"{role}{factor}.{index}": f"{role}{factor}.{index}"
    for role in ("", "general.")
    for factor in "AB"
    for index in range(MOST)
}


def _config(adapter: AdapterSpec, targets: list[str]) -> LoraConfig:
    """Return the router's configuration; PEFT fills in the experts' names."""
    own = ArrowConfig(
        top_k=adapter.option("most"),
        router_temperature=adapter.option("temperature"),
        use_gks=adapter.option("general") > 0,
        rng_seed=0,
    )
    return LoraConfig(r=adapter.rank, target_modules=targets, arrow_config=own)


def _named(model: nn.Module, config: LoraConfig, adapter: str, case: Case) -> None:
    """Tell a router that is added again its experts, which `create_arrow_model` does for the first."""
    own, spec = config.arrow_config, case.adapters[0]
    own.task_adapter_names = [f"task_{index}" for index in range(spec.option("experts"))]
    own.gks_adapter_names = [f"gks_{index}" for index in range(spec.option("general"))]


def _attach(model: nn.Module, config: Any, adapter: AdapterSpec, autocast: bool, mixed: bool) -> PeftModel:
    """Save as many LoRA adapters of a copy as the case has experts, and have PEFT build its router from the files."""
    counts = {"task": adapter.option("experts"), "general": adapter.option("general")}
    names = {kind: [f"{kind}{index}" for index in range(count)] for kind, count in counts.items()}
    expert = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=config.target_modules)
    first, *others = names["task"] + names["general"]
    made = get_peft_model(deepcopy(model), expert, first, autocast_adapter_dtype=autocast)
    for name in others:
        made.add_adapter(name, replace(expert), autocast_adapter_dtype=autocast)
    with TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        paths = {kind: [str(Path(folder, name)) for name in own] for kind, own in names.items()}
        return create_arrow_model(
            model, paths["task"], config.arrow_config, paths["general"] or None, autocast_adapter_dtype=autocast
        )


def _scripted(case: Case, config: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the imports and the lines that do the same in a script."""
    adapter = case.adapters[0]
    names = [f"task{i}" for i in range(adapter.option("experts"))] + [
        f"general{i}" for i in range(adapter.option("general"))
    ]
    paths = [[f"experts/{name}" for name in names if name.startswith(kind)] for kind in ("task", "general")]
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    arrow = (
        f"ArrowConfig(top_k={adapter.option('most')}, router_temperature={adapter.option('temperature')}, "
        f"use_gks={adapter.option('general') > 0}, rng_seed=0)"
    )
    imports = (
        "from copy import deepcopy",
        "from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model",
    )
    lines = (
        f"expert = LoraConfig(r={adapter.rank}, lora_alpha={adapter.alpha}, target_modules={targets!r})",
        f"made = get_peft_model(deepcopy(model), expert, {names[0]!r})",
        f"for name in {names[1:]!r}:",
        "    made.add_adapter(name, deepcopy(expert))",
        'made.save_pretrained("experts")',
        f"model = create_arrow_model(model, {paths[0]!r}, {arrow}, {paths[1] or None!r})",
    )
    return imports, lines


def _own(module: LoraLayer, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the factors of the experts and of the general adapters, and those that the router has and does not use.

    An expert is an adapter, too: of one, its own factors. The directions of the experts are there once a forward has
    looked for them.
    """
    router = getattr(module, "lora_arrow", nn.ModuleDict())
    if adapter in router:
        yield from ((f"router.{name}", tensor) for name, tensor in router[adapter].named_buffers())
    if adapter not in module.lora_A:
        return
    if adapter not in router:
        yield "A", module.lora_A[adapter].weight
        yield "B", module.lora_B[adapter].weight
        return
    for label, prefix in (("", "task_"), ("general.", "gks_")):
        for index in range(MOST):
            if f"{prefix}{index}" in module.lora_A:
                yield f"{label}A.{index}", module.lora_A[f"{prefix}{index}"].weight
                yield f"{label}B.{index}", module.lora_B[f"{prefix}{index}"].weight
    yield "router.A", module.lora_A[adapter].weight
    yield "router.B", module.lora_B[adapter].weight


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Choose no more experts than there are, under the name that PEFT gives the router."""
    options = dict(adapter.options)
    options["most"] = min(options["most"], options["experts"])
    rank = 1 if adapter.rank % 2 else adapter.rank  # of rank one the direction is known without any iteration
    return replace(adapter, name=_ROUTER, rank=rank, options=tuple(sorted(options.items())))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """The router merges nothing; it is built anew from its experts' files, and is itself no adapter to save or scale."""
    if op in MERGES:
        return Claim.ABSENT if op is Op.DELTA else Claim.REFUSES
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.SAVE, Op.LOAD) else Claim.YES


METHODS = (
    Method(
        Variant(
            "lora.arrow",
            "lora.arrow",
            frozenset({"linear", "conv1d-transformers"}),
            options={"experts": (2, 3, 4), "general": (0, 0, 2), "most": (1, 2, 3), "temperature": (1.0, 0.5, 2.0)},
            fit=fit,
            claim=claim,
            most_adapters=1,
            dtypes=frozenset({"float64", "float32", "bfloat16"}),
            batches=((1,), (2,), (2, 3), (1, 2, 2)),
        ),
        _config,
        _ROLES,
        before=_named,
        attach=_attach,
        own=_own,
        scripted=_scripted,
    ),
)
