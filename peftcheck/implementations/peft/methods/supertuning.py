"""Super-Tuning in PEFT, alone and as the hybrid with a LoRA."""

from __future__ import annotations

from dataclasses import replace

from peft import SupertuningConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method, keeping
from peftcheck.implementations.peft.methods.shira import two_wide

ROLES = {
    "supertuning_values": "values",
    "supertuning_indices": "entries",
    "supertuning_lora_A.weight": "A",
    "supertuning_lora_B.weight": "B",
}


def _config(adapter: AdapterSpec, targets: list[str]) -> SupertuningConfig:
    hybrid = adapter.option("hybrid")
    return SupertuningConfig(
        sparsity=adapter.option("sparsity"),
        select_top=adapter.option("top"),
        r=adapter.rank if hybrid else None,
        lora_alpha=adapter.alpha if hybrid else None,
        target_modules=targets,
    )


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Lower the sparsity until every target has a trained entry, as PEFT demands."""
    least = min(layers[t].n_in * layers[t].n_out for t in adapter.targets)
    drawn = dict(adapter.options)
    sparsity = drawn["sparsity"] if least * (1 - drawn["sparsity"]) >= 1.5 else 0.5
    return replace(adapter, options=tuple(sorted({**drawn, "sparsity": sparsity}.items())))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """Super-Tuning is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def _method(name: str, hybrid: bool) -> Method:
    variant = Variant(
        name,
        "supertuning",
        frozenset({"linear"}),
        options={"hybrid": (hybrid,), "sparsity": (0.0, 0.5, 0.9), "top": (True, True, False)},
        fit=fit,
        admit=two_wide,
        claim=claim,
        keeps=keeping("entries"),
    )
    return Method(variant, _config, ROLES)


METHODS = (_method("supertuning", False), _method("supertuning.lora", True))
