"""No option of any method of PEFT's is a blank: a variant sets it, or it stands here with a reason.

LoRA's own are in test_lora_options.py. A release that adds a method or a field fails here until it is one of the two.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.config import PeftConfig, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora

from peftcheck import generator
from peftcheck.case import Sweep
from peftcheck.implementations.peft.methods import METHODS

EVERYWHERE = {
    "target_modules": "which layers: every variant is asked of one layer of several",
    "exclude_modules": "which layers: taken out of the targets by code that all tuners share, under test with LoRA",
    "layers_to_transform": "which layers, by number: code that all tuners share; whole models spell their targets so",
    "layers_pattern": "which container `layers_to_transform` counts in; whole models spell it",
    "modules_to_save": "which modules are trained as they are; whole models save their heads so",
    "fan_in_fan_out": "set by PEFT itself from the layer's class: the layer conv1d-transformers has it",
    "bias": "which of the base's own biases are trained; the adapted layer computes the same",
    "init_weights": "where training starts; the values under test are written into the tensors afterwards",
    "projection_prng_key": "from which seed the frozen projections are drawn: others of them, the same arithmetic",
    "random_seed": "from which seed something is drawn: other values, the same arithmetic",
    "runtime_config": "where an intermediate result is held for a moment",
}
"""Fields of many methods that move no number of an adapted layer: why."""

OWN = {
    (
        "ADALORA",
        "deltaT",
    ): "when the budget is reallocated, in update_and_allocate, which the user calls while training",
    ("ADALORA", "beta1"): "of the importance that reallocation goes by",
    ("ADALORA", "beta2"): "of the importance that reallocation goes by",
    ("ADALORA", "orth_reg_weight"): "of the loss that is added in training",
    ("ADALORA", "use_dora"): "inherited from LoRA, refused: test_adalora_refuses_dora",
    ("ADALORA", "target_parameters"): "inherited from LoRA, crashes: test_known_issue_adalora_crashes_on_parameters",
    ("ADALORA", "layer_replication"): "read by LoraModel, which AdaLoraModel is: test_replicated_layers.py",
    ("ADALORA", "trainable_token_indices"): "read by code that all tuners share: test_trained_rows.py",
    ("ADALORA", "megatron_core"): "of megatron_config, which is ignored",
    (
        "ADAMSS",
        "use_asa",
    ): "which subspaces get gradients while training, chosen by the user's calls; the forward is the same",
    ("ADAMSS", "asa_target_subspaces"): "of use_asa",
    ("ADAMSS", "init_warmup"): "of use_asa",
    ("ADAMSS", "final_warmup"): "of use_asa",
    ("ADAMSS", "mask_interval"): "of use_asa",
    ("ADAMSS", "asa_importance_beta"): "of use_asa",
    ("ADAMSS", "asa_uncertainty_beta"): "of use_asa",
    ("ADAMSS", "asa_schedule_exponent"): "of use_asa",
    (
        "ADAMSS",
        "svd_threshold",
    ): "how many directions a subspace gets at the start: factors of other shapes, the same products",
    ("DEFT", "init_scale"): "where training starts",
    (
        "FROD",
        "regularization_alpha",
    ): "of the decomposition that the frozen basis comes from: another basis, the same products",
    ("FROD", "runtime_offload_base_weight"): "where the base is held while it is not needed",
    ("IA3", "init_ia3_weights"): "where training starts",
    ("LOKR", "rank_dropout_scale"): "of the rank dropout in training",
    ("OSF", "target_svd_config"): "the ranks of rank_pattern, by full names",
    ("POLY", "poly_type"): "there is one value, 'poly'",
    ("PVERA", "sample_at_inference"): "draws at random in evaluation too: no output is due",
    ("PVERA", "generator_seed"): "of what PVeRA draws in training",
    ("SHIRA", "mask_type"): "there is one value, 'random'; other masks are functions of the user's",
    ("TINYLORA", "init_v_bound"): "where training starts",
    ("UNILORA", "init_theta_d_bound"): "where training starts",
    ("VBLORA", "init_vector_bank_bound"): "where training starts",
    ("VBLORA", "init_logits_std"): "where training starts",
    (
        "VBLORA",
        "save_only_topk_weights",
    ): "documented: what is saved is for inference only, other tensors than those trained",
    (
        "SHADOW",
        "shadow_model",
    ): "whose network the shadow's is: one that was saved before, the same states beside the blocks",
    ("SHADOW", "shadow_num_attention_heads"): "of the shadow's own network, whose output is recorded",
    ("SHADOW", "shadow_intermediate_size"): "of the shadow's own network, whose output is recorded",
    ("SHADOW", "auxiliary_loss_weight"): "of a loss that is added in training",
    ("XLORA", "use_trainable_adapters"): "which tensors are trained: the experts too; the same arithmetic",
    ("XLORA", "scaling_pass_value"): "weighs the experts in the pass before, in which PEFT switches them off",
}
"""Fields of one method: why no variant sets them."""

IGNORED = {
    "r": 5,
    "use_rslora": True,
    "rank_pattern": {"a": 2},
    "alpha_pattern": {"a": 50},
    "lora_bias": True,
    "velora_config": lora.VeloraConfig(),
    "alora_invocation_tokens": [1],
    "monteclora_config": lora.MontecloraConfig(),
    "kasa_config": lora.KasaConfig(),
    "use_bdlora": lora.BdLoraConfig(nblocks=1),
    "arrow_config": lora.ArrowConfig(),
    "use_qalora": True,
    "qalora_group_size": 3,
    "init_lora_weights": "pissa",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": lora.EvaConfig(),
    "corda_config": lora.CordaConfig(),
    "lora_ga_config": lora.LoraGAConfig(),
    "megatron_config": {"tensor_parallel": 1},
    "ensure_weight_tying": True,
}
"""What AdaLoRA inherits from LoRA's configuration, takes without a word, and reads nowhere: a value of each."""


def methods() -> dict[str, type[PeftConfig]]:
    """Return the configuration of every method that adapts layers, LoRA's apart."""
    found = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {
        name: config
        for name, config in found.items()
        if not issubclass(config, PromptLearningConfig) and config is not LoraConfig
    }


def fields(config: type) -> dict[str, dataclasses.Field]:
    """Return a configuration's own fields: not those that every configuration has."""
    common = {field.name for field in dataclasses.fields(PeftConfig)}
    return {field.name: field for field in dataclasses.fields(config) if field.name not in common}


def default(field: dataclasses.Field) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


@cache
def varied() -> frozenset[tuple[type, str]]:
    """Return the fields that some case of some variant sets away from their default, by configuration."""
    found: set[tuple[type, str]] = set()
    for name, method in METHODS.items():
        for layer in sorted(method.variant.layers | method.variant.within)[:4] if not method.mixed else ():
            sweep = Sweep("peft", name, layer, sorted(method.variant.dtypes)[0])
            for index in range(15):
                case = generator.draw(method.variant, sweep, 0, index)
                for adapter in case.adapters:
                    made = method.config(adapter, [case.layers[target].name for target in adapter.targets])
                    found |= {
                        (type(made), key)
                        for key, field in fields(type(made)).items()
                        if getattr(made, key) != default(field)
                    }
    return frozenset(found)


def unset(name: str) -> set[str]:
    config = methods()[name]
    return {key for key in fields(config) if (config, key) not in varied()}


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_option_has_a_variant_or_a_reason(name: str) -> None:
    reasons = (
        set(EVERYWHERE)
        | {key for method, key in OWN if method == name}
        | (set(IGNORED) if name == "ADALORA" else set())
    )
    missing = unset(name) - reasons
    assert not missing, (
        f"{name} has options that no variant sets and nothing here speaks of: {', '.join(sorted(missing))}"
    )


def test_no_reason_outlives_its_option() -> None:
    gone = [(name, key) for name, key in OWN if name in methods() and key not in fields(methods()[name])]
    assert not gone
    needless = [(name, key) for name, key in OWN if name in methods() and key not in unset(name)]
    assert not needless, "a variant sets these: no reason is needed"
    assert set(IGNORED) <= set(fields(AdaLoraConfig))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def adalora(**options) -> tuple[Tensor, int]:
    """Return the output of an AdaLoRA with given values, and how many tensors the model holds."""
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["a", "b"], total_step=10, init_r=3, lora_alpha=5, **options)
    model = get_peft_model(Pair(), config, "x").eval()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape))
    return model(torch.ones(2, 6)), len(model.state_dict())


@pytest.mark.parametrize("option", sorted(IGNORED))
@pytest.mark.filterwarnings("ignore")
def test_what_adalora_is_said_to_ignore_changes_nothing(option: str) -> None:
    (plain, tensors), (output, held) = adalora(), adalora(**{option: IGNORED[option]})
    assert torch.equal(plain, output) and tensors == held


@pytest.mark.filterwarnings("ignore")
def test_adalora_refuses_dora() -> None:
    with pytest.raises(ValueError, match="does not support DoRA"):
        adalora(use_dora=True)


@pytest.mark.filterwarnings("ignore")
def test_known_issue_adalora_crashes_on_parameters() -> None:
    """Right: a refusal before anything is changed, or AdaLoRA on bare parameters; no other method has the option.

    tuners/tuners_utils.py, BaseTuner._create_and_replace_parameter refuses clearly and is called from nowhere:
    _inject_parameters hands parameter_name to _create_and_replace, which AdaLoRA's does not take. TypeError, with the
    layers wrapped by then. (Reported: not found.)
    """
    model = Pair()
    config = AdaLoraConfig(target_modules=["a"], target_parameters=["b.weight"], total_step=10)
    with pytest.raises(TypeError, match="parameter_name"):
        get_peft_model(model, config)
    assert not isinstance(model.a, nn.Linear), "fixed: nothing is wrapped before the refusal"


def test_only_lora_and_what_inherits_its_configuration_targets_parameters() -> None:
    assert {name for name in methods() if "target_parameters" in fields(methods()[name])} == {"ADALORA"}
