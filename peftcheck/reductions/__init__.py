"""The ways in which a case can be made smaller or plainer, largest first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from peftcheck.case import AdapterSpec, Case, LayerSpec, Poison
from peftcheck.implementation import Variant
from peftcheck.oracle import FORMULAS
from peftcheck.reductions.candidate import Candidate, Reduction, smaller
from peftcheck.reductions.layer import layer_fields
from peftcheck.reductions.model import fewer_blocks, plain_model
from peftcheck.reductions.steps import fewer_steps

_LAYER_NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
_ADAPTER_NAMES = ("default", "second", "third", "fourth")
_BATCHES = ((1,), (2,), ())


def one_adapter(case: Case, variant: Variant) -> list[Candidate]:
    """Keep one adapter, or all but one."""
    every = range(len(case.adapters))
    if len(every) < 2:
        return []
    kept = [((i,), f"with adapter '{case.adapters[i].name}' alone it holds") for i in every]
    if len(every) > 2:
        kept += [
            (tuple(j for j in every if j != i), f"without adapter '{case.adapters[i].name}' it holds") for i in every
        ]
    return [Candidate(replace(case, adapters=tuple(case.adapters[i] for i in own)), words) for own, words in kept]


def fewer_layers(case: Case, variant: Variant) -> list[Candidate]:
    """Keep one targeted layer, or all but one."""
    every = range(len(case.layers))
    if len(every) < 2:
        return []
    kept = [((i,), f"with layer '{case.layers[i].name}' alone it holds") for i in every]
    if len(every) > 2:
        kept += [(tuple(j for j in every if j != i), f"without layer '{case.layers[i].name}' it holds") for i in every]
    found = [(_with_layers(case, own), words) for own, words in kept]
    made = [Candidate(less, words) for less, words in found if less is not None]
    # a poison's place is counted modulo the layers there are: keep it on the last, where refusals come late
    return made + [Candidate(_poisoned_last(candidate.case), "") for candidate in made]


def _poisoned_last(case: Case) -> Case:
    return replace(case, poison=replace(case.poison, target=len(case.layers) - 1))


def _with_layers(case: Case, kept: Sequence[int]) -> Case | None:
    names = {case.layers[index].name for index in kept}
    layers = tuple(
        replace(spec, tied=spec.tied if spec.tied in names else None) for spec in (case.layers[index] for index in kept)
    )
    adapters = []
    for adapter in case.adapters:
        targets = tuple(kept.index(target) for target in adapter.targets if target in kept)
        if targets:
            adapters.append(replace(adapter, targets=targets))
    return replace(case, layers=layers, adapters=tuple(adapters)) if adapters else None


def fewer_targets(case: Case, variant: Variant) -> list[Candidate]:
    """Let an adapter target one layer only."""
    found = []
    for index, adapter in enumerate(case.adapters):
        for target in adapter.targets if len(adapter.targets) > 1 else ():
            words = f"with '{adapter.name}' on '{case.layers[target].name}' alone it holds"
            found.append(Candidate(_adapter(case, index, targets=(target,)), words))
    return found


def plain(case: Case, variant: Variant) -> list[Candidate]:
    """Make everything plain at once, which saves most of the single steps: small sizes, then plain fields only."""
    layers = tuple(_plain(spec, variant.bias is None) for spec in case.layers)
    adapters = tuple(replace(adapter, rank=1, alpha=1.0) for adapter in case.adapters)
    bare = replace(case, batch=(1,), safe=False, joint=True, train=False, cycles=1)
    return [
        Candidate(replace(bare, layers=tuple(_sized(spec, 1) for spec in layers), adapters=adapters), ""),
        Candidate(replace(bare, layers=tuple(_sized(spec, 2) for spec in layers), adapters=adapters), ""),
        Candidate(replace(bare, layers=layers, adapters=adapters), ""),
        Candidate(replace(bare, layers=layers), ""),
    ]


def _plain(spec: LayerSpec, unbiased: bool) -> LayerSpec:
    ones = (1,) * len(spec.kernel)
    return replace(
        spec,
        bias=spec.bias and not (unbiased and spec.kind != "conv1d-transformers"),
        stride=ones,
        dilation=ones,
        padding=(0,) * len(ones),
        padding_mode="zeros",
        groups=1,
        padding_idx=None,
        max_norm=None,
        causal=False,
        batch_first=True,
        size=spec.kernel or (1,) * len(spec.size),
    )


def _sized(spec: LayerSpec, n: int) -> LayerSpec:
    kernel = tuple(min(n, k) for k in spec.kernel)
    n_in, n_out, depth = min(n, spec.n_in), min(n, spec.n_out), min(n, spec.depth)
    return replace(spec, n_in=n_in, n_out=n_out, kernel=kernel, size=kernel or spec.size, depth=depth, heads=1)


def run_fields(case: Case, variant: Variant) -> list[Candidate]:
    """Make plain how the case is run: profile, dtype of the adapter, batch, the manner of merging."""
    exact = FORMULAS[variant.formula].dyadic and not case.whole
    profiles = [p for p in ("dyadic", "normal") if p not in variant.avoids and (exact or p != "dyadic")]
    if case.profile in profiles:
        profiles = profiles[: profiles.index(case.profile)]
    found = [Candidate(replace(case, profile=p), f"with '{p}' values it holds", shrinks=False) for p in profiles]
    if case.adapter_dtype != case.sweep.dtype:
        words = f"with a {case.sweep.dtype} adapter it holds"
        found.append(Candidate(replace(case, adapter_dtype=case.sweep.dtype), words))
    batches = _BATCHES[: _BATCHES.index(case.batch)] if case.batch in _BATCHES else _BATCHES
    shown = "x".join(map(str, case.batch)) or "none"
    for batch in batches:
        label = "x".join(map(str, batch)) or "none"
        found.append(Candidate(replace(case, batch=batch), f"batch {label} holds; {shown} violates"))
    if case.safe:
        found.append(Candidate(replace(case, safe=False), "an unsafe merge holds"))
    if not case.joint:
        found.append(Candidate(replace(case, joint=True), "merging all adapters in one call holds"))
    if case.train:
        found.append(Candidate(replace(case, train=False), "in eval mode it holds"))
    for cycles in smaller(case.cycles):
        found.append(Candidate(replace(case, cycles=cycles), f"{cycles} cycles hold; {case.cycles} violate"))
    return found


def adapter_fields(case: Case, variant: Variant) -> list[Candidate]:
    """Make each adapter's rank, alpha and options simpler."""
    found = []
    for index, adapter in enumerate(case.adapters):
        prefix = f"'{adapter.name}': " if len(case.adapters) > 1 else ""
        for rank in smaller(adapter.rank):
            words = f"{prefix}rank {rank} holds; {adapter.rank} violates"
            scaled = _adapter(case, index, rank=rank, alpha=adapter.alpha * rank / adapter.rank)
            found += [Candidate(scaled, words), Candidate(_adapter(case, index, rank=rank), words)]
        alphas = list(dict.fromkeys((float(adapter.rank), 1.0, 2.0 * adapter.rank)))
        for alpha in alphas[: alphas.index(adapter.alpha)] if adapter.alpha in alphas else alphas:
            words = f"{prefix}alpha {alpha:g} holds; {adapter.alpha:g} violates (rank {adapter.rank})"
            found.append(Candidate(_adapter(case, index, alpha=alpha), words, shrinks=False))
        for name, value in adapter.options:
            choices = tuple(variant.options.get(name, ()))
            for choice in choices[: choices.index(value)] if value in choices else choices[:1]:
                options = tuple(sorted({**dict(adapter.options), name: choice}.items()))
                words = f"{prefix}{name} {choice} holds; {value} violates"
                found.append(Candidate(_adapter(case, index, options=options), words, shrinks=False))
    return found


def poison(case: Case, variant: Variant) -> list[Candidate]:
    """Poison the first element of the first tensor, with NaN."""
    found = []
    for field, simple in (
        ("adapter", 0),
        ("target", 0),
        ("tensor", 0),
        ("element", 0),
        ("value", Poison().value),
    ):
        if getattr(case.poison, field) != simple:
            words = f"with a poison of {simple} it holds; {case.poison.value} violates" if field == "value" else ""
            found.append(Candidate(replace(case, poison=replace(case.poison, **{field: simple})), words, shrinks=False))
    return found


def extra(case: Case, variant: Variant) -> list[Candidate]:
    """Leave out what a single law asked for, or make it simpler."""
    found = []
    for key, value in case.extra:
        if key == "steps":
            continue
        rest = tuple(item for item in case.extra if item[0] != key)
        found.append(Candidate(replace(case, extra=rest), f"without {key} it holds"))
        for simpler in _simpler(value):
            made = tuple(sorted((*rest, (key, simpler))))
            found.append(Candidate(replace(case, extra=made), f"{key} {simpler} holds; {value} violates"))
    return found


def _simpler(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        if len(value) > 1:
            yield value[: len(value) // 2]
            yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        for index, item in enumerate(value):
            yield from ((*value[:index], simpler, *value[index + 1 :]) for simpler in _simpler(item))
    elif isinstance(value, bool):
        yield from (False,) if value else ()
    elif isinstance(value, int):
        yield from smaller(value, 0)
    elif isinstance(value, float) and math.isfinite(value) and value != 1.0:
        yield 1.0


def names(case: Case, variant: Variant) -> list[Candidate]:
    """Give layers and adapters simple names."""
    found = []
    renamed = dict(zip((spec.name for spec in case.layers), _LAYER_NAMES, strict=False))
    if len(renamed) == len(case.layers) and any(old != new for old, new in renamed.items()):
        layers = tuple(replace(s, name=renamed[s.name], tied=renamed.get(s.tied or "")) for s in case.layers)
        found.append(Candidate(replace(case, layers=layers), "with other layer names it holds"))
    adapters = tuple(replace(a, name=name) for a, name in zip(case.adapters, _ADAPTER_NAMES, strict=False))
    if len(adapters) == len(case.adapters) and adapters != case.adapters:
        found.append(Candidate(replace(case, adapters=adapters), "with other adapter names it holds"))
    return found


def _adapter(case: Case, index: int, **fields: Any) -> Case:
    made: AdapterSpec = replace(case.adapters[index], **fields)
    return replace(case, adapters=(*case.adapters[:index], made, *case.adapters[index + 1 :]))


REDUCTIONS: tuple[Reduction, ...] = (
    one_adapter, fewer_layers, fewer_targets, names, plain, run_fields, layer_fields, adapter_fields, poison, extra,
)  # fmt: skip
"""In the order in which they are tried."""
MODEL_REDUCTIONS: tuple[Reduction, ...] = (
    one_adapter, fewer_targets, fewer_blocks, plain_model, run_fields, adapter_fields, poison,
)  # fmt: skip
"""The same where the layers are those of a whole model, and cannot be changed one by one."""


PLAYED = ("state.sequence",)
"""The laws that play the case's program: only there do its steps matter."""


def of(case: Case, law: str) -> tuple[Reduction, ...]:
    """Return the reductions for a case and a law."""
    own = MODEL_REDUCTIONS if case.whole else REDUCTIONS
    return (fewer_steps, *own) if law in PLAYED else own
