"""RandLoRA in PEFT, with dense, sparse and very sparse bases."""

from __future__ import annotations

from dataclasses import replace

from peft import RandLoraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.pvera import RANKS
from peftcheck.implementations.peft.methods.pvera import fit_all as sharing
from peftcheck.implementations.peft.methods.vera import keeps


def _config(adapter: AdapterSpec, targets: list[str]) -> RandLoraConfig:
    return RandLoraConfig(
        r=adapter.rank,
        randlora_alpha=adapter.alpha,
        save_projection=adapter.option("save_projection"),
        sparse=adapter.option("bases") == "sparse",
        very_sparse=adapter.option("bases") == "very sparse",
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """RandLoRA is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def _fit_all(adapters: tuple[AdapterSpec, ...], layers: tuple[LayerSpec, ...]) -> tuple[AdapterSpec, ...]:
    """Let later adapters fit the first one's bases: also no more of them than there are."""
    first, *others = sharing(adapters, layers)
    drawn = [layers[target] for target in first.targets]
    least = min(max(layer.n_in for layer in drawn), max(layer.n_out for layer in drawn))
    count = -(-least // first.rank)
    fitted = []
    for adapter in others:
        needed = max(-(-min(layers[t].n_in, layers[t].n_out) // adapter.rank) for t in adapter.targets)
        fitted.append(adapter if needed <= count else replace(adapter, rank=first.rank))
    return (first, *fitted)


METHODS = (
    Method(
        Variant(
            "randlora",
            "randlora",
            frozenset({"linear", "conv1d-transformers"}),
            options={
                "bases": ("dense", "dense", "sparse", "very sparse"),
                "save_projection": (False, True),
                "shared_rank": RANKS,
            },
            fit_all=_fit_all,
            claim=claim,
            keeps=keeps,
        ),
        _config,
        {"randlora_A": "A", "randlora_B": "B", "randlora_lambda": "lambda", "randlora_gamma": "gamma"},
    ),
)
