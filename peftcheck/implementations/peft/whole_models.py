"""PEFT on whole models: which of them a method accepts, and targets as users write them."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from peftcheck.case import AdapterSpec, Case
from peftcheck.implementation import Variant
from peftcheck.oracle.activated import invocation
from peftcheck.targets import Targets, spelled
from peftcheck.transformer_models import BLUEPRINTS, having

# Its preprocessing takes one sequence at a time, and targets by plain names of nn.Linear.
_APART = frozenset({"lora.corda-ipm", "lora.corda-kpm"})


# PEFT warns that it is for causal language models only: others have no invocation.
_CAUSAL = frozenset({"lora.alora"})


def with_models(variant: Variant) -> Variant:
    """Return the variant with the whole models that have a layer of a kind which it accepts."""
    accepted = having(variant.layers | variant.within) - variant.unasked if variant.name not in _APART else frozenset()
    if variant.name in _CAUSAL:
        accepted = frozenset(model for model in accepted if BLUEPRINTS[model].task == "CAUSAL_LM")
    unasked = having(variant.layers | variant.within | variant.unasked) - accepted
    return replace(variant, layers=variant.layers | accepted, unasked=variant.unasked | unasked)


def as_users_write(config: Any, case: Case, adapter: AdapterSpec) -> Any:
    """Return a configuration with its targets spelled as the case has it, as far as the configuration can say it.

    Raises what the configuration raises.
    """
    if not case.whole:
        return config
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    if case.setting("part") or "target_modules" not in fields:  # the method itself knows where it goes
        return dataclasses.replace(config, task_type=BLUEPRINTS[case.sweep.layer].task)
    targets = spelled(case, adapter)
    if targets.blocks and not {"layers_to_transform", "layers_pattern"} <= fields:
        targets = Targets(tuple(case.layers[target].name for target in adapter.targets))
    if targets.excluded and "exclude_modules" not in fields:
        targets = Targets(tuple(case.layers[target].name for target in adapter.targets))
    given: dict[str, Any] = {"exclude_modules": list(targets.excluded)} if targets.excluded else {}
    blueprint = BLUEPRINTS[case.sweep.layer]
    if case.setting("save_head") and "modules_to_save" in fields:
        given["modules_to_save"] = [blueprint.head]
    if blueprint.task == "CAUSAL_LM" or case.setting("save_head"):  # a classifier's task has PEFT save its head
        given["task_type"] = blueprint.task
    given["target_modules"] = targets.modules if isinstance(targets.modules, str) else list(targets.modules)
    if targets.blocks:
        given |= {"layers_to_transform": list(targets.blocks), "layers_pattern": targets.container}
    if getattr(config, "feedforward_modules", None) and targets.modules != "all-linear":
        given["feedforward_modules"] = given["target_modules"]
    if getattr(config, "alora_invocation_tokens", None) and blueprint.task == "CAUSAL_LM":
        given["alora_invocation_tokens"] = list(invocation(case, adapter.name))
    return dataclasses.replace(config, **given)
