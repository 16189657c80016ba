"""RoAd in PEFT, in its three forms."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from peft import RoadConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> RoadConfig:
    return RoadConfig(variant=adapter.option("form"), group_size=adapter.option("group_size"), target_modules=targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """RoAd reports no delta, combines no adapters and has no scale."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE) else Claim.YES


def even(layer: LayerSpec) -> LayerSpec:
    """RoAd declares that groups of an even size must tile the outputs."""
    return replace(layer, n_out=layer.n_out * (1 + layer.n_out % 2))  # doubled: groups still divide it


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Take the largest even group size up to the drawn one that divides every target's outputs."""
    width = gcd(*(layers[target].n_out for target in adapter.targets))
    drawn = adapter.option("group_size")
    size = max(g for g in range(2, min(drawn, width) + 1, 2) if width % g == 0)
    return replace(adapter, options=tuple(sorted({**dict(adapter.options), "group_size": size}.items())))


def _method(name: str, form: str) -> Method:
    variant = Variant(
        name,
        "road",
        frozenset({"linear"}),
        options={"form": (form,), "group_size": (2, 4, 8, 64)},
        fit=fit,
        admit=even,
        claim=claim,
    )
    return Method(variant, _config, {"road_theta": "theta", "road_alpha": "alpha"})


METHODS = (_method("road", "road_1"), _method("road.2", "road_2"), _method("road.4", "road_4"))
