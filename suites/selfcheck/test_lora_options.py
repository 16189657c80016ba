"""No option of PEFT's LoraConfig is a blank.

Each is set by a variant, changes no arithmetic, or is tested where the reason says.
"""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("peft")

from peft import LoraConfig

from peftcheck import generator
from peftcheck.case import Sweep
from peftcheck.implementations.peft import Peft
from peftcheck.implementations.peft.methods import METHODS
from peftcheck.implementations.peft.whole_models import as_users_write

COVERED = {
    "r": "lora",
    "lora_alpha": "lora",
    "lora_dropout": "lora",
    "target_modules": "lora",
    "use_rslora": "lora.rslora",
    "rank_pattern": "lora.pattern",
    "alpha_pattern": "lora.pattern",
    "lora_bias": "lora.bias",
    "use_dora": "lora.dora",
    "init_lora_weights": "lora.pissa",
    "eva_config": "lora.eva",
    "corda_config": "lora.corda-kpm",
    "velora_config": "lora.velora",
    "monteclora_config": "lora.monteclora",
    "kasa_config": "lora.kasa",
    "use_bdlora": "lora.bdlora",
    "target_parameters": "lora.parameter",
    "alora_invocation_tokens": "lora.alora",
    "lora_ga_config": "lora.ga",
    "arrow_config": "lora.arrow",
}
"""Options that a variant sets away from their default, in some of the cases drawn for it."""

NO_ARITHMETIC = {
    "task_type": "which class wraps the model; the layers are the same",
    "peft_type": "the method's own name",
    "auto_mapping": "where the base's class is found again when loading",
    "peft_version": "which release wrote the configuration",
    "base_model_name_or_path": "a name, for loading",
    "revision": "a name, for loading",
    "inference_mode": "what requires gradients",
    "bias": "which of the base's own biases are trained; the adapted layer computes the same",
    "runtime_config": "where an intermediate result is held for a moment",
    "fan_in_fan_out": "set by PEFT itself from the layer's class, whatever is given: the layer conv1d-transformers has it",
    "layers_pattern": "which container `layers_to_transform` counts in",
}
"""Options that move no number of an adapted layer: why."""

ELSEWHERE = {
    "megatron_config": "needs megatron's parallel layers, which are built on devices in a process group",
    "megatron_core": "the module of megatron's that those layers come from",
    "loftq_config": "loftq_init moves the weight to an accelerator first: test_quantized_starts.py",
    "use_qalora": "read by the layers of GPTQ only, of which there is no quantizer here yet: test_quantized_starts.py has it",
    "qalora_group_size": "of use_qalora",
}
"""Options that need what is not to be had on every machine: why, and which test speaks of them."""

WITHOUT_CELLS = {
    "trainable_token_indices": "test_trained_rows.py: two methods in one adapter; the rows alone are a variant",
    "layer_replication": "test_replicated_layers.py: a base of other blocks, with weights that have no merged value",
    "ensure_weight_tying": "test_tied_weights.py: two layers that are one weight",
}
"""Options that no single layer shows: why, and which test has closed forms of them on a whole Llama."""

WHOLE = {
    "exclude_modules": "spelling 'names'",
    "layers_to_transform": "spelling 'blocks'",
    "modules_to_save": "save_head",
}
"""Options that cases of whole models set, whatever the variant: by which setting."""


def offered() -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(LoraConfig)}


def default(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_every_option_has_a_variant_or_a_reason() -> None:
    missing = set(offered()) - set(COVERED) - set(NO_ARITHMETIC) - set(ELSEWHERE) - set(WHOLE) - set(WITHOUT_CELLS)
    assert not missing, f"LoraConfig has options that nothing here speaks of: {', '.join(sorted(missing))}"


def test_every_option_is_classified_once() -> None:
    kinds = (set(COVERED), set(NO_ARITHMETIC), set(ELSEWHERE), set(WHOLE), set(WITHOUT_CELLS))
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize("option", [option for option, variant in COVERED.items() if variant in METHODS])
def test_the_variant_sets_the_option(option: str) -> None:
    method = METHODS[COVERED[option]]
    layer = sorted(method.variant.layers)[0]
    sweep = Sweep("peft", method.variant.name, layer, "float32")
    usual = default(offered()[option])
    for index in range(20):
        case = generator.draw(method.variant, sweep, 0, index)
        for adapter in case.adapters:
            config = method.config(adapter, [case.layers[target].name for target in adapter.targets])
            if getattr(config, option) != usual:
                return
    pytest.fail(f"no case of {method.variant.name} sets {option}")


@pytest.mark.parametrize("option", sorted(WHOLE))
def test_cases_of_whole_models_set_the_option(option: str) -> None:
    variant, usual, found = Peft().variants()["lora"], default(offered()[option]), set()
    for model in ("model.llama", "model.bert"):
        for index in range(30):
            case = generator.draw(variant, Sweep("peft", "lora", model, "float32"), 0, index)
            for adapter in case.adapters:
                plain = METHODS["lora"].config(adapter, [case.layers[target].name for target in adapter.targets])
                if getattr(as_users_write(plain, case, adapter), option) != usual:
                    found.add(model)
    assert found == {"model.llama", "model.bert"}
