"""The ways in which a layer can be made smaller or plainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from peftcheck.case import CONVOLUTIONS, Case, LayerSpec
from peftcheck.implementation import Variant
from peftcheck.reductions.candidate import Candidate, smaller


def layer_fields(case: Case, variant: Variant) -> list[Candidate]:
    """Make each layer smaller and plainer, a field at a time."""
    found = []
    for index, spec in enumerate(case.layers):
        prefix = f"{spec.name}: " if len(case.layers) > 1 else ""
        for fields, words in _layer_steps(spec):
            if "bias" not in fields or variant.bias is None:
                found.append(Candidate(_layer(case, index, fields), prefix + words))
    return found


def _layer_steps(spec: LayerSpec) -> Iterator[tuple[dict[str, Any], str]]:
    if spec.bias and spec.kind != "conv1d-transformers":
        yield {"bias": False}, "without bias it holds"
    if spec.groups > 1:
        divided = {"groups": 1, "n_in": spec.n_in // spec.groups, "n_out": max(1, spec.n_out // spec.groups)}
        for fields in (divided, {"groups": 1}):
            yield fields, f"groups 1 holds; {spec.groups} violates"
        for groups in (n for n in smaller(spec.groups, 2) if n < spec.groups):
            n_in, n_out = spec.n_in // spec.groups * groups, spec.n_out // spec.groups * groups
            yield (
                {"groups": groups, "n_in": n_in, "n_out": n_out},
                f"groups {groups} holds; {spec.groups} violates",
            )
    if spec.padding_mode != "zeros":
        yield {"padding_mode": "zeros"}, f"padding with zeros holds; {spec.padding_mode} violates"
    if isinstance(spec.padding, str):
        yield (
            {"padding": (0,) * len(spec.kernel)},
            f"without padding it holds; padding '{spec.padding}' violates",
        )
    if spec.kind in CONVOLUTIONS:
        yield from _kernel_steps(spec)
    if spec.kind == "mha":
        yield from _attention_steps(spec)
    if spec.max_norm is not None:
        yield {"max_norm": None}, "without max_norm it holds"
    if spec.tied is not None:
        yield {"tied": None}, "untied it holds"
    if spec.padding_idx is not None:
        yield {"padding_idx": None}, "without padding_idx it holds"
    if spec.depth:
        for depth in smaller(spec.depth, 0):
            yield {"depth": depth}, f"depth {depth} holds; {spec.depth} violates"
    if spec.scale not in (1.0, 2.0):
        yield {"scale": 2.0}, f"scale 2 holds; {spec.scale:g} violates"
    for field in ("n_in", "n_out"):
        size = getattr(spec, field)
        unit = spec.groups * spec.heads
        for n in smaller(size // unit, 2 if spec.kind == "layernorm" else 1):
            label = f"{field} {n * unit} holds; {size} violates"
            square = spec.kind in ("layernorm", "mha")
            yield {name: n * unit for name in (("n_in", "n_out") if square else (field,))}, label


def _attention_steps(spec: LayerSpec) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield fewer heads, shorter sequences, attention to itself, the plain order and no mask."""
    if spec.causal:
        yield {"causal": False}, "without a mask it holds"
    if not spec.batch_first:
        yield {"batch_first": True}, "with the batch first it holds"
    if spec.heads > 1:
        yield {"heads": 1}, f"with one head it holds; {spec.heads} violate"
    if len(spec.size) > 1:
        yield {"size": spec.size[:1]}, "attending to itself it holds"
    for made in _tuples(spec.size, 1):
        yield {"size": made}, f"length {_by(made)} holds; {_by(spec.size)} violates"


def _kernel_steps(spec: LayerSpec) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield smaller kernels, strides, dilations, paddings and inputs: all axes at once, then each."""
    for field, least in (("stride", 1), ("dilation", 1), ("padding", 0), ("kernel", 1)):
        value = getattr(spec, field)
        if isinstance(value, str):
            continue
        for made in _tuples(value, least):
            fields: dict[str, Any] = {field: made}
            if field in ("kernel", "dilation"):
                change = {"kernel": spec.kernel, "dilation": spec.dilation} | fields
                reach = [(k - 1) * d + 1 for k, d in zip(change["kernel"], change["dilation"], strict=True)]
                fields["size"] = tuple(max(1, min(s, r)) for s, r in zip(spec.size, reach, strict=True))
            words = f"{field} {_by(made)} holds; {_by(value)} violates"
            if fields.get("size", spec.size) != spec.size:
                yield {field: made}, words  # the same input first: a smaller one may hide the failure
            yield fields, words
    reach = tuple((k - 1) * d + 1 for k, d in zip(spec.kernel, spec.dilation, strict=True))
    for extra in (0, 1):
        size = tuple(min(s, r + extra) for s, r in zip(spec.size, reach, strict=True))
        if size != spec.size:
            yield {"size": size}, f"input {_by(size)} holds; {_by(spec.size)} violates"
    for made in _tuples(spec.size, 1):
        yield {"size": made}, f"input {_by(made)} holds; {_by(spec.size)} violates"


def _tuples(value: tuple[int, ...], least: int) -> Iterator[tuple[int, ...]]:
    """Yield tuples with smaller entries: all the least, all at most the next, then one entry at a time."""
    made = [tuple(min(v, n) for v in value) for n in (least, least + 1)]
    for axis, entry in enumerate(value):
        made += [(*value[:axis], n, *value[axis + 1 :]) for n in smaller(entry, least)]
    yield from (one for one in dict.fromkeys(made) if one != value)


def _by(value: tuple[int, ...]) -> str:
    return "x".join(map(str, value))


def _layer(case: Case, index: int, fields: dict[str, Any]) -> Case:
    """Return the case with a changed layer; layers that share a weight share its shape."""
    spec = case.layers[index]
    shape = {key: value for key, value in fields.items() if key in ("n_in", "n_out")}
    family = {spec.tied or spec.name}
    layers = []
    for position, other in enumerate(case.layers):
        kin = (other.tied or other.name) in family and other.kind == spec.kind
        change = fields if position == index else shape if kin else {}
        made = replace(other, **change)
        if made.padding_idx is not None and made.padding_idx >= made.n_in:
            made = replace(made, padding_idx=made.n_in - 1)
        layers.append(made)
    return replace(case, layers=tuple(layers))
