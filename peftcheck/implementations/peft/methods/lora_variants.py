"""What PEFT calls variants of LoRA and offers by a configuration of their own, as far as the installed release has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from math import gcd
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import config as configurations

from peftcheck.case import EMBEDDINGS, AdapterSpec, LayerSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method, keeping
from peftcheck.implementations.peft.methods.combinations import STARTS
from peftcheck.implementations.peft.methods.lora import ROLES, claim, configured, no_wider
from peftcheck.implementations.peft.methods.lora_inits import BOTH, SINGLE
from peftcheck.implementations.peft.methods.shira import two_wide

_OFFERED = {field.name: field for field in fields(LoraConfig)}
_RSLORA = {"rslora": (False, True)}


def _given(field: str, kind: str, arguments: Callable[[AdapterSpec, list[str]], dict[str, Any]]) -> Callable:
    """Return LoRA's configuration with `field` set to a configuration of the class `kind`."""

    def config(adapter: AdapterSpec, targets: list[str]) -> LoraConfig:
        own = getattr(configurations, kind)(**arguments(adapter, targets))
        return configured(**{field: own})(adapter, targets)

    return config


def _divides(most: int, *numbers: int) -> int:
    """Return the largest divisor of all the numbers that is no larger than `most`."""
    common = gcd(*numbers)
    return max(d for d in range(1, min(most, common) + 1) if common % d == 0)


def narrower(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Keep the rank below every target's smaller side, so that truncation leaves something."""
    least = min(min(layers[target].n_in, layers[target].n_out) for target in adapter.targets)
    rank = min(adapter.rank, least - 1)
    return replace(adapter, rank=rank, alpha=adapter.alpha * rank / adapter.rank if exact else adapter.alpha)


def blocked(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Take a number of blocks that divides the rank and, on every target, the blocked factor's other side."""
    side = "n_in" if adapter.option("factor") == "A" else "n_out"
    blocks = _divides(adapter.option("blocks"), adapter.rank, *(getattr(layers[t], side) for t in adapter.targets))
    return replace(adapter, options=tuple(sorted({**dict(adapter.options), "blocks": blocks}.items())))


def _blocks(adapter: AdapterSpec, targets: list[str]) -> dict[str, Any]:
    lists = {"A": "target_modules_bd_a", "B": "target_modules_bd_b"}
    return {lists[adapter.option("factor")]: targets, "nblocks": adapter.option("blocks")}


def _method(name: str, formula: str, config: Callable, roles: dict[str, str], **given: Any) -> Method:
    given = {"layers": BOTH, "claim": claim, "options": _RSLORA, "combinations": STARTS, **given}
    return Method(Variant(name, formula, **given), config, ROLES | roles)


def _methods() -> dict[str, Method]:
    """Return the variants by the option that turns each on."""
    return {
        "velora_config": _method(
            "lora.velora",
            "lora.velora",
            _given("velora_config", "VeloraConfig", lambda adapter, _: {"num_groups": adapter.option("groups")}),
            {"lora_velora_embed": "embed"},
            keeps=keeping("embed"),
            options={"groups": (1, 3, 64), **_RSLORA},
        ),
        "monteclora_config": _method(
            "lora.monteclora",
            "lora.monteclora",
            _given("monteclora_config", "MontecloraConfig", lambda adapter, _: {"num_samples": 2, "buffer_size": 2}),
            {},
            keeps=keeping("lora_monteclora_sampler.gaussian_var_prior", "lora_monteclora_sampler.expert_weights"),
        ),
        "kasa_config": _method(
            "lora.kasa",
            "lora.kasa",
            _given("kasa_config", "KasaConfig", lambda adapter, _: {}),
            {"lora_diag": "diag"},
            layers=frozenset({"linear"}),
            admit=two_wide,
            fit=narrower,
            rewrites_base=True,
            avoids=frozenset({"huge"}),  # decomposed in single precision when attached
        ),
        "use_bdlora": _method(
            "lora.bdlora",
            "lora.bdlora",
            _given("use_bdlora", "BdLoraConfig", _blocks),
            {},
            layers=frozenset({"linear"}),
            options={"factor": ("A", "B"), "blocks": (1, 2, 3, 4), **_RSLORA},
            fit=blocked,
        ),
    }


def _mica() -> Method:
    return _method(
        "lora.mica",
        "lora",
        configured(init_lora_weights="mica"),
        {},
        layers=BOTH.union(EMBEDDINGS),
        fit=no_wider,
        dtypes=SINGLE,
        keeps=keeping("B"),
    )


METHODS = (
    *(method for option, method in _methods().items() if option in _OFFERED),
    *((_mica(),) if "mica" in _OFFERED["init_lora_weights"].metadata.get("lora_variants", ()) else ()),
)
