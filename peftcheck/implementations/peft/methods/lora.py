"""LoRA in PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import lcm
from typing import Any

from peft import LoraConfig

from peftcheck.case import CONVOLUTIONS, AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method
from peftcheck.implementations.peft.methods import combinations

ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "B.bias",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector.weight": "magnitude",
}
LAYERS = frozenset({"linear", "conv1d-transformers", *CONVOLUTIONS, "embedding", "embedding.scaled"})
ATTENTION = frozenset({"mha"})


def configured(**constants) -> Callable[[AdapterSpec, list[str]], Any]:
    """Return the configuration of a LoRA with the given constant options."""

    def config(adapter: AdapterSpec, targets: list[str]) -> LoraConfig:
        rslora = bool(adapter.option("rslora"))
        return LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            target_modules=targets,
            use_rslora=rslora,
            rank_pattern=_pattern(adapter, targets, "ranks"),
            alpha_pattern=_pattern(adapter, targets, "alphas"),
            **constants,
        )

    return config


def _pattern(adapter: AdapterSpec, targets: list[str], option: str) -> dict[str, Any]:
    """Return a rank or alpha pattern: an anchored expression per layer, so that no name matches another's end."""
    given = dict(adapter.option(option, ()))
    named = zip(adapter.targets, targets, strict=True)
    return {f"^{re.escape(name)}": given[target] for target, name in named if target in given}


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """LoRA merges no grouped convolution."""
    if op in MERGES and spec.kind in CONVOLUTIONS and spec.groups > 1:
        return Claim.REFUSES
    return Claim.YES


def rank_divisible(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Round the rank to a multiple of every target's groups (LoRA's condition on convolutions)."""
    groups = lcm(*(layers[target].groups for target in adapter.targets))
    rank = -(-adapter.rank // groups) * groups
    return replace(adapter, rank=rank, alpha=adapter.alpha * rank / adapter.rank if exact else adapter.alpha)


def patterned(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Double the rank on every other layer, and alpha on every third: powers of two, by the layer's own index."""
    fitted = rank_divisible(adapter, layers, exact)
    ranks = tuple((target, 2 * fitted.rank) for target in adapter.targets if target % 2 == 0)
    alphas = tuple((target, 2.0 * fitted.alpha) for target in adapter.targets if target % 3 == 0)
    return replace(fitted, options=(("alphas", alphas), ("ranks", ranks)))


def claim_bias(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """A LoRA with a bias of its own needs a bias of the layer's to merge it into; attention layers merge to run."""
    if not spec.bias and (op in MERGES or (op is Op.FORWARD and spec.kind == "mha")):
        return Claim.REFUSES
    return claim(op, spec, adapter)


def claim_dora(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """A DoRA has no delta of its own to report, combine or mix: what it changes depends on the base."""
    if op is Op.DELTA:
        return Claim.ABSENT
    return Claim.REFUSES if op is Op.MIXED_BATCH else claim(op, spec, adapter)


def no_wider(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Keep the rank within every target's smaller side: there are no more principal directions to start from."""
    most = min(min(layers[target].n_in, layers[target].n_out) for target in adapter.targets)
    rank = min(adapter.rank, most)
    return replace(adapter, rank=rank, alpha=adapter.alpha * rank / adapter.rank if exact else adapter.alpha)


def _taken_from_the_base(name: str, init: str, layers: frozenset[str]) -> Method:
    """Return a LoRA whose start is cut out of the base (Meng et al., PiSSA, 2024; Bueyuekakyuez, OLoRA, 2024)."""
    variant = Variant(
        name,
        "lora",
        layers,
        fit=no_wider,
        claim=claim,
        unasked=frozenset({"conv1d-transformers", "embedding", "embedding.scaled"}) - layers,
        rewrites_base=True,
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        combinations=combinations.LORA,
    )
    return Method(variant, configured(init_lora_weights=init), ROLES)


METHODS = (
    Method(
        Variant(
            "lora",
            "lora",
            LAYERS | ATTENTION,
            fit=rank_divisible,
            claim=claim,
            combinations=combinations.LORA,
        ),
        configured(),
        ROLES,
    ),
    Method(
        Variant(
            "lora.pattern",
            "lora",
            LAYERS | ATTENTION,
            fit=patterned,
            claim=claim,
            combinations=combinations.LORA,
        ),
        configured(),
        ROLES,
    ),
    _taken_from_the_base("lora.pissa", "pissa", frozenset({"linear", "conv1d-transformers"})),
    # on a Conv1D that is not square OLoRA's factors come out transposed, and no input fits them
    _taken_from_the_base("lora.olora", "olora", frozenset({"linear"})),
    Method(
        Variant(
            "lora.rslora",
            "lora",
            LAYERS | ATTENTION,
            options={"rslora": (True,)},
            fit=rank_divisible,
            claim=claim,
            combinations=combinations.LORA,
        ),
        configured(),
        ROLES,
    ),
    Method(
        Variant(
            "lora.bias",
            "lora",
            frozenset({"linear", "conv1d-transformers", *CONVOLUTIONS}) | ATTENTION,
            options={"rslora": (False, True)},
            fit=rank_divisible,
            claim=claim_bias,
            combinations=combinations.LORA,
        ),
        configured(lora_bias=True),
        ROLES,
    ),
    Method(
        Variant(
            "lora.dora",
            "dora",
            LAYERS,
            options={"rslora": (False, True)},
            fit=rank_divisible,
            claim=claim_dora,
            combinations=combinations.DORA,
        ),
        configured(use_dora=True),
        ROLES,
    ),
)
