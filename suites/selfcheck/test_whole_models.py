"""Whole models: their blueprints are what transformers builds, their targets mean what users write."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from peftcheck import engine, generator, models, transformer_models
from peftcheck.case import MODELS, AdapterSpec, Case, Sweep, decode, encode
from peftcheck.errors import UsageError
from peftcheck.implementations.reference import Reference
from peftcheck.law import laws
from peftcheck.reductions import of
from peftcheck.staging import set_up
from peftcheck.targets import Targets, meant, spelled

REFERENCE = Reference()
VARIANT = REFERENCE.variants()["lora"]
_KINDS = (nn.Linear, nn.Embedding, nn.Conv2d, nn.LayerNorm)


def drawn(kind: str, count: int, seed: int = 3) -> list[Case]:
    sweep = Sweep("reference", "lora", kind, "float32")
    return [generator.draw(VARIANT, sweep, seed, index) for index in range(count)]


@pytest.mark.parametrize("kind", MODELS)
def test_a_blueprint_names_every_layer_that_transformers_builds(kind):
    for chosen in ({"blocks": 1, "hidden": 24}, {"blocks": 2, "hidden": 16, "tied": False, "bias": True}):
        settings = {name: chosen.get(name, o[0]) for name, o in transformer_models.BLUEPRINTS[kind].settings.items()}
        layers = transformer_models.layers(kind, settings)
        extra = tuple(sorted(settings.items()))
        case = Case(Sweep("none", "lora", kind, "float32"), 0, 0, layers, (), "float32", "normal", extra=extra)
        model = models.build(case)
        built = {n for n, m in model.named_modules() if isinstance(m, _KINDS) or type(m).__name__ == "Conv1D"}
        assert built == {spec.name for spec in layers}
        for spec in layers:
            layer = model.get_submodule(spec.name)
            assert tuple(layer.weight.shape) == spec.weight_shape, spec
            assert (layer.bias is not None if hasattr(layer, "bias") else False) == spec.bias, spec
            assert spec.tied is None or layer.weight is model.get_submodule(spec.tied).weight
            if spec.kind == "conv2d":
                assert (layer.kernel_size, layer.stride, layer.padding) == (spec.kernel, spec.stride, spec.padding)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_a_function_of_its_token(kind):
    for case in drawn(kind, 3):
        again, _ = decode(encode(case, "merge.forward"))
        assert again == case
        first, second = (models.tensors(models.build(one)) for one in (case, again))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", MODELS)
def test_inputs_are_those_that_each_layer_is_given_in_the_model(kind):
    case = drawn(kind, 1)[0]
    stage = set_up(REFERENCE, case)
    assert set(stage.inputs) == {spec.name for spec in case.layers}
    model = models.build(case)
    for name, x in stage.inputs.items():
        with torch.no_grad():
            assert torch.equal(model.get_submodule(name)(x), stage.pristine_outputs[name])


def test_layers_that_are_not_those_of_the_model_are_refused():
    case = drawn("model.llama", 1)[0]
    with pytest.raises(UsageError, match="layers"):
        models.build(replace(case, layers=case.layers[:-1]))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (Targets(("c_proj",)), {"attn.c_proj", "mlp.c_proj"}),
        (Targets(("mlp.c_proj",)), {"mlp.c_proj"}),
        (Targets(r"(?:.*\.)?(?:c_attn)"), {"attn.c_attn"}),
        (Targets(("c_attn",), (1,), "h"), set()),
        (Targets("all-linear"), {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_a_spelling_means_what_users_mean_by_it(targets, expected):
    settings = {"hidden": 16, "blocks": 1, "tied": True}
    layers = transformer_models.layers("model.gpt2", settings)
    extra = tuple(sorted(settings.items()))
    case = Case(Sweep("none", "lora", "model.gpt2", "float32"), 0, 0, layers, (), "float32", "normal", extra=extra)
    assert meant(case, targets) == {f"transformer.h.0.{name}" for name in expected}


@pytest.mark.parametrize("kind", MODELS)
def test_targets_are_spelled_so_that_they_mean_the_layers_of_the_case(kind):
    spellings = set()
    for case in drawn(kind, 40):
        for adapter in case.adapters:
            targets = spelled(case, adapter)
            assert meant(case, targets) == {case.layers[t].name for t in adapter.targets}
            spellings.add(
                "all" if targets.modules == "all-linear" else (isinstance(targets.modules, str), bool(targets.blocks))
            )
    assert len(spellings) >= (2 if kind == "model.resnet" else 4)


def test_a_block_whose_number_begins_anothers_is_told_apart():
    settings = {"hidden": 16, "blocks": 11, "bias": False, "tied": True}
    layers = transformer_models.layers("model.llama", settings)
    extra = tuple(sorted({**settings, "spelling": "blocks"}.items()))
    wanted = tuple(i for i, spec in enumerate(layers) if spec.name == "model.layers.1.mlp.up_proj")
    adapter = AdapterSpec("default", wanted)
    case = Case(
        Sweep("none", "lora", "model.llama", "float32"), 0, 0, layers, (adapter,), "float32", "normal", extra=extra
    )
    assert spelled(case, adapter) == Targets(("up_proj",), (1,), "layers")


def test_shrinking_keeps_a_model_whole():
    seen = 0
    for case in drawn("model.llama", 6):
        for reduction in of(case, "merge.oracle"):
            for candidate in reduction(case, VARIANT):
                if candidate.case.setting("blocks") == 11:
                    continue  # slow to build, and like the others
                settings = transformer_models.settings(candidate.case)
                assert candidate.case.layers == transformer_models.layers("model.llama", settings)
                seen += 1
    assert seen > 20


def test_layers_alone_keep_their_own_laws_and_models_theirs():
    case = next(c for c in drawn("model.bert", 1))
    chosen = laws("attach.targets", "refuse.merge")
    outcomes = {o.law: o.status for o in engine.check(REFERENCE, case, chosen)}
    assert outcomes == {"attach.targets": "pass", "refuse.merge": "skip"}
