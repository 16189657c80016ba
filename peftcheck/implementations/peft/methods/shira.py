"""SHiRA in PEFT, with its random mask."""

from __future__ import annotations

from dataclasses import replace

from peft import ShiraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method, keeping


def _config(adapter: AdapterSpec, targets: list[str]) -> ShiraConfig:
    return ShiraConfig(r=adapter.rank, random_seed=adapter.option("seed"), target_modules=targets)


def two_wide(layer: LayerSpec) -> LayerSpec:
    """Make room for the method's fewest trained entries."""
    return replace(layer, n_in=max(2, layer.n_in), n_out=max(2, layer.n_out))


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Lower the rank until r (in + out) trained entries fit into every target, as PEFT demands."""
    room = min(layers[t].n_in * layers[t].n_out // (layers[t].n_in + layers[t].n_out) for t in adapter.targets)
    return replace(adapter, rank=min(adapter.rank, room))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """SHiRA is neither combined nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "shira",
            "shira",
            frozenset({"linear"}),
            options={"seed": (0, 1, 7)},
            fit=fit,
            admit=two_wide,
            claim=claim,
            keeps=keeping("entries"),
        ),
        _config,
        {"shira_weight": "values", "shira_indices": "entries"},
    ),
)
