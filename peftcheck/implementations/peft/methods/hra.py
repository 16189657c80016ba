"""HRA in PEFT, with and without Gram-Schmidt."""

from __future__ import annotations

from dataclasses import replace

from peft import HRAConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.boft import claim, plain, ungrouped


def _config(adapter: AdapterSpec, targets: list[str]) -> HRAConfig:
    return HRAConfig(r=adapter.rank, apply_GS=adapter.option("gram_schmidt"), target_modules=targets)


def independent(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Gram-Schmidt needs no more vectors than dimensions."""
    widths = [layers[target].n_in * (layers[target].kernel or (1,))[0] ** 2 for target in adapter.targets]
    return replace(adapter, rank=min(adapter.rank, *widths)) if adapter.option("gram_schmidt") else adapter


def _method(name: str, gram_schmidt: bool, layers=("linear", "conv2d"), admit=plain) -> Method:
    variant = Variant(
        name,
        "hra",
        frozenset(layers),
        options={"gram_schmidt": (gram_schmidt,)},
        fit=independent,
        admit=admit,
        claim=claim,
        unasked=frozenset({"linear", "conv2d"}) - set(layers),  # `hra` asks them
    )
    return Method(variant, _config, {"hra_u": "u"})


METHODS = (_method("hra", False), _method("hra.gs", True), _method("hra.conv2d", False, ("conv2d",), ungrouped))
