"""What PEFT's methods declare of training: dropout, mixed batches, starts that change the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method

_PROBABILITIES = (0.0, 0.1, 0.5, 0.9)
# the field of the configuration by method; LoHa and LoKr have two kinds of dropout
_FIELDS: Mapping[str, str] = {
    "lora": "lora_dropout",
    "adalora": "lora_dropout",
    "boft": "boft_dropout",
    "deft": "deft_dropout",
    "delora": "module_dropout",
    "frod": "frod_dropout",
    "gralora": "gralora_dropout",
    "hira": "hira_dropout",
    "miss": "miss_dropout",
    "oft": "module_dropout",
    "psoft": "psoft_dropout",
    "pvera": "pvera_dropout",
    "randlora": "randlora_dropout",
    "shadow": "shadow_dropout",
    "supertuning.lora": "lora_dropout",
    "tinylora": "tinylora_dropout",
    "unilora": "unilora_dropout",
    "vblora": "vblora_dropout",
    "vera": "vera_dropout",
}
_TWO_KINDS = frozenset({"loha", "lokr"})
_NO_FIELD = frozenset({"lora.arrow"})  # create_arrow_model gives the router no dropout
_UNDROPPED = frozenset({"parameter"})  # PEFT declares that it refuses lora_dropout there
# methods whose layers take `adapter_names`; whatever else is given them must be refused
_MIX = frozenset({"lora", "glora", "road"})
# where PEFT documents that a fresh adapter is not the identity
_STARTS: Mapping[str, str] = {
    "lora.kasa": "KasaConfig: the r smallest components of the base are discarded",
    "deft.para": "DeftConfig.para: pure subspace removal, no injection that makes up for it at the start",
    "deft.para.qr": "DeftConfig.para: pure subspace removal, no injection that makes up for it at the start",
    "c3a": "C3AConfig.init_weights: the default is 'xavier_uniform'",
    "fourierft": "FourierFTConfig.init_weights: by default False, a standard normal spectrum",
    "unilora": "UniLoraConfig.init_theta_d_bound: zeros are avoided for the sake of the gradients",
    "xlora": "XLoraConfig.adapters: the experts were trained before, and are weighed from the start",
    "vblora": "VBLoRAConfig.init_vector_bank_bound: zeros are avoided for the sake of the gradients",
}
_STARTS_WHEN: Mapping[str, tuple[str, Callable[[AdapterSpec], bool]]] = {
    "hra": ("HRAConfig.r: with an odd r the default initialization does not work", lambda a: a.rank % 2 == 1),
    "miss": ("MissConfig.init_weights: False leaves random values", lambda a: a.option("init") is False),
}
_SAMPLES = frozenset({"pvera", "poly", "lora.monteclora"})  # the gates of Poly are relaxed Bernoulli variables
# where dropout acts on a part of the change only: the roles of that part
_DROPPED: Mapping[str, frozenset[str]] = {
    "supertuning.lora": frozenset({"B"}),
    "deft": frozenset({"R"}),
    "deft.qr": frozenset({"R"}),
}


def trained(method: Method) -> Method:
    """Return the method with the dropout that PEFT offers for it, and what PEFT claims of mixed batches."""
    own = method.variant
    options = _dropouts(own.name)
    family = own.name.partition(".")[0]
    starts, when = _STARTS_WHEN.get(family, (_STARTS.get(own.name) or _STARTS.get(family, ""), None))
    variant = replace(
        own,
        starts=starts,
        starts_when=when,
        samples=own.name in _SAMPLES,
        dropped=_DROPPED.get(own.name, frozenset()),
        options={**own.options, **options},
        undropped=_UNDROPPED,
        claim=_mixing(own),
    )
    return replace(method, variant=variant, config=_dropping(method) if options else method.config)


def _dropouts(name: str) -> dict[str, tuple[Any, ...]]:
    if name.partition(".")[0] in _TWO_KINDS:
        return {"dropout": _PROBABILITIES, "dropout.of": ("module", "rank")}
    return {"dropout": _PROBABILITIES} if _field(name) and name not in _NO_FIELD else {}


def _field(name: str) -> str | None:
    return _FIELDS.get(name) or _FIELDS.get(name.partition(".")[0])


def _dropping(method: Method):
    name = method.variant.name

    def config(adapter: AdapterSpec, targets: list[str]) -> Any:
        made = method.config(adapter, targets)
        probability = adapter.option("dropout")
        if probability:
            setattr(made, _field(name) or f"{adapter.option('dropout.of', 'module')}_dropout", probability)
        return made

    return config


def _mixing(variant: Variant):
    """Claim mixed batches where the method's layers take them; PEFT declares that DoRA does not."""
    mixes = variant.name.partition(".")[0] in _MIX and variant.formula != "dora"

    def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
        if op is Op.MIXED_BATCH:
            return Claim.YES if mixes and spec.kind not in ("mha", "parameter") else Claim.REFUSES
        return variant.claim(op, spec, adapter)

    return claim
