"""Faults of merging and unmerging in numbers."""

from __future__ import annotations

import math

import torch

from peftcheck.case import Case
from peftcheck.faults.fault import Fault, Operation, Port, replacing
from peftcheck.faults.tensors import copies, named, next_up, own, put_back, rounded, write
from peftcheck.rounding import DTYPES


def _consistently(spoil) -> dict[str, Operation]:
    """Return merge, unmerge and export that spoil what was merged and restore the base all the same.

    The round trip is blind to such a defect: `spoil(port, start, names)` changes the base tensors after a merge;
    `start` is what they were before the first. Merging more and unmerging put the right merged values back first.
    """

    def merge(port: Port, adapters=None, safe=False) -> None:
        names = tuple(adapters) if adapters is not None else tuple(a.name for a in port.case.adapters)
        if "right" in port.notes:
            write(port, port.notes["right"])
        start = port.notes.setdefault("start", copies(own(port)))
        port.inner.merge(adapters, safe)
        port.notes["right"] = copies(own(port))
        spoil(port, start, names)

    def unmerge(port: Port) -> None:
        if "right" in port.notes:
            write(port, port.notes["right"])
        port.notes.clear()
        port.inner.unmerge()

    def merge_and_unload(port: Port, safe=False, adapters=None):
        merge(port, adapters, safe)
        return port.inner.merge_and_unload(safe=False, adapters=())

    return {"merge": merge, "unmerge": unmerge, "merge_and_unload": merge_and_unload}


def _scale(port: Port, adapter: str) -> float:
    spec = named(port, adapter)
    return spec.alpha / (math.sqrt(spec.rank) if spec.option("rslora") else spec.rank)


def _rescaled(role: str, inverse: bool):
    def spoil(port: Port, before, names) -> None:
        after, scale = own(port, role), _scale(port, names[0])
        factor = 1 / scale if inverse else scale
        write(port, {key: before[key] + factor * (tensor - before[key]) for key, tensor in after.items()})

    return spoil


def _one_ulp(port: Port, before, names) -> None:
    for key, tensor in own(port, "weight").items():
        if not torch.equal(tensor, before[key]):
            next_up(tensor)
            return


def _only_last(port: Port, before, names) -> None:
    """Leave of several adapters what the last one alone would have made of the weights."""
    if len(names) > 1:
        port.inner.unmerge()
        write(port, before)
        port.inner.merge(names[-1:], False)
        last = copies(own(port))
        port.inner.unmerge()
        write(port, before)
        port.inner.merge(names, False)
        write(port, last)


def _forget_bias(port: Port, before, names) -> None:
    write(port, {key: before[key] for key in own(port, "bias")})


def _nothing_merge(port: Port, adapters=None, safe=False) -> None:
    for name in adapters if adapters is not None else [a.name for a in port.case.adapters]:
        for site in port.inner.sites(name):
            port.notes[site] = (*port.notes.get(site, ()), name)


def _nothing_merged(port: Port) -> dict[str, tuple[str, ...]]:
    return {
        **port.inner.merged(),
        **{site: names for site, names in port.notes.items() if isinstance(site, str)},
    }


def _bias_multiplied(port: Port) -> None:
    merged = port.inner.merged()
    port.inner.unmerge()
    tensors = port.inner.base_tensors()
    with torch.no_grad():
        for site, names in merged.items():
            for name in names:
                scale = port.inner.adapter_tensors(name)[site, "scale"].reshape(-1)
                if f"{site}.bias" in tensors:
                    tensors[f"{site}.bias"].mul_(scale * scale)


def _first_stays(port: Port) -> None:
    """Unmerge all, then leave what the first adapter alone would have made of the weights."""
    several = any(len(names) > 1 for names in port.inner.merged().values())
    port.inner.unmerge()
    if several:
        base = copies(own(port))
        port.inner.merge((port.case.adapters[0].name,), False)
        left = copies(own(port))
        port.inner.unmerge()
        write(port, {**base, **left})


def _residue(port: Port) -> None:
    """Leave a 64th of the change behind, from the second time on."""
    merged = copies(own(port))
    port.inner.unmerge()
    if port.notes.setdefault("cycles", []):
        write(port, {key: t + (merged[key] - t) / 64 for key, t in own(port).items()})
    port.notes["cycles"].append(None)


def _through(dtype_of) -> dict[str, Operation]:
    """Return merge and unmerge that first round every adapter tensor to another dtype."""

    def around(port: Port, call) -> object:
        before = rounded(port, dtype_of(port.case))
        try:
            return call()
        finally:
            put_back(before)

    return {
        "merge": lambda port, adapters=None, safe=False: around(port, lambda: port.inner.merge(adapters, safe)),
        "unmerge": lambda port: around(port, port.inner.unmerge),
        "merge_and_unload": lambda port, safe=False, adapters=None: around(
            port, lambda: port.inner.merge_and_unload(safe=safe, adapters=adapters)
        ),
    }


def _unscaled_delta(port: Port, site: str, adapter: str) -> torch.Tensor:
    return port.inner.delta(site, adapter) / _scale(port, adapter)


def _scaled(case: Case) -> bool:
    return all(a.alpha != (math.sqrt(a.rank) if a.option("rslora") else a.rank) for a in case.adapters)


def _several(case: Case) -> bool:
    return case.joint and len(case.adapters) > 1 and set(case.adapters[0].targets) == set(case.adapters[1].targets)


def _biased(case: Case) -> bool:
    return any(case.layers[target].bias for adapter in case.adapters for target in adapter.targets)


def _mixed(case: Case) -> bool:
    return case.adapter_dtype != case.sweep.dtype and case.profile in ("normal", "large")


_LORA = ("lora", "lora.rslora")
_DENSE = ("linear", "conv2d", "embedding")

FAULTS = (
    Fault(
        "unmerge.bias-multiplied",
        "unmerge multiplies the bias by the gate where it must divide",
        "huggingface/peft#3216: (IA)^3 convolutions, 0.6.0 to 0.19.1",
        ("merge.roundtrip", "merge.drift"),
        replacing(unmerge=_bias_multiplied),
        variants=("ia3",),
        layers=("linear", "conv2d", "conv3d"),
        suits=_biased,
    ),
    Fault(
        "merge.one-ulp",
        "one element of one merged weight is one unit in the last place off, and unmerge restores the base",
        "the smallest defect that there is",
        ("merge.oracle",),
        replacing(**_consistently(_one_ulp)),
        layers=_DENSE,
        exact=True,
    ),
    Fault(
        "merge.nothing",
        "merge marks the adapter merged and leaves the weights alone",
        "huggingface/diffusers#12007: fuse_lora left the weights as they were",
        ("merge.oracle", "merge.export", "safe_merge.rejects"),
        replacing(
            merge=_nothing_merge,
            merged=_nothing_merged,
            unmerge=lambda port: port.notes.clear(),
            merge_and_unload=lambda port, safe=False, adapters=None: port.inner.unload(),
        ),
    ),
    Fault(
        "unmerge.nothing",
        "unmerge does nothing",
        "statement deletion, a standard mutation operator",
        ("merge.roundtrip", "merge.drift"),
        replacing(unmerge=lambda port: None),
    ),
    Fault(
        "unmerge.first-stays",
        "of several merged adapters the one that was merged first stays in the weight",
        "huggingface/diffusers#5032: unfuse_lora undid the most recent adapter only",
        ("merge.roundtrip",),
        replacing(unmerge=_first_stays),
        suits=_several,
        exact=True,
    ),
    Fault(
        "merge.scale-twice",
        "the merged delta is multiplied by its scale twice, and unmerge agrees",
        "huggingface/peft#3449: combined rsLoRA adapters were scaled once more by sqrt(r)",
        ("merge.oracle", "merge.forward", "merge.delta"),
        replacing(**_consistently(_rescaled("weight", inverse=False))),
        variants=_LORA,
        suits=lambda case: _scaled(case) and len(case.adapters) == 1,
    ),
    Fault(
        "merge.bias-unscaled",
        "the merged bias of an adapter lacks the scale, and unmerge agrees",
        "huggingface/peft#2489: unseen while r = alpha = 8 in every test",
        ("merge.oracle", "merge.forward"),
        replacing(**_consistently(_rescaled("bias", inverse=True))),
        variants=("lora.bias",),
        layers=("linear", "conv1d-transformers"),
        suits=lambda case: _scaled(case) and _biased(case) and len(case.adapters) == 1,
    ),
    Fault(
        "merge.bias-forgotten",
        "a merge that must change the bias changes the weight alone, and unmerge agrees",
        "huggingface/peft#972: (IA)^3 merged without scaling the bias",
        ("merge.oracle", "merge.forward"),
        replacing(**_consistently(_forget_bias)),
        variants=("ia3", "lora.bias"),
        layers=("linear", "conv2d"),
        suits=_biased,
    ),
    Fault(
        "merge.only-last",
        "of several adapters merged in one call only the last arrives in the weight",
        "huggingface/peft#3728: the base weight was read once before the loop",
        ("merge.oracle", "merge.forward"),
        replacing(**_consistently(_only_last)),
        suits=_several,
    ),
    Fault(
        "unmerge.drifts",
        "from the second cycle on unmerge leaves a 64th of the change behind",
        "KohakuBlueleaf/LyCORIS#264: successive merge_to cycles destroy the base",
        ("merge.drift",),
        replacing(unmerge=_residue),
    ),
    Fault(
        "merge.cast-early",
        "the delta is computed from factors already rounded to the base's half precision, and unmerge agrees",
        "huggingface/peft#3412: DEFT cast an intermediate value to the base's dtype",
        ("merge.oracle",),
        replacing(**_through(lambda case: DTYPES[case.sweep.dtype])),
        variants=_LORA,
        layers=("linear", "conv2d"),
        dtypes=("bfloat16", "float16"),
        suits=_mixed,
        exact=False,
    ),
    Fault(
        "merge.single-inside",
        "a double-precision delta passes through single precision, and unmerge agrees",
        "paiml/aprender#2189: adapter tensors were read as float32 whatever they were",
        ("merge.oracle", "merge.forward"),
        replacing(**_through(lambda case: torch.float32)),
        dtypes=("float64",),
        suits=lambda case: case.profile == "normal",
        exact=False,
    ),
    Fault(
        "delta.unscaled",
        "the reported delta lacks its scale",
        "hao-ai-lab/FastVideo#870: deltas without alpha / rank",
        ("merge.delta",),
        replacing(delta=_unscaled_delta),
        variants=_LORA,
        suits=_scaled,
    ),
)
