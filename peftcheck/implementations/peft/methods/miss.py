"""MiSS in PEFT: the balanced form, the small one, and Bat."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from peft import MissConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.boft import claim


def _config(adapter: AdapterSpec, targets: list[str]) -> MissConfig:
    return MissConfig(
        r=adapter.rank,
        mini_r=adapter.option("columns", 1),
        init_weights=adapter.option("init"),
        target_modules=targets,
    )


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Take the rank down to what PEFT declares: at most the inputs; for Bat a divisor of inputs and outputs.

    The columns of the small form must divide the outputs.
    """
    targets = [layers[target] for target in adapter.targets]
    outputs = gcd(*(spec.n_out for spec in targets))
    options = dict(adapter.options)
    if options["init"] == "bat":
        common = gcd(outputs, *(spec.n_in for spec in targets))
        return replace(adapter, rank=max(d for d in range(1, min(adapter.rank, common) + 1) if common % d == 0))
    if options["init"] == "mini":
        drawn = min(options["columns"], outputs)
        options["columns"] = max(d for d in range(1, drawn + 1) if outputs % d == 0)
    rank = min(adapter.rank, *(spec.n_in for spec in targets))
    return replace(adapter, rank=rank, options=tuple(sorted(options.items())))


def _method(name: str, formula: str, **options) -> Method:
    variant = Variant(name, formula, frozenset({"linear"}), options=options, fit=fit, claim=claim)
    return Method(variant, _config, {"miss_block": "D"})


METHODS = (
    _method("miss", "miss", init=(True, False)),
    _method("miss.mini", "miss", init=("mini",), columns=(1, 2, 3, 4, 24)),
    _method("miss.bat", "miss.bat", init=("bat",)),
)
