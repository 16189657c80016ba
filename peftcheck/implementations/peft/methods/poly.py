"""Poly in PEFT: told the task of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, PolyConfig
from peft.tuners.poly.layer import PolyLayer
from torch import Tensor, nn

from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method
from peftcheck.oracle.routed import TASKS


def _config(adapter: AdapterSpec, targets: list[str]) -> PolyConfig:
    return PolyConfig(
        r=adapter.rank,
        n_tasks=adapter.option("tasks"),
        n_skills=adapter.option("skills"),
        n_splits=adapter.option("splits"),
        target_modules=targets,
    )


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Split the channels only where they can be split evenly."""
    splits = adapter.option("splits")
    sizes = [n for target in adapter.targets for n in (layers[target].n_in, layers[target].n_out)]
    options = {**dict(adapter.options), "splits": splits if all(n % splits == 0 for n in sizes) else 1}
    return replace(adapter, options=tuple(sorted(options.items())))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """Poly merges nothing: its weights depend on the task."""
    if op in MERGES:
        return Claim.REFUSES
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def _run(model: PeftModel, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Run the model on a batch whose row i belongs to task i mod 2."""
    rows = max((len(x) for x in inputs if x.dim()), default=1)
    return model.base_model(*inputs, task_ids=torch.arange(rows) % TASKS)


def _told(model: nn.Module, config: Any, adapter: str, case: Case) -> None:
    """Tell the layers the same where one is called by itself."""
    for module in model.modules():
        if isinstance(module, PolyLayer) and _tell not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {"task_ids": torch.arange(len(args[0]) if args[0].dim() else 1) % TASKS, **kwargs}


METHODS = (
    Method(
        Variant(
            "poly",
            "poly",
            frozenset({"linear"}),
            options={"tasks": (2, 3), "skills": (1, 2, 4), "splits": (1, 1, 2, 3)},
            fit=fit,
            claim=claim,
        ),
        _config,
        {"poly_lora_A": "A", "poly_lora_B": "B", "poly_router.module_logits": "logits"},
        tells=_told,
        run=_run,
        layer=(
            "def layer(name):  # row i of its input belongs to task i mod 2",
            '    module = model.get_submodule("base_model.model." + name)',
            f"    return lambda x: module(x, task_ids=torch.arange(len(x)) % {TASKS})",
        ),
    ),
)
