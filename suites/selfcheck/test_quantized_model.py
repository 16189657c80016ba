"""A small transformers model, quantized as users do it: from a configuration, saved weights and no flags of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peftcheck import quantizers
from peftcheck.budgets import quantized
from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.measurement import compare, worst
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.rounding import DTYPES, judged, leaf, precision

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
pytest.importorskip("accelerate")
torch.set_num_threads(1)
RANK, ALPHA = 4, 8.0


def bits(**options) -> transformers.BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(**options)


def four(kind: str, dtype: torch.dtype, **options) -> transformers.BitsAndBytesConfig:
    given = {"bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": dtype, **options}
    return bits(load_in_4bit=True, **given)


def ao(name: str, **options) -> transformers.TorchAoConfig:
    types = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quant_type=getattr(types, name)(**options))


# By quantizer: the configuration, the flag that transformers then sets, the module of the layers that PEFT should take.
USED = {
    "bitsandbytes.int8": (lambda dtype: bits(load_in_8bit=True), "is_loaded_in_8bit", "peft.tuners.lora.bnb"),
    "bitsandbytes.nf4": (lambda dtype: four("nf4", dtype), "is_loaded_in_4bit", "peft.tuners.lora.bnb"),
    "bitsandbytes.nf4.double": (
        lambda dtype: four("nf4", dtype, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.bfloat16),
        "is_loaded_in_4bit",
        "peft.tuners.lora.bnb",
    ),
    "bitsandbytes.fp4": (lambda dtype: four("fp4", dtype), "is_loaded_in_4bit", "peft.tuners.lora.bnb"),
    "torchao.int8": (lambda dtype: ao("Int8WeightOnlyConfig"), "hf_quantizer", "peft.tuners.lora.torchao"),
    "torchao.int8.dynamic": (
        lambda dtype: ao("Int8DynamicActivationInt8WeightConfig"),
        "hf_quantizer",
        "peft.tuners.lora.torchao",
    ),
    "torchao.float8": (lambda dtype: ao("Float8WeightOnlyConfig"), "hf_quantizer", "peft.tuners.lora.torchao"),
}
SETTINGS = {"blocksize": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the weights of a Llama of two blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    config = transformers.LlamaConfig(
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.05, **sizes
    )
    where = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    return where


def loaded(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """Return the model as transformers loads it with the quantizer's configuration."""
    config = USED[name][0](dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    )


def adapted(model: nn.Module) -> peft.PeftModel:
    """Attach a LoRA to every linear layer of the blocks, and give it values."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    found = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in sorted(found.named_parameters()):
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def due(layer: nn.Module, name: str, dtype: torch.dtype):
    """Return the merged weight of an adapted layer by the closed form, with what the grid may cost."""
    quantizer, base = quantizers.load(name), layer.get_base_layer()
    dense = quantizer.values(base).detach()
    spec = LayerSpec("layer", "linear", dense.shape[1], dense.shape[0])
    factors = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    site = Site(
        spec, AdapterSpec("default", (0,), RANK, ALPHA), {k: leaf(t.detach(), False) for k, t in factors.items()}
    )
    on, store = machine(dtype, factors["A"].dtype, False), precision(dense.dtype)

    def rule(value, error):
        return quantizer.budget(value, error, SETTINGS, store)

    return quantized.merged(on, FORMULAS["lora"], (site,), {"weight": leaf(dense, False)}, rule)["weight"], on


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", USED)
def test_a_model_from_a_configuration_is_adapted_and_merged_within_its_grid(
    folder: Path, name: str, dtype: str
) -> None:
    _, flag, expected = USED[name]
    base = loaded(folder, name, DTYPES[dtype])
    assert getattr(base, flag)
    model, quantizer = adapted(base), quantizers.load(name)
    held = layers(model)
    assert len(held) == 14
    assert {type(layer).__module__ for layer in held.values()} == {expected}
    forms = {key: due(layer, name, DTYPES[dtype]) for key, layer in held.items()}
    facts = {key: quantizer.facts(layer.get_base_layer()) for key, layer in held.items()}
    for layer in held.values():
        form = quantizer.decoded(layer.get_base_layer())
        assert compare("", quantizer.values(layer.get_base_layer()), form.value, judged(form)).holds
    others = {k: t.clone() for k, t in model.state_dict().items() if "layers." not in k and torch.is_tensor(t)}
    model.merge_adapter()
    found = [
        compare(key, quantizer.values(layer.get_base_layer()), form.value, judged(form, machine=on.base.store))
        for (key, layer), (form, on) in zip(held.items(), forms.values(), strict=True)
    ]
    assert worst(found).holds, worst(found)
    assert worst(found).ratio > 0.75
    assert {key: quantizer.facts(layer.get_base_layer()) for key, layer in held.items()} == facts
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in others.items())


def test_a_model_from_a_configuration_exports_quantized_layers(folder: Path) -> None:
    model = adapted(loaded(folder, "bitsandbytes.nf4", torch.float32))
    before = {
        key: quantizers.load("bitsandbytes.nf4").values(one.get_base_layer()) for key, one in layers(model).items()
    }
    exported = model.merge_and_unload()
    assert not layers(exported)
    kinds = {type(module).__name__ for key, module in exported.named_modules() if key.endswith("_proj")}
    assert kinds == {"Linear4bit"}
    for key, start in before.items():
        layer = exported.get_submodule(key.removeprefix("base_model.model."))
        assert not torch.equal(quantizers.load("bitsandbytes.nf4").values(layer), start)


def test_quantos_configuration_is_merged_into_by_nothing(folder: Path) -> None:
    """The layers are quanto's QLinear, which LoRA takes for a linear one: the merge goes through and is discarded."""
    pytest.importorskip("optimum.quanto")
    config = transformers.QuantoConfig(weights="int8")
    where = {"quantization_config": config, "device_map": {"": "cpu"}}
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where))
    held = layers(model)
    assert {type(layer.get_base_layer()).__name__ for layer in held.values()} == {"QLinear"}
    before = {key: layer.get_base_layer().weight.dequantize() for key, layer in held.items()}
    model.merge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight.dequantize(), before[key]) for key, layer in held.items())
