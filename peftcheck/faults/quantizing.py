"""Defects of merging into codes."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from peftcheck.case import Case
from peftcheck.faults.fault import Fault, Port, replacing
from peftcheck.faults.tensors import targeted
from peftcheck.implementation import Attached, Implementation

_INT8, _NF4 = ("bitsandbytes.int8",), ("bitsandbytes.nf4",)
_LORA = ("lora",)


def _bump(port: Port, by: int = 1) -> None:
    """Move the largest code of every adapted layer by a few steps towards zero."""
    tensors = port.inner.base_tensors()
    with torch.no_grad():
        for name in targeted(port):
            codes = tensors[f"{name}.weight"].view(-1)
            at = codes.to(torch.int16).abs().argmax()
            codes[at] -= by * int(codes[at].sign())


def _copies(port: Port) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in port.inner.base_tensors().items()}


def _restore(port: Port, before: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in port.inner.base_tensors().items():
            tensor.copy_(before[key])


def _one_code_off(port: Port, adapters=None, safe=False) -> None:
    port.inner.merge(adapters, safe)
    _bump(port)


def _discarded(port: Port, adapters=None, safe=False) -> None:
    before = _copies(port)
    port.inner.merge(adapters, safe)
    _restore(port, before)


def _walks_away(port: Port) -> None:
    port.inner.unmerge()
    _bump(port)


def _unmerge_restoring(port: Port) -> None:
    """Forget the adapters and leave the merged codes."""
    merged = _copies(port)
    port.inner.unmerge()
    _restore(port, merged)


def _silent(port: Port, adapters=None, safe=False) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        port.inner.merge(adapters, safe)


def _frozen_forward(port: Port, inputs, adapters=None):
    held = [
        tensor for tensor in port.inner.adapter_tensors(port.case.adapters[0].name).values() if tensor.requires_grad
    ]
    for tensor in held:
        tensor.requires_grad_(False)
    outputs = port.inner.forward(inputs, adapters)
    for tensor in held:
        tensor.requires_grad_(True)
    return outputs


def _other_state(port: Port, adapters=None, safe=False) -> None:
    port.inner.merge(adapters, safe)
    for name in targeted(port):
        port.inner.base_layer(name).weight.quant_state.dtype = torch.float16


def _other_codebook(port: Port) -> None:
    for spec in port.case.layers:
        port.inner.base_layer(spec.name).weight.quant_state.quant_type = "fp4"


def _unchecked(port: Port, adapters=None, safe=False) -> None:
    port.inner.merge(adapters, False)


def _writes_first(port: Port, adapters=None, safe=False) -> None:
    try:
        port.inner.merge(adapters, safe)
    except ValueError:
        _bump(port)
        raise


def _lost(port: Port, adapter: str) -> dict:
    return {} if adapter == port.case.adapters[-1].name else port.inner.adapter_tensors(adapter)


def _doubled_forward(port: Port, inputs, adapters=None):
    names = [adapter.name for adapter in port.case.adapters]
    for name in names:
        port.inner.rescale(name, 2.0)
    outputs = port.inner.forward(inputs, adapters)
    for name in names:
        port.inner.rescale(name, 1.0)
    return outputs


def _wearing_forward(port: Port, inputs, adapters=None):
    outputs = port.inner.forward(inputs, adapters)
    _bump(port, 8)
    return outputs


def _refused_late(implementation: Implementation, model: nn.Module, case: Case) -> Attached:
    try:
        return implementation.attach(model, case)
    except (TypeError, ValueError):
        weight = model.get_submodule(case.layers[0].name).weight.data
        weight.view(-1)[0] ^= 1
        raise


def _normal(case: Case) -> bool:
    return case.profile == "normal"


FAULTS = (
    Fault(
        "quantize.code-off",
        "one code of a merged layer is one step off",
        "an off-by-one in a table of thresholds",
        ("quantize.merge_budget",),
        replacing(merge=_one_code_off),
        variants=_LORA,
        quantizers=_INT8,
    ),
    Fault(
        "quantize.discarded",
        "a merge into codes goes through and changes nothing",
        "optimum-quanto's tensors under PEFT: an addition to a temporary",
        ("quantize.merge_budget", "quantize.effect"),
        replacing(merge=_discarded),
        variants=_LORA,
        quantizers=_INT8,
        suits=_normal,
    ),
    Fault(
        "quantize.unmerge-nothing",
        "unmerge clears the marks and leaves the merged codes",
        "statement deletion, a standard mutation operator",
        ("quantize.roundtrip_budget", "quantize.drift"),
        replacing(unmerge=_unmerge_restoring),
        variants=_LORA,
        quantizers=_INT8,
        suits=_normal,
    ),
    Fault(
        "quantize.walks",
        "every unmerge leaves one code one step off",
        "a grid whose requantization is not a fixpoint",
        ("quantize.zero_delta",),
        replacing(unmerge=_walks_away),
        variants=_LORA,
        quantizers=_INT8,
        dtypes=("float32",),
    ),
    Fault(
        "quantize.silent",
        "a merge into codes says nothing of rounding",
        "PEFT's quantization backends",
        ("quantize.warns",),
        replacing(merge=_silent),
        variants=_LORA,
        quantizers=_INT8,
    ),
    Fault(
        "quantize.no-gradient",
        "the adapter of a quantized layer gets no gradient",
        "a detached weight in a custom autograd function",
        ("quantize.backward",),
        replacing(forward=_frozen_forward),
        variants=_LORA,
        quantizers=_INT8,
    ),
    Fault(
        "quantize.other-state",
        "a merged layer's state has another dtype",
        "4-bit merges of fp32 adapters under PEFT",
        ("quantize.state_kept",),
        replacing(merge=_other_state),
        variants=_LORA,
        quantizers=_NF4,
        dtypes=("float32",),
    ),
    Fault(
        "quantize.other-codebook",
        "a layer is read with another codebook than it was written with",
        "huggingface/peft#851: dequantize_4bit took fp4 for granted where nothing was said",
        ("quantize.decoded",),
        replacing(_other_codebook),
        variants=_LORA,
        quantizers=_NF4,
        dtypes=("float32",),
    ),
    Fault(
        "quantize.unchecked",
        "safe_merge into codes checks nothing",
        "torchao under PEFT: the weight is checked before the delta is added",
        ("quantize.rejects",),
        replacing(merge=_unchecked),
        variants=_LORA,
        quantizers=_INT8,
        suits=lambda case: case.poison.value in ("nan", "inf", "-inf"),
    ),
    Fault(
        "quantize.writes-first",
        "a refused merge has written a code already",
        "a layer whose weight was deleted before the check",
        ("quantize.atomic",),
        replacing(merge=_writes_first),
        variants=_LORA,
        quantizers=_INT8,
        suits=lambda case: case.poison.value in ("nan", "inf", "-inf"),
    ),
    Fault(
        "quantize.lost-adapter",
        "the last adapter cannot be found on the quantized layer",
        "a second VeRA-like adapter wrapped the first one's wrapper",
        ("quantize.attached",),
        replacing(adapter_tensors=_lost),
        variants=_LORA,
        quantizers=_INT8,
    ),
    Fault(
        "quantize.forward-doubled",
        "a forward over codes adds the adapter's part twice",
        "huggingface/peft#3449: scaled once more",
        ("quantize.forward",),
        replacing(forward=_doubled_forward),
        variants=_LORA,
        quantizers=_INT8,
        suits=_normal,
    ),
    Fault(
        "quantize.forward-wears",
        "every forward leaves a code eight steps off",
        "bitsandbytes' forward on a CPU rewrites the weight",
        ("quantize.repeats", "quantize.after_forward"),
        replacing(forward=_wearing_forward),
        variants=_LORA,
        quantizers=_INT8,
        suits=_normal,
    ),
    Fault(
        "quantize.refused-late",
        "attaching to quantized layers is refused, after a code has been written",
        "9 of PEFT's refused attaches leave the model changed",
        ("quantize.refuses",),
        _refused_late,
        variants=("glora", "glora.vector"),
        quantizers=_INT8,
        unsupported=True,
    ),
)
