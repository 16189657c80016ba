"""TinyLoRA in PEFT."""

from __future__ import annotations

from dataclasses import replace

from peft import TinyLoraConfig

from peftcheck.case import EMBEDDINGS, AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method, keeping

ROLES = {
    "tinylora_A": "A",
    "tinylora_B": "B",
    "tinylora_P": "P",
    **{f"tinylora_v.{group}": f"v.{group}" for group in range(4)},
}


def _config(adapter: AdapterSpec, targets: list[str]) -> TinyLoraConfig:
    return TinyLoraConfig(
        r=adapter.rank,
        u=adapter.option("u"),
        weight_tying=adapter.option("tying"),
        projection_seed=adapter.option("seed"),
        target_modules=targets,
    )


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Tie all targets where there are several: which vector belongs to which group, the tensors do not say."""
    drawn = dict(adapter.options)
    tying = drawn["tying"] if len(adapter.targets) == 1 else 1.0
    return replace(adapter, options=tuple(sorted({**drawn, "tying": tying}.items())))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """TinyLoRA is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "tinylora",
            "tinylora",
            frozenset({"linear", "conv1d-transformers", *EMBEDDINGS}),
            options={"u": (1, 3, 13), "tying": (0.0, 1.0), "seed": (42, 0)},
            fit=fit,
            claim=claim,
            keeps=keeping("A", "B", "P"),  # save_projection is the default
            avoids=frozenset({"huge"}),  # decomposed in single precision when attached
        ),
        _config,
        ROLES,
    ),
)
