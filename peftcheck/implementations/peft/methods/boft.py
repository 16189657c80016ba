"""BOFT in PEFT. Without its CUDA extension it announces that it uses one butterfly factor, whatever was asked."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from peft import BOFTConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> BOFTConfig:
    by_count = adapter.option("given") == "count"
    return BOFTConfig(
        boft_block_num=adapter.rank if by_count else 0,
        boft_block_size=0 if by_count else adapter.rank,
        boft_n_butterfly_factor=adapter.option("factors"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """OFT, BOFT and HRA report no additive delta, combine no adapters, have no scale and mix no batches."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def _width(layer: LayerSpec) -> int:
    return layer.n_in * layer.kernel[0] ** 2 if layer.kernel else layer.n_in


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Take the largest block size (or count) up to the drawn one that divides the width of every target."""
    width = gcd(*(_width(layers[target]) for target in adapter.targets))
    return replace(adapter, rank=max(d for d in range(1, min(adapter.rank, width) + 1) if width % d == 0))


def ungrouped(layer: LayerSpec) -> LayerSpec:
    """BOFT and HRA declare that they adapt no grouped convolution."""
    return replace(layer, groups=1)


def plain(layer: LayerSpec) -> LayerSpec:
    """Return a convolution as the code of OFT, BOFT and HRA has it in mind: square, dense, the same along both axes.

    None of them declares it; the variants that end in `conv2d` draw everything else.
    """
    if not layer.kernel:
        return layer
    padding = layer.padding[0] if isinstance(layer.padding, tuple) else 0
    axes = len(layer.kernel)
    return replace(
        layer,
        kernel=(layer.kernel[0],) * axes,
        stride=(layer.stride[0],) * axes,
        dilation=(1,) * axes,
        padding=(padding,) * axes,
        groups=1,
        padding_mode="zeros",
        size=tuple(max(extent, layer.kernel[0]) for extent in layer.size),
    )


def _method(name: str, layers: tuple[str, ...], admit) -> Method:
    variant = Variant(
        name,
        "boft",
        frozenset(layers),
        options={"given": ("size", "count"), "factors": (1, 1, 2)},
        fit=fit,
        admit=admit,
        claim=claim,
        unasked=frozenset({"linear", "conv2d"}) - set(layers),  # `boft` asks them
    )
    return Method(variant, _config, {"boft_R": "R", "boft_s": "s"})


METHODS = (_method("boft", ("linear", "conv2d"), plain), _method("boft.conv2d", ("conv2d",), ungrouped))
