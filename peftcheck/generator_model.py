"""From a sweep over a whole model to a case: the model's settings, the layers that users adapt, how they name them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from peftcheck import transformer_models
from peftcheck.case import PARTS, AdapterSpec, Case, LayerSpec, Poison, Sweep
from peftcheck.implementation import Variant
from peftcheck.targets import LINEAR, SPELLINGS

_ADAPTER_NAMES = (("default", "other"), ("a", "ab"), ("default_1", "default"), ("q_proj", "lora"))
_PROFILES = ("normal", "normal", "normal", "onehot", "small", "extreme", "duplicated")


def model_case(variant: Variant, sweep: Sweep, seed: int, index: int) -> Case:
    """Return case `index` of a sweep over a whole model; never in the exact regime, which ends at the first softmax.

    Profiles that overflow or underflow on their way through a model are left to the layers alone.
    """
    rng = random.Random(f"{sweep}|{seed}|{index}|model")
    blueprint = transformer_models.BLUEPRINTS[sweep.layer]
    settings: dict[str, Any] = {name: rng.choice(choices) for name, choices in blueprint.settings.items()}
    if variant.bias is not None and "bias" in settings:
        settings["bias"] = variant.bias
    if variant.by_name and "tied" in settings:
        settings["tied"] = False
    if parts := [part for part in PARTS if part in variant.within]:
        settings["part"] = parts[0]
    layers = transformer_models.layers(sweep.layer, settings)
    spelling = rng.choice(SPELLINGS)
    if variant.by_name and spelling == "all-linear":
        spelling = "names"
    head = next(spec for spec in layers if spec.name == blueprint.head)
    settings["save_head"] = head.tied is None and rng.random() < 0.35 and not parts
    adapters = _adapters(rng, variant, layers, blueprint, settings, spelling)
    profiles = [p for p in _PROFILES if p not in variant.avoids and (len(adapters) > 1 or p != "duplicated")]
    return Case(
        sweep,
        seed,
        index,
        layers,
        adapters,
        adapter_dtype="float32" if sweep.dtype == "bfloat16" and rng.random() < 0.5 else sweep.dtype,
        profile=rng.choice(profiles),
        values=rng.randrange(2**32),
        batch=rng.choice([(1, 2), (2, 3), (3, 5), (1, 1)]),
        safe=rng.random() < 0.4,
        joint=rng.random() < 0.6,
        cycles=2,
        # the first case has something to say to every law: whole models are dear, and quick looks at one
        poison=Poison(
            rng.choice(["nan", "inf", "overflow", "tame"][: 4 if index else 2]),
            *(rng.randrange(n) for n in (8, 64, 64, 4096)),
        ),
        extra=tuple(sorted({**settings, "spelling": spelling}.items())),
    )


def _adapters(rng, variant: Variant, layers, blueprint, settings, spelling: str) -> tuple[AdapterSpec, ...]:
    names = rng.choice(_ADAPTER_NAMES)
    # of several adapters that each train a head of their own, no more than one can be in force
    count = 1 if settings["save_head"] else min(rng.choice([1, 1, 2]), variant.most_adapters)
    made = []
    for name in names[:count]:
        targets = _targets(rng, variant, layers, blueprint, settings, spelling)
        rank = rng.choice([1, 2, 3, 4, 5, 8])
        options = {key: rng.choice(choices) for key, choices in sorted(variant.options.items())}
        adapter = AdapterSpec(name, targets, rank, rng.choice([1.0, 0.5, 8.0, 16.0]), tuple(sorted(options.items())))
        made.append(variant.fit(adapter, layers, False))
    return variant.fit_all(tuple(made), layers)


def _targets(rng, variant: Variant, layers: Sequence[LayerSpec], blueprint, settings, spelling: str) -> tuple[int, ...]:
    """Return the layers that one way of naming them means, as far as the variant accepts them.

    A variant that accepts none of the model's layers is asked for those that users adapt, and has to refuse.
    """
    able = [
        i
        for i, spec in enumerate(layers)
        if spec.kind in variant.layers | variant.within and spec.tied is None and variant.admit(spec) == spec
    ]
    if settings.get("part"):
        return tuple(able) or (0,)  # `fit` knows which of them the method takes
    able = [i for i in able if not (settings["save_head"] and layers[i].name == blueprint.head)]
    linear = [i for i in able if layers[i].kind in LINEAR]
    if blueprint.task == "CAUSAL_LM":
        linear = [i for i in linear if layers[i].name != blueprint.head]
    groups = [found for ends in blueprint.groups if (found := _ending(layers, able, ends))]
    if spelling == "all-linear" and linear and groups and settings["blocks"] < 3:
        return tuple(linear)
    found = rng.choice(groups) if groups else _ending(layers, range(len(layers)), blueprint.groups[0])
    blocks = range(settings["blocks"])
    if spelling == "blocks" or len(blocks) > 2:  # one of eleven, so that its number begins another's
        block = rng.choice(blocks[:2])
        found = [i for i in found if f".{blueprint.blocks}.{block}." in layers[i].name] or found
    return tuple(found)


def _ending(layers: Sequence[LayerSpec], among: Sequence[int], ends: Sequence[str]) -> list[int]:
    return [i for i in among if any(layers[i].name.endswith(f".{end}") for end in ends)]
