"""Whole small models of transformers, from configurations of their own: nothing is downloaded.

A blueprint says, without importing transformers, which layers a model has; what is adapted in it is among the layer
kinds that are checked alone. What only a whole model has is under test here: its structure, its sharing of weights,
and how a library finds the layers that it is asked for. Values are judged layer by layer, on recorded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftcheck import values
from peftcheck.case import EMBEDDINGS, PARTS, Case, LayerSpec
from peftcheck.errors import UsageError
from peftcheck.rounding import DTYPES

Settings = Mapping[str, Any]
_VOCABULARY, _POSITIONS, _LABELS, _IMAGE, _HEADS, _KEY_HEADS = 32, 16, 3, 8, 2, 1


@dataclass(frozen=True)
class Blueprint:
    """A model: its classes in transformers, the arguments of its configuration, its layers.

    `groups`: layers as users name them, by the ends of their names. `blocks`: what the list of blocks is called.
    `head`: the module that turns features into the result, which methods leave alone unless asked; `task`: what
    the model is for, as a library may want to be told. `settings`: the choices there are.
    """

    config: str
    model: str
    arguments: Callable[[Settings], dict[str, Any]]
    layers: Callable[[Settings], Iterator[LayerSpec]]
    groups: tuple[tuple[str, ...], ...]
    blocks: str
    head: str
    task: str | None
    settings: Mapping[str, tuple[Any, ...]]
    pixels: int = 0  # the side of the images that it takes; 0: it takes ids of tokens


def _linear(name: str, n_in: int, n_out: int, bias: bool = True, tied: str | None = None) -> LayerSpec:
    return LayerSpec(name, "linear", n_in, n_out, bias=bias, tied=tied)


def _norm(name: str, n: int) -> LayerSpec:
    return LayerSpec(name, "layernorm", n, n, bias=True)


def _llama(s: Settings) -> Iterator[LayerSpec]:
    n, bias = s["hidden"], s["bias"]
    yield LayerSpec("model.embed_tokens", "embedding", _VOCABULARY, n)
    for block in range(s["blocks"]):
        at = f"model.layers.{block}"
        for name, width in (("q", n), ("k", n // 2), ("v", n // 2), ("o", n)):
            yield _linear(f"{at}.self_attn.{name}_proj", n, width, bias)
        for name, n_in, n_out in (("gate", n, 2 * n), ("up", n, 2 * n), ("down", 2 * n, n)):
            yield _linear(f"{at}.mlp.{name}_proj", n_in, n_out, bias)
    yield _linear("lm_head", n, _VOCABULARY, False, "model.embed_tokens" if s["tied"] else None)
    inside = {"attention.llama": ".self_attn", "block.llama": ""}.get(s.get("part"))
    for block in range(s["blocks"] if inside is not None else 0):
        name = f"model.layers.{block}{inside}"
        yield LayerSpec(name, s["part"], n, n, bias, groups=_KEY_HEADS, heads=_HEADS, causal=True)


def _llama_arguments(s: Settings) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": s["hidden"],
        "intermediate_size": 2 * s["hidden"],
        "num_hidden_layers": s["blocks"],
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_HEADS,
        "max_position_embeddings": _POSITIONS,
        "attention_bias": s["bias"],
        "mlp_bias": s["bias"],
        "tie_word_embeddings": s["tied"],
        "attn_implementation": "eager",
    }


def _bert(s: Settings) -> Iterator[LayerSpec]:
    n, at = s["hidden"], "bert.embeddings"
    yield LayerSpec(f"{at}.word_embeddings", "embedding", _VOCABULARY, n, padding_idx=0)
    yield LayerSpec(f"{at}.position_embeddings", "embedding", _POSITIONS, n)
    yield LayerSpec(f"{at}.token_type_embeddings", "embedding", 2, n)
    yield _norm(f"{at}.LayerNorm", n)
    for block in range(s["blocks"]):
        at = f"bert.encoder.layer.{block}"
        for name in ("query", "key", "value"):
            yield _linear(f"{at}.attention.self.{name}", n, n)
        yield _linear(f"{at}.attention.output.dense", n, n)
        yield _norm(f"{at}.attention.output.LayerNorm", n)
        yield _linear(f"{at}.intermediate.dense", n, 2 * n)
        yield _linear(f"{at}.output.dense", 2 * n, n)
        yield _norm(f"{at}.output.LayerNorm", n)
    yield _linear("bert.pooler.dense", n, n)
    yield _linear("classifier", n, _LABELS)


def _bert_arguments(s: Settings) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": s["hidden"],
        "intermediate_size": 2 * s["hidden"],
        "num_hidden_layers": s["blocks"],
        "num_attention_heads": _HEADS,
        "max_position_embeddings": _POSITIONS,
        "layer_norm_eps": 1e-5,  # as torch has it
        "num_labels": _LABELS,
        "attn_implementation": "eager",
    }


def _gpt2(s: Settings) -> Iterator[LayerSpec]:
    n = s["hidden"]
    yield LayerSpec("transformer.wte", "embedding", _VOCABULARY, n)
    yield LayerSpec("transformer.wpe", "embedding", _POSITIONS, n)
    for block in range(s["blocks"]):
        at = f"transformer.h.{block}"
        yield _norm(f"{at}.ln_1", n)
        for name, n_in, n_out in (("attn.c_attn", n, 3 * n), ("attn.c_proj", n, n)):
            yield LayerSpec(f"{at}.{name}", "conv1d-transformers", n_in, n_out, bias=True)
        yield _norm(f"{at}.ln_2", n)
        for name, n_in, n_out in (("mlp.c_fc", n, 2 * n), ("mlp.c_proj", 2 * n, n)):
            yield LayerSpec(f"{at}.{name}", "conv1d-transformers", n_in, n_out, bias=True)
    yield _norm("transformer.ln_f", n)
    yield _linear("lm_head", n, _VOCABULARY, False, "transformer.wte" if s["tied"] else None)


def _gpt2_arguments(s: Settings) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "n_embd": s["hidden"],
        "n_inner": 2 * s["hidden"],
        "n_layer": s["blocks"],
        "n_head": _HEADS,
        "n_positions": _POSITIONS,
        "tie_word_embeddings": s["tied"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_implementation": "eager",
    }


def _vit(s: Settings) -> Iterator[LayerSpec]:
    n, patch = s["hidden"], (_IMAGE // 2,) * 2
    name, size = "vit.embeddings.patch_embeddings.projection", (_IMAGE,) * 2
    yield LayerSpec(name, "conv2d", 3, n, True, patch, stride=patch, padding=(0, 0), dilation=(1, 1), size=size)
    for block in range(s["blocks"]):
        at = f"vit.layers.{block}"
        for name in ("q", "k", "v"):
            yield _linear(f"{at}.attention.{name}_proj", n, n, s["bias"])
        yield _linear(f"{at}.attention.o_proj", n, n)
        yield _norm(f"{at}.layernorm_before", n)
        yield _norm(f"{at}.layernorm_after", n)
        yield _linear(f"{at}.mlp.fc1", n, 2 * n)
        yield _linear(f"{at}.mlp.fc2", 2 * n, n)
    yield _norm("vit.layernorm", n)
    yield _linear("classifier", n, _LABELS)


def _vit_arguments(s: Settings) -> dict[str, Any]:
    return {
        "hidden_size": s["hidden"],
        "intermediate_size": 2 * s["hidden"],
        "num_hidden_layers": s["blocks"],
        "num_attention_heads": _HEADS,
        "image_size": _IMAGE,
        "patch_size": _IMAGE // 2,
        "qkv_bias": s["bias"],
        "layer_norm_eps": 1e-5,  # as torch has it
        "num_labels": _LABELS,
        "attn_implementation": "eager",
    }


def _convolution(name: str, n_in: int, n_out: int, kernel: int, stride: int, size: int) -> LayerSpec:
    two, padding = (kernel,) * 2, (kernel // 2,) * 2
    return LayerSpec(name, "conv2d", n_in, n_out, False, two, (stride,) * 2, padding, (1, 1), size=(size,) * 2)


def _resnet(s: Settings) -> Iterator[LayerSpec]:
    n, size = s["hidden"] // 2, _IMAGE // 2  # the pooling after the first convolution halves the image once more
    yield _convolution("resnet.embedder.embedder.convolution", 3, n, 7, 2, 2 * _IMAGE)
    for stage in range(s["blocks"]):
        at, width = f"resnet.encoder.stages.{stage}.layers.0", n * 2**stage
        wider, stride = (width, 1) if stage == 0 else (2 * (width // 2), 2)
        before = width if stage == 0 else width // 2
        if stage:
            yield _convolution(f"{at}.shortcut.convolution", before, wider, 1, 2, size)
        yield _convolution(f"{at}.layer.0.convolution", before, wider, 3, stride, size)
        size = -(-size // stride)
        yield _convolution(f"{at}.layer.1.convolution", wider, wider, 3, 1, size)
    yield _linear("classifier.1", n * 2 ** (s["blocks"] - 1), _LABELS)


def _resnet_arguments(s: Settings) -> dict[str, Any]:
    n = s["hidden"] // 2
    return {
        "embedding_size": n,
        "hidden_sizes": [n * 2**stage for stage in range(s["blocks"])],
        "depths": [1] * s["blocks"],
        "layer_type": "basic",
        "num_labels": _LABELS,
    }


_SIZES = {"hidden": (16, 16, 24), "blocks": (2, 2, 2, 1)}
BLUEPRINTS: Mapping[str, Blueprint] = {
    "model.llama": Blueprint(
        "LlamaConfig",
        "LlamaForCausalLM",
        _llama_arguments,
        _llama,
        (
            ("q_proj", "v_proj"),
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            ("gate_proj", "up_proj", "down_proj"),
            ("down_proj",),
            ("self_attn.q_proj", "mlp.up_proj"),
            ("embed_tokens",),
            ("embed_tokens", "q_proj"),
        ),
        "layers",
        "lm_head",
        "CAUSAL_LM",
        # from eleven blocks on, the number of one block is the beginning of another's
        {**_SIZES, "blocks": (2, 2, 2, 1, 2, 11), "bias": (False, True), "tied": (True, True, False)},
    ),
    "model.bert": Blueprint(
        "BertConfig",
        "BertForSequenceClassification",
        _bert_arguments,
        _bert,
        (
            ("query", "value"),
            ("query", "key", "value"),
            ("dense",),
            ("output.dense",),
            ("attention.output.dense",),
            ("word_embeddings",),
            ("word_embeddings", "key"),
            ("LayerNorm",),
        ),
        "layer",
        "classifier",
        "SEQ_CLS",
        _SIZES,
    ),
    "model.gpt2": Blueprint(
        "GPT2Config",
        "GPT2LMHeadModel",
        _gpt2_arguments,
        _gpt2,
        (
            ("c_attn",),
            ("c_attn", "c_proj"),
            ("c_proj",),
            ("mlp.c_proj",),
            ("c_fc",),
            ("wte",),
            ("wpe", "c_fc"),
            ("ln_1", "ln_2"),
        ),
        "h",
        "lm_head",
        "CAUSAL_LM",
        {**_SIZES, "tied": (True, True, False)},
    ),
    "model.vit": Blueprint(
        "ViTConfig",
        "ViTForImageClassification",
        _vit_arguments,
        _vit,
        (
            ("q_proj", "v_proj"),
            ("fc1", "fc2"),
            ("attention.o_proj",),
            ("projection",),
            ("projection", "q_proj"),
            ("layernorm_before",),
        ),
        "layers",
        "classifier",
        None,
        {**_SIZES, "bias": (True, False)},
        pixels=_IMAGE,
    ),
    "model.resnet": Blueprint(
        "ResNetConfig",
        "ResNetForImageClassification",
        _resnet_arguments,
        _resnet,
        (("convolution",), ("shortcut.convolution", "0.convolution"), ("1.convolution",), ("embedder.convolution",)),
        "stages",
        "classifier.1",
        None,
        _SIZES,
        pixels=2 * _IMAGE,
    ),
}


def settings(case: Case) -> dict[str, Any]:
    """Return the settings of a case's model: its own, and the first choice of each that it does not name."""
    choices = BLUEPRINTS[case.sweep.layer].settings
    chosen = {name: case.setting(name, options[0]) for name, options in choices.items()}
    return {**chosen, "part": case.setting("part")}


def layers(kind: str, chosen: Settings) -> tuple[LayerSpec, ...]:
    """Return the layers of a model that are of a kind which is checked alone, in the model's order, then its parts.

    Parts are modules that hold layers; there are those of the kind that the setting `part` names.
    """
    return tuple(BLUEPRINTS[kind].layers(chosen))


def kinds(kind: str) -> frozenset[str]:
    """Return the layer kinds that users adapt in a model, and those of its parts that methods do."""
    blueprint = BLUEPRINTS[kind]
    chosen = {name: options[0] for name, options in blueprint.settings.items()}
    parts = {spec.kind for part in PARTS for spec in layers(kind, {**chosen, "part": part}) if spec.kind == part}
    ends = tuple(f".{end}" for group in blueprint.groups for end in group)
    return frozenset(spec.kind for spec in layers(kind, chosen) if spec.name.endswith(ends)) | parts


def having(accepted: frozenset[str]) -> frozenset[str]:
    """Return the models in which users adapt a layer of one of these kinds."""
    return frozenset(model for model in BLUEPRINTS if kinds(model) & accepted)


@cache
def missing(kind: str) -> str | None:
    """Return why a model cannot be had here: no transformers, or one that builds it from other layers; else None."""
    try:
        import transformers
    except ModuleNotFoundError:
        return "not installed: transformers"
    choices = BLUEPRINTS[kind].settings
    chosen = {name: options[0] for name, options in choices.items()}
    held = dict(_configured(transformers, kind, chosen).named_modules())
    for spec in layers(kind, chosen):
        if spec.name not in held or tuple(held[spec.name].weight.shape) != spec.weight_shape:
            return f"transformers {transformers.__version__} builds {kind} from other layers than transformers 5"
    return None


def _configured(library: ModuleType, kind: str, chosen: Settings) -> nn.Module:
    blueprint = BLUEPRINTS[kind]
    config = getattr(library, blueprint.config)(**blueprint.arguments(chosen))
    return getattr(library, blueprint.model)(config)


def build(case: Case) -> nn.Module:
    """Build the model of a case from its configuration, every parameter filled from the case's values.

    Raises UsageError where transformers cannot build it, or where the case's layers are not those of the model.
    """
    kind, chosen = case.sweep.layer, settings(case)
    if reason := missing(kind):
        raise UsageError(f"layer {kind} cannot be built: {reason}; pip install 'transformers>=5'")
    if case.layers != layers(kind, chosen):
        raise UsageError(f"the case's layers are not those of {kind}: was it made by another peftcheck?")
    import transformers

    model = _configured(transformers, kind, chosen).to(DTYPES[case.sweep.dtype])
    specs = {spec.name: spec for spec in case.layers}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, _, own = name.rpartition(".")
            spec = specs.get(owner, LayerSpec(owner, "layernorm", parameter.shape[-1], parameter.shape[-1]))
            parameter.copy_(values.base(case, spec, own, tuple(parameter.shape)))
    return model.train(case.train)


def arguments(case: Case) -> list[Tensor]:
    """Return what the model's forward takes: ids of tokens (batch, length), or pixels (batch, 3, side, side)."""
    side = BLUEPRINTS[case.sweep.layer].pixels
    batch = case.batch or (1,)
    first = case.layers[0]
    if side:
        return [values.activations(case, first, (batch[0], 3, side, side)).to(DTYPES[case.sweep.dtype])]
    token = next(spec for spec in case.layers if spec.kind in EMBEDDINGS)
    return [values.indices(case, token, batch if len(batch) == 2 else (*batch[:1], 3))]
