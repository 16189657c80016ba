"""FourierFT in PEFT."""

from __future__ import annotations

from dataclasses import replace

from peft import FourierFTConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> FourierFTConfig:
    return FourierFTConfig(
        n_frequency=adapter.rank,
        scaling=adapter.alpha,
        random_loc_seed=adapter.option("seed"),
        target_modules=targets,
    )


def entries(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Take the rank times the drawn factor as the number of coefficients, at most all of the smallest target's."""
    room = min(layers[target].n_in * layers[target].n_out for target in adapter.targets)
    return replace(adapter, rank=min(adapter.rank * adapter.option("times"), room))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """Neither combined, rescaled nor mixed; for a Conv1D PEFT declares that the delta stands in no usable layout."""
    if op is Op.DELTA and spec.kind == "conv1d-transformers":
        return Claim.ABSENT
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "fourierft",
            "fourierft",
            frozenset({"linear", "conv1d-transformers"}),
            options={"seed": (777, 0), "times": (1, 3, 20)},
            fit=entries,
            claim=claim,
        ),
        _config,
        {"fourierft_spectrum": "spectrum", "indices": "entries"},
    ),
)
