"""No method of the installed PEFT is a blank: each that adapts layers or parts of models has a variant, others a reason."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from peft import PeftType
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peftcheck import suite, walk
from peftcheck.case import Sweep
from peftcheck.implementations.peft import Peft, methods
from peftcheck.law import laws

PROMPTS = {
    "PROMPT_TUNING": "learned tokens before the input",
    "MULTITASK_PROMPT_TUNING": "learned tokens before the input, shared between tasks",
    "P_TUNING": "learned tokens before the input, made by an encoder",
    "PREFIX_TUNING": "learned keys and values before those of the attention",
    "CPT": "learned tokens before the input, with their own loss",
    "CARTRIDGE": "a trained cache of keys and values before those of the attention",
}
"""Methods that adapt no layer: they change what the model reads, and there is nothing to merge."""


def offered() -> set[str]:
    return {kind.value for kind in PeftType} | {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}


def covered() -> set[str]:
    return {name.partition(".")[0].upper() for name in methods.METHODS}


def test_every_method_has_a_variant_or_a_reason():
    missing = offered() - covered() - set(PROMPTS)
    assert not missing, f"PEFT offers methods without a variant: {', '.join(sorted(missing))}"


def test_no_reason_outlives_its_method():
    assert not covered() & set(PROMPTS)
    assert set(PROMPTS) <= offered()


def test_what_is_called_prompt_learning_is_what_peft_calls_so():
    declared = {
        kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(config, PromptLearningConfig)
    }
    assert declared == set(PROMPTS) & offered()


def test_a_method_without_its_package_is_absent(monkeypatch):
    monkeypatch.setattr(walk, "find_spec", lambda name: None)
    sweep = Sweep("peft", "adamss", "linear", "float32")
    one = walk.Walk(Peft(), sweep, {law.name: law for law in laws("merge.oracle")}, suite.PROFILES["quick"], 0)
    assert one.run()["merge.oracle"].state == "absent"
