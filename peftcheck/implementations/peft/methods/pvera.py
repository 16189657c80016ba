"""PVeRA in PEFT, in evaluation, where it does not sample."""

from __future__ import annotations

from dataclasses import replace

from peft import PveraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.vera import keeps, sharing

RANKS = ("alike", "alike", "alike", "unlike")


def _config(adapter: AdapterSpec, targets: list[str]) -> PveraConfig:
    return PveraConfig(
        r=adapter.rank,
        d_initial=adapter.option("d_initial"),
        save_projection=adapter.option("save_projection"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """PVeRA is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def fit_all(adapters: tuple[AdapterSpec, ...], layers: tuple[LayerSpec, ...]) -> tuple[AdapterSpec, ...]:
    """Let later adapters fit the first one's projections, most often with the very rank that it has."""
    first, *others = sharing(adapters, layers)
    alike = first.option("shared_rank") == "alike"
    return (first, *(replace(adapter, rank=first.rank) if alike else adapter for adapter in others))


METHODS = (
    Method(
        Variant(
            "pvera",
            "pvera",
            frozenset({"linear", "conv1d-transformers"}),
            options={"d_initial": (0.1, 1.0), "save_projection": (False, True), "shared_rank": RANKS},
            fit_all=fit_all,
            claim=claim,
            keeps=keeps,
        ),
        _config,
        {"pvera_A": "A", "pvera_B": "B", "pvera_lambda_b": "b", "pvera_lambda_d": "d"},
    ),
)
