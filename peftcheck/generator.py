"""From a sweep, a seed and an index to a case: everything that 97 real merge defects needed to show.

A case depends on nothing else, and never on the law: a filter cannot change a verdict.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from peftcheck import quantizers, values
from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, MODELS, AdapterSpec, Case, LayerSpec, Poison, Sweep
from peftcheck.errors import HarnessError
from peftcheck.generator_model import model_case
from peftcheck.implementation import Claim, Variant
from peftcheck.oracle import FORMULAS

# Names as an enemy would choose them: prefixes of each other, digits, dots, the library's own words.
_LAYER_NAMES = (
    ("proj", "proj_out", "mlp.proj_in", "mlp.project"),
    ("1", "10", "11", "100"),
    ("block.a", "block.ab", "block.abc", "ba"),
    ("layer", "layer1", "layer10", "sub.layer_"),
    ("default", "base", "weight_", "lora"),
)
_ADAPTER_NAMES = (
    ("default", "other", "third"),
    ("a", "ab", "abc"),
    ("default_1", "default", "default_10"),
    ("lora_", "lora", "adapter"),
    ("x-1", "x-10", "x"),
)
_SIZES = (1, 2, 3, 4, 5, 6, 8, 8, 12, 16, 24)
_LARGE_FAN_IN = (64, 128, 255, 512)
_TRIES = 1000  # layers drawn for one that a quantizer takes
_WIDEST = {"boft": 256}  # quantized inputs of methods that multiply matrices of that width, several for each merge


def draw(variant: Variant, sweep: Sweep, seed: int, index: int, exact: bool = False) -> Case:
    """Return case `index` of a sweep, in the exact (dyadic) regime if asked for and if the method has one."""
    exact = exact and FORMULAS[variant.formula].dyadic
    if sweep.quantizer is not None:
        return _quantized(variant, sweep, seed, index)
    if sweep.layer in MODELS:
        return model_case(variant, sweep, seed, index)
    rng = random.Random(f"{sweep}|{seed}|{index}|{exact}")
    layers = _layers(rng, variant, sweep.layer)
    targets = _targets(rng, layers)
    adapters = _dropping(variant, sweep, f"{seed}|{index}|{exact}", _adapters(rng, variant, layers, targets, exact))
    half = sweep.dtype in ("bfloat16", "float16")
    profile = "dyadic" if exact else _profile(rng, variant, layers, adapters)
    layers = _shortening(variant, layers, f"{sweep}|{seed}|{index}|{exact}", profile)
    return Case(
        sweep,
        seed,
        index,
        layers,
        adapters,
        adapter_dtype="float32" if half and rng.random() < 0.5 else sweep.dtype,
        profile=profile,
        values=rng.randrange(2**32),
        batch=_batch(rng, variant),
        safe=rng.random() < 0.4,
        joint=rng.random() < 0.6,
        cycles=rng.choice([2, 3, 5]),
        poison=Poison(
            rng.choice(["nan", "nan", "inf", "-inf", "overflow", "overflow", "tame"]),
            rng.randrange(8),
            rng.randrange(8),
            rng.randrange(64),
            rng.randrange(4096),
        ),
    )


def _batch(rng: random.Random, variant: Variant) -> tuple[int, ...]:
    """Return the leading shape of the inputs: any, or one of those that the method takes."""
    drawn = rng.choice([(), (1,), (2,), (3,), (2, 3), (1, 2, 2)])
    return drawn if not variant.batches else rng.choice(variant.batches)


def _dropping(variant: Variant, sweep: Sweep, key: str, adapters: tuple[AdapterSpec, ...]) -> tuple[AdapterSpec, ...]:
    """Give all adapters of a case one dropout, where the method has any: drawn apart, so that nothing else moves."""
    if "dropout" not in variant.options or sweep.layer in variant.undropped:
        return adapters
    rng = random.Random(f"{sweep}|{key}|dropout")
    drawn = {
        name: rng.choice(choices) for name, choices in sorted(variant.options.items()) if name.startswith("dropout")
    }
    if not drawn["dropout"]:
        return adapters
    return tuple(replace(a, options=tuple(sorted({**dict(a.options), **drawn}.items()))) for a in adapters)


_HOLD_ROWS = frozenset({"ln_tuning", "trainable_tokens"})


def _shortening(variant: Variant, layers: tuple[LayerSpec, ...], key: str, profile: str) -> tuple[LayerSpec, ...]:
    """Give some embeddings a max_norm, drawn apart: not where an adapter holds rows itself, which may be longer.

    Nor where the base's rows change after they were measured, or overflow when they are; nor where two layers share them,
    since each looking up writes to what the other has saved for its gradient.
    """
    if layers[0].kind not in EMBEDDINGS or variant.formula in _HOLD_ROWS or profile in ("cancelling", "huge"):
        return layers
    rng = random.Random(f"{key}|max_norm")
    found = [replace(spec, max_norm=rng.choice([1.25, 1.25, 4.0])) if rng.random() < 0.2 else spec for spec in layers]
    shared = {name for spec in layers if spec.tied for name in (spec.name, spec.tied)}
    return tuple(replace(spec, max_norm=None) if spec.name in shared else spec for spec in found)


_QUANTIZED_PROFILES = ("onehot", "large", "small", "graded", "extreme", "duplicated")


def _quantized(variant: Variant, sweep: Sweep, seed: int, index: int) -> Case:
    """Return a case on quantized linear layers: sizes that the quantizer takes, settings among the case's extras."""
    declared = quantizers.DECLARED[sweep.quantizer]
    rng = random.Random(f"{sweep}|{seed}|{index}|quantized")
    settings = {key: rng.choice(choices) for key, choices in sorted(declared.options.items())}
    apart = random.Random(f"{sweep}|{seed}|{index}|rare")
    rare = {key: apart.choice(choices) for key, choices in sorted(declared.rare.items())}
    merges = variant.quantizers.get(sweep.quantizer) is Claim.YES
    names = rng.choice(_LAYER_NAMES)[
        : rng.choice([1, 1, 2]) if merges else 1
    ]  # of several, some may merge before one refuses
    layers = tuple(_quantized_layer(rng, variant, declared, settings, name, merges) for name in names)
    few = replace(variant, most_adapters=min(1 if declared.searched else 2, variant.most_adapters))
    adapters = _adapters(rng, few, layers, _targets(rng, layers), False)
    single = len(adapters) == 1
    absurd = {p for p, holds in (("duplicated", single), ("graded", declared.largest < math.inf)) if holds}
    profiles = [p for p in _QUANTIZED_PROFILES if p not in variant.avoids and p not in absurd]
    half = sweep.dtype in ("bfloat16", "float16")
    return Case(
        sweep,
        seed,
        index,
        layers,
        adapters,
        adapter_dtype="float32" if half and rng.random() < 0.5 else sweep.dtype,
        profile=rng.choice([*profiles, *["normal"] * 5]),
        values=rng.randrange(2**32),
        batch=rng.choice([(1,), (2,), (3,), (2, 3)]),
        safe=rng.random() < 0.4,
        joint=rng.random() < 0.6,
        cycles=rng.choice([2, 3, 5]),
        poison=Poison(
            rng.choice(["nan", "inf", "-inf", "overflow", "overflow", "tame"]),
            *(rng.randrange(n) for n in (8, 8, 64, 4096)),
        ),
        extra=tuple(sorted({**settings, **rare}.items())),
    )


def _quantized_layer(rng: random.Random, variant: Variant, declared, settings, name: str, merges: bool) -> LayerSpec:
    """Return a layer; where the method must refuse to merge a small one will do: some decompose even the codes."""
    bias = rng.random() < 0.5 if variant.bias is None else variant.bias
    wanted = rng.random() < 0.7 and merges  # a shape that runs forward everywhere
    widest = 128 if not merges else _WIDEST.get(variant.formula, max(declared.widths))
    widths = [n for n in declared.widths if n <= max(widest, settings.get("blocksize", 0))]
    heights = declared.heights if merges else [n for n in declared.heights if n <= 32]
    for _ in range(_TRIES):
        spec = variant.admit(LayerSpec(name, "linear", rng.choice(widths), rng.choice(heights), bias=bias))
        if quantizers.fits(declared.name, spec, settings) and (
            not wanted or quantizers.forwards(declared.name, spec, settings)
        ):
            return spec
    raise HarnessError(f"no layer that {variant.name} admits fits {declared.name} with {settings}")


def _profile(rng: random.Random, variant: Variant, layers: Sequence[LayerSpec], adapters: Sequence[AdapterSpec]) -> str:
    choices = [name for name in values.PROFILES if name not in ("dyadic", *variant.avoids)]
    if len(adapters) > 1 or FORMULAS[variant.formula].delta is None:
        choices = [name for name in choices if name != "cancelling"]
    if len(adapters) == 1:
        choices = [name for name in choices if name != "duplicated"]
    return rng.choice(choices + ["normal"] * 5)


def _layers(rng: random.Random, variant: Variant, kind: str) -> tuple[LayerSpec, ...]:
    names = list(rng.choice(_LAYER_NAMES))
    count = rng.choice([1, 1, 2, 2, 3, 4])
    layers: list[LayerSpec] = []
    for name in names[:count]:
        layers.append(variant.admit(_layer(rng, variant, kind, name)))
    if kind in ("linear", *EMBEDDINGS) and count > 1 and rng.random() < 0.15:
        layers[-1] = replace(
            layers[0], name=layers[-1].name, tied=layers[0].name, bias=layers[-1].bias and kind == "linear"
        )
    return tuple(layers)


def _layer(rng: random.Random, variant: Variant, kind: str, name: str) -> LayerSpec:
    n_in, n_out = rng.choice(_SIZES), rng.choice(_SIZES)
    bias = rng.random() < 0.5 if variant.bias is None else variant.bias
    if kind in CONVOLUTIONS:
        return convolution(rng, kind, name, bias)
    if kind in EMBEDDINGS:
        padding = rng.randrange(n_in) if rng.random() < 0.3 else None
        scale = rng.choice([0.5, 2.0, 3.7, 8.0]) if kind == "embedding.scaled" else 1.0
        return LayerSpec(name, kind, n_in, n_out, padding_idx=padding, scale=scale)
    if kind == "conv1d-transformers":
        return LayerSpec(name, kind, n_in, n_out, bias=True)
    if kind == "layernorm":
        return LayerSpec(name, kind, max(2, n_in), max(2, n_in), bias=bias)
    if kind == "mha":
        return _attention(rng, name, bias)
    if kind == "parameter":
        return LayerSpec(name, kind, n_in, n_out, depth=rng.choice([0, 1, 2, 3]))
    if rng.random() < 0.08:
        n_in = rng.choice(_LARGE_FAN_IN)
    return LayerSpec(name, kind, n_in, n_out, bias=bias)


def _attention(rng: random.Random, name: str, bias: bool) -> LayerSpec:
    """Return an attention layer, to itself or to another sequence, which may be longer or shorter."""
    heads = rng.choice([1, 1, 2, 3])
    n = heads * rng.choice([1, 2, 3, 4, 8])
    size = tuple(rng.choice([1, 2, 3, 5]) for _ in range(rng.choice([1, 1, 2])))
    first, causal = rng.random() < 0.7, rng.random() < 0.25
    return LayerSpec(name, "mha", n, n, bias, size=size, heads=heads, batch_first=first, causal=causal)


def convolution(rng: random.Random, kind: str, name: str, bias: bool) -> LayerSpec:
    """Return a convolution with any hyper-parameters that torch accepts; the input may exceed the kernel."""
    dims = CONVOLUTIONS.index(kind) + 1
    most = (5, 3, 2)[dims - 1]
    kernel = tuple(rng.randint(1, most) for _ in range(dims))
    if rng.random() < 0.2:
        kernel = (1,) * dims
    groups = rng.choice([1, 1, 1, 1, 2, 3])
    n_in, n_out = groups * rng.choice([1, 2, 3, 4]), groups * rng.choice([1, 2, 3, 4])
    if rng.random() < 0.1:
        groups = n_in = n_out = rng.choice([2, 3, 4])  # depthwise
    stride = tuple(rng.choice([1, 1, 2, 3]) for _ in range(dims))
    dilation = tuple(rng.choice([1, 1, 1, 2]) for _ in range(dims))
    padding: tuple[int, ...] | str = tuple(rng.randint(0, 2) for _ in range(dims))
    if rng.random() < 0.2:
        padding = rng.choice(["same", "valid"])
        stride = (1,) * dims if padding == "same" else stride
    mode = rng.choice(["zeros", "zeros", "zeros", "circular", "reflect", "replicate"])
    extent = tuple((k - 1) * d + 1 + rng.randint(0, 3) for k, d in zip(kernel, dilation, strict=True))
    if mode != "zeros":  # padding by reflection needs an input larger than the padding
        reach = [
            (k - 1) * d if padding == "same" else 0 if padding == "valid" else p
            for k, d, p in zip(kernel, dilation, _widths(padding, dims), strict=True)
        ]
        extent = tuple(max(e, r + 1) for e, r in zip(extent, reach, strict=True))
    return LayerSpec(name, kind, n_in, n_out, bias, kernel, stride, padding, dilation, groups, mode, extent)


def _widths(padding: tuple[int, ...] | str, dims: int) -> tuple[int, ...]:
    return (0,) * dims if isinstance(padding, str) else padding


def _targets(rng: random.Random, layers: Sequence[LayerSpec]) -> tuple[int, ...]:
    """Return the layers that the first adapter targets; the rest are bystanders."""
    own = [index for index, spec in enumerate(layers) if spec.tied is None]
    count = rng.randint(1, len(own))
    return tuple(sorted(rng.sample(own, count)))


def _adapters(rng, variant: Variant, layers, targets, exact: bool) -> tuple[AdapterSpec, ...]:
    names = rng.choice(_ADAPTER_NAMES)
    count = min(rng.choice([1, 1, 1, 2, 2, 3]), variant.most_adapters)
    made = []
    for name in names[:count]:
        own = targets
        if made and rng.random() < 0.4:  # unlike the first: a subset, or other layers too
            own = _targets(rng, layers)
        rank = rng.choice([1, 4, 16] if exact else [1, 2, 3, 4, 5, 8, 17])
        alpha = rank * rng.choice([1.0, 2.0, 0.5]) if exact else rng.choice([1.0, 0.5, 8.0, 16.0, 3.0, float(rank)])
        plain = (
            (key, choices) for key, choices in sorted(variant.options.items()) if key.partition(".")[0] != "dropout"
        )
        options = {key: rng.choice(choices) for key, choices in plain}
        adapter = AdapterSpec(name, own, rank, alpha, tuple(sorted(options.items())))
        made.append(variant.fit(adapter, layers, exact))
    return variant.fit_all(tuple(made), layers)
