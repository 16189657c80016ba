"""ShadowPEFT in PEFT."""

from __future__ import annotations

from dataclasses import replace

from peft import ShadowConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method
from peftcheck.implementations.peft.shadowed import ShadowedAttached

_KIND = "block.llama"
_NETWORKS = {"shadow_update_transform": "transform", "shadow_update_gate": "gate"}


def _config(adapter: AdapterSpec, targets: list[str]) -> ShadowConfig:
    return ShadowConfig(
        target_modules=None if adapter.option("blocks") == "all" else targets,
        r=adapter.rank,
        shadow_alpha=adapter.alpha,
        shadow_dropout=0.0,
        shadow_num_hidden_layers=adapter.option("depth"),
        shadow_hidden_size=adapter.option("width"),
        share_embeddings=adapter.option("shared"),
        update_hidden_size=adapter.option("inner"),
    )


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Have the adapter on blocks that follow each other, as the documentation asks: all, all but the first, or the first."""
    own = [index for index, spec in enumerate(layers) if spec.kind == _KIND]
    if not own:  # what has no such blocks is asked by name
        return replace(adapter, options=tuple(sorted({**dict(adapter.options), "blocks": "last"}.items())))
    some = {"all": own, "last": own[1:] or own, "first": own[:1]}[adapter.option("blocks")]
    return replace(adapter, targets=tuple(some))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """ShadowPEFT declares that it merges nothing: the adaptation is a trajectory that depends on the input."""
    if op in MERGES:
        return Claim.REFUSES
    return Claim.ABSENT if op in (Op.RESCALE, Op.COMBINE) else Claim.YES


METHODS = (
    Method(
        Variant(
            "shadow",
            "shadow",
            frozenset(),
            options={
                "blocks": ("all", "all", "last", "first"),
                "depth": (None, 2),
                "width": (None, None, 8),
                "shared": (True, True, False),
                "inner": (None, 3),
            },
            fit=fit,
            claim=claim,
            # PEFT keeps the adapter in single precision beside a model of double
            dtypes=frozenset({"float32", "bfloat16"}),
            within=frozenset({_KIND}),
            unasked=frozenset({"model.bert", "model.gpt2", "model.vit"}),
            most_adapters=1,
        ),
        _config,
        {"shadow_down.weight": "down", "shadow_up.weight": "up"}
        | {
            f"{attribute}.{layer}.{tensor}": f"{role}.{layer}.{tensor}"
            for attribute, role in _NETWORKS.items()
            for layer in (0, 2)
            for tensor in ("weight", "bias")
        },
        port=ShadowedAttached,
    ),
)
