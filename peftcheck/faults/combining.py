"""Faults of weighted combinations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from peftcheck.case import AdapterSpec, Case
from peftcheck.faults.fault import Fault, Operation, Port, replacing
from peftcheck.faults.tensors import own


def _asked_otherwise(change: Callable[[Port, list[str], list[float], dict], tuple]) -> Operation:
    """Return a combine that asks for what `change(port, adapters, weights, options)` makes of the request."""

    def combine(port: Port, adapters, weights, kind, into, **options) -> None:
        names, own_weights, other = change(port, list(adapters), list(weights), options)
        port.inner.combine(names, own_weights, kind, into, **other)

    return combine


def _afterwards(spoil: Callable[[Port, list[str], str, dict], None]) -> Operation:
    """Return a combine after which `spoil(port, adapters, into, options)` runs."""

    def combine(port: Port, adapters, weights, kind, into, **options) -> None:
        port.inner.combine(adapters, weights, kind, into, **options)
        with torch.no_grad():
            spoil(port, list(adapters), into, options)

    return combine


def _known(port: Port, name: str) -> bool:
    return any(adapter.name == name for adapter in port.case.adapters)


def _cross(port: Port, adapters, into: str, options) -> None:
    """Let the columns of each B meet the rows of the next adapter's A."""
    for (site, role), tensor in port.inner.adapter_tensors(into).items():
        if role == "B":
            shift = port.inner.adapter_tensors(adapters[0]).get((site, "B"), tensor).shape[1]
            tensor.copy_(tensor.roll(shift, 1))


def _scale_first(port: Port, adapters, into: str, options) -> None:
    for tensor in port.inner.adapter_tensors(adapters[0]).values():
        tensor.mul_(2)


def _touch_base(port: Port, adapters, into: str, options) -> None:
    for tensor in own(port, "weight").values():
        tensor.add_(1)


def _drop_largest(port: Port, adapters, into: str, options) -> None:
    for (_, role), tensor in port.inner.adapter_tensors(into).items():
        if role == "A":
            tensor[tensor.flatten(1).norm(dim=1).argmax()] = 0


def _clamp_all(port: Port, adapters, into: str, options) -> None:
    if "svd_clamp" in options:
        for (_, role), tensor in port.inner.adapter_tensors(into).items():
            if role == "A":
                tensor.mul_(0.5)


def _halved_if_combined(port: Port, adapters, weights, options) -> tuple:
    halved = [w if _known(port, name) else w / 2 for name, w in zip(adapters, weights, strict=False)]
    return adapters, halved, options


def _by_density(port: Port, adapters, weights, options) -> tuple:
    return adapters, [w * options.get("density", 1.0) for w in weights], options


def _padded(port: Port, adapters, weights, options) -> tuple:
    return adapters, weights + [1.0] * (len(adapters) - len(weights)), options


def _described_larger(port: Port, site: str, adapter: str) -> AdapterSpec:
    found = port.inner.described(site, adapter)
    if _known(port, adapter):
        return found
    return replace(found, rank=found.rank + 1, alpha=found.alpha * (found.rank + 1) / found.rank)


def _loaded_doubled(port: Port, folder, adapter: str) -> None:
    port.inner.load(folder, adapter)
    with torch.no_grad():
        for tensor in port.inner.adapter_tensors(adapter).values():
            tensor.mul_(2)


def _merge_known(port: Port, adapters=None, safe=False) -> None:
    if adapters is None or all(_known(port, name) for name in adapters):
        port.inner.merge(adapters, safe)


def _density(change: Callable[[float], float]) -> Operation:
    def other(port: Port, adapters, weights, options) -> tuple:
        return adapters, weights, {**options, "density": change(options.get("density", 1.0))}

    return _asked_otherwise(other)


def _weights(change: Callable[[list[float]], list[float]]) -> Operation:
    return _asked_otherwise(lambda port, adapters, weights, options: (adapters, change(weights), options))


def _plain(case: Case) -> bool:
    """Whether nothing is merged meanwhile and every targeted layer takes a LoRA apart from groups."""
    return case.setting("merged") is None and all(spec.groups == 1 for spec in case.layers)


def _unlike(case: Case) -> bool:
    return _plain(case) and len(set(case.setting("members", ()))) > 1 and 0.0 not in case.setting("weights", ())


def _pruned_alone(case: Case) -> bool:
    """Whether pruning shows: half or more is cut of many elements, and truncation cuts nothing."""
    shapes = [case.layers[target].weight_shape for adapter in case.adapters for target in adapter.targets]
    untruncated = all(case.setting("svd_rank", 0) >= min(shape) for shape in shapes)
    large = all(shape[0] * shape[1] >= 40 for shape in shapes)
    return _unlike(case) and case.profile == "normal" and case.setting("density", 1.0) == 0.5 and untruncated and large


def _one_weight_less(case: Case) -> bool:
    return case.setting("request") == "fewer weights" and len(case.setting("members")) > 1


def _negative(case: Case) -> bool:
    return _plain(case) and case.setting("weights", (0.0,))[0] < 0


def _unit(case: Case) -> bool:
    return all(abs(w) == 1 for w in case.setting("weights", ()))


_LORA, _SOURCE = ("lora",), ("linear", "embedding")

FAULTS = (
    Fault(
        "combine.cross-terms",
        "the factors of one adapter meet those of another",
        "huggingface/peft#1155: A and B combined apart",
        ("combine.linear", "combine.cross_term_free"),
        replacing(combine=_afterwards(_cross)),
        variants=_LORA,
        layers=("linear",),
        kinds=("cat",),
        suits=lambda case: _unlike(case) and case.profile == "probe",
        exact=False,
    ),
    Fault(
        "combine.sign",
        "a negative weight counts as a positive one",
        "huggingface/peft 0.18.1: one adapter at -1 came out as +1",
        ("combine.linear", "combine.single", "combine.cancel"),
        replacing(combine=_weights(lambda weights: [abs(w) for w in weights])),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear"),
        suits=_negative,
    ),
    Fault(
        "combine.squared",
        "a weight stands on both factors",
        "huggingface/peft#1155: what the weight multiplies",
        ("combine.linear", "combine.homogeneous"),
        replacing(combine=_weights(lambda weights: [w * abs(w) for w in weights])),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear"),
        suits=lambda case: _unlike(case) and not _unit(case),
    ),
    Fault(
        "combine.first-doubled",
        "the first adapter counts twice",
        "huggingface/peft#3449: options of the first adapter decide for all",
        ("combine.linear", "combine.permutation"),
        replacing(combine=_weights(lambda weights: [2 * weights[0], *weights[1:]] if weights else weights)),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear"),
        suits=lambda case: _unlike(case) and case.profile == "normal",
        exact=False,
    ),
    Fault(
        "combine.combined-source",
        "an adapter that is itself a combination counts half",
        "huggingface/peft#3449: the scale of a combination is not that of its sources",
        ("combine.additive",),
        replacing(combine=_asked_otherwise(_halved_if_combined)),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear"),
        suits=_unlike,
    ),
    Fault(
        "combine.source-scaled",
        "combining doubles the tensors of the first source",
        "huggingface/peft#654: combining rewrote the scale of its sources",
        ("combine.sources_untouched",),
        replacing(combine=_afterwards(_scale_first)),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear", "svd"),
        suits=_plain,
    ),
    Fault(
        "combine.base-written",
        "combining changes the base",
        "huggingface/peft 0.21.2: an initialisation that takes its part from the base",
        ("combine.base_untouched",),
        replacing(combine=_afterwards(_touch_base)),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear", "svd"),
        suits=_plain,
    ),
    Fault(
        "combine.rank",
        "the declared rank of a combination is not that of its tensors",
        "huggingface/peft#2710: a stored configuration that does not fit",
        ("combine.rank",),
        replacing(described=_described_larger),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "svd"),
        suits=_plain,
    ),
    Fault(
        "combine.reload",
        "a stored combination comes back doubled",
        "huggingface/peft#3473: options that are saved and no longer hold",
        ("combine.reload",),
        replacing(load=_loaded_doubled),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear"),
        suits=_plain,
    ),
    Fault(
        "combine.unmerged",
        "merging a combination does nothing",
        "huggingface/diffusers#12007: fuse_lora left the weights as they were",
        ("combine.merge",),
        replacing(merge=_merge_known),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear"),
        suits=_plain,
    ),
    Fault(
        "combine.rescale",
        "rescaling an adapter does nothing",
        "cloneofsimo/lora#187: alpha ignored",
        ("combine.activated",),
        replacing(rescale=lambda port, adapter, factor: None),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "linear"),
        suits=lambda case: _unlike(case) and 1.0 not in case.setting("weights"),
    ),
    Fault(
        "combine.missing-weight",
        "a weight that is missing counts as one",
        "huggingface/peft 0.21.2: a request that zip() shortens in silence",
        ("combine.refuses",),
        replacing(combine=_asked_otherwise(_padded)),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("cat", "svd"),
        suits=lambda case: (
            _plain(case) and case.setting("request") == "fewer weights" and len(case.setting("members")) > 1
        ),
    ),
    Fault(
        "combine.largest-lost",
        "truncation loses the largest singular value instead of the smallest",
        "replacement of an index, a standard mutation operator",
        ("combine.best_rank",),
        replacing(combine=_afterwards(_drop_largest)),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("svd",),
        suits=_unlike,
        exact=False,
    ),
    Fault(
        "combine.clamp",
        "a threshold that all values are within clamps them all the same",
        "replacement of a comparison, a standard mutation operator",
        ("combine.clamp",),
        replacing(combine=_afterwards(_clamp_all)),
        variants=_LORA,
        layers=_SOURCE,
        kinds=("svd",),
        suits=_unlike,
        exact=False,
    ),
    Fault(
        "combine.unpruned",
        "pruning prunes nothing",
        "statement deletion, a standard mutation operator",
        ("combine.definition",),
        replacing(combine=_density(lambda density: 1.0)),
        variants=_LORA,
        layers=("linear",),
        kinds=("magnitude_prune_svd",),
        dtypes=("float32", "bfloat16", "float16"),
        suits=_pruned_alone,
        exact=False,
    ),
    Fault(
        "combine.not-rescaled",
        "what a random drop keeps is not divided by the share that is kept",
        "statement deletion, a standard mutation operator",
        ("combine.expectation",),
        replacing(combine=_asked_otherwise(_by_density)),
        variants=_LORA,
        layers=("linear",),
        kinds=("dare_linear_svd",),
        dtypes=("float32", "bfloat16", "float16"),
        suits=_pruned_alone,
        exact=False,
    ),
    Fault(
        "combine.prunes-all-the-same",
        "density 1 prunes half",
        "replacement of a constant, a standard mutation operator",
        ("combine.density_one",),
        replacing(combine=_density(lambda density: min(density, 0.5))),
        variants=_LORA,
        layers=("linear",),
        kinds=("magnitude_prune_svd",),
        suits=lambda case: _unlike(case) and case.profile == "normal",  # of mostly zeros half can be pruned unseen
        exact=False,
    ),
)
