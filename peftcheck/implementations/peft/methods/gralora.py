"""GraLoRA in PEFT, alone and as the hybrid with a LoRA."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from peft import GraloraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method

ROLES = {
    "gralora_A": "A",
    "gralora_B": "B",
    "gralora_A_general.weight": "A.general",
    "gralora_B_general.weight": "B.general",
}


def _config(adapter: AdapterSpec, targets: list[str]) -> GraloraConfig:
    return GraloraConfig(
        r=adapter.rank,
        alpha=adapter.alpha,
        gralora_k=adapter.option("k"),
        hybrid_r=adapter.option("hybrid"),
        target_modules=targets,
    )


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Take the largest k up to the drawn one that divides every target's widths, and a rank that it divides.

    In the exact regime alpha is a power of two times the sum of both ranks.
    """
    width = gcd(*(n for target in adapter.targets for n in (layers[target].n_in, layers[target].n_out)))
    drawn = dict(adapter.options)
    k = max(d for d in range(1, min(drawn["k"], width) + 1) if width % d == 0)
    rank = -(-adapter.rank // k) * k
    alpha = adapter.alpha / adapter.rank * (rank + drawn["hybrid"]) if exact else adapter.alpha
    return replace(adapter, rank=rank, alpha=alpha, options=tuple(sorted({**drawn, "k": k}.items())))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """GraLoRA is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def _method(name: str, hybrid: tuple[int, ...]) -> Method:
    variant = Variant(
        name,
        "gralora",
        frozenset({"linear", "conv1d-transformers"}),
        options={"k": (1, 2, 2, 3, 4), "hybrid": hybrid},
        fit=fit,
        claim=claim,
    )
    return Method(variant, _config, ROLES)


METHODS = (_method("gralora", (0,)), _method("gralora.hybrid", (1, 2, 4)))
