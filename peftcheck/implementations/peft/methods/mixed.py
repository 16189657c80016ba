"""PeftMixedModel: adapters of two types on the same layers, the second around the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods import adalora, loha, lokr, lora, oft

_PARTS: dict[str, Method] = {
    "lora": lora.METHODS[0],
    "loha": loha.METHODS[0],
    "lokr": lokr.METHODS[0],
    "adalora": adalora.METHODS[0],
    "oft": oft.METHODS[0],
}
_OPTIONS: dict[str, Mapping[str, Any]] = {
    "lora": {},
    "loha": {"effective": False},
    "lokr": {"effective": False, "both": True, "factor": 2},
    "adalora": {},
    "oft": {"given": "size", "neumann": False, "share": False},
}


def _config(adapter: AdapterSpec, targets: list[str]) -> Any:
    return _PARTS[adapter.option("method")].config(adapter, targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """A mixed model declares that it is not saved and combines nothing; its layers' deltas and scales are apart."""
    if op in (Op.SAVE, Op.COMBINE):
        return Claim.REFUSES
    return Claim.ABSENT if op in (Op.DELTA, Op.RESCALE, Op.MIXED_BATCH, Op.LOAD) else Claim.YES


def _pair(first: str, second: str) -> Method:
    def each(adapters: tuple[AdapterSpec, ...], layers: tuple[LayerSpec, ...]) -> tuple[AdapterSpec, ...]:
        """Make the first adapter one of the first method, the second one of the second."""
        found = []
        for adapter, method in zip(adapters, (first, second), strict=False):
            options = {**_OPTIONS[method], "method": method}
            found.append(replace(adapter, options=tuple(sorted(options.items()))))
        return tuple(found)

    pair = {first, second}
    formula = "mixed.rotated" if "oft" in pair else "mixed.adalora" if "adalora" in pair else "mixed"
    layers = frozenset({"linear"})
    variant = Variant(
        f"mixed.{first}-{second}",
        formula,
        layers,
        fit_all=each,
        claim=claim,
        # on other layers each method does what its own variants show
        unasked=(_PARTS[first].variant.layers | _PARTS[first].variant.unasked) - layers,
        # "PeftMixedModel does not support autocast_adapter_dtype"; in fp64 LoHa and OFT show their own detours by float32
        dtypes=frozenset({"float32"} if pair & {"loha", "oft"} else {"float64", "float32"}),
        most_adapters=2,
    )
    roles = {**_PARTS[first].roles, **_PARTS[second].roles}
    return Method(variant, _config, roles, mixed=True)


METHODS = tuple(
    _pair(*pair) for pair in (("lora", "loha"), ("lokr", "lora"), ("adalora", "loha"), ("oft", "lora"), ("lora", "oft"))
)
