"""Options that change which layer gets what, or what a checkpoint holds, on methods that stand in modules of their own.

The arithmetic is the method's: they are asked on linear layers, in single precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from peftcheck.case import SUBJECTS, AdapterSpec, LayerSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method, keeping

_LINEAR = frozenset({"linear"})


@dataclass(frozen=True)
class _Pattern:
    """Ranks (or what stands for them) by layer: the option's name, another rank for a layer, how a layer is spelled.

    `alphas`: the option that does the same for the scale, where there is one.
    """

    ranks: str
    other: Callable[[int, LayerSpec], int]
    spelled: Callable[[str], str]
    alphas: str | None = None


def _double(rank: int, spec: LayerSpec) -> int:
    return 2 * rank


def _anchored(name: str) -> str:
    return f"^{re.escape(name)}"


def _whole(name: str) -> str:
    return f"^{re.escape(name)}$"


def _plain(name: str) -> str:
    return name


_PATTERNS: Mapping[str, _Pattern] = {
    "loha": _Pattern("rank_pattern", _double, _anchored, "alpha_pattern"),
    "lokr": _Pattern("rank_pattern", _double, _anchored, "alpha_pattern"),
    "delora": _Pattern("rank_pattern", _double, _anchored, "lambda_pattern"),
    "hira": _Pattern("rank_pattern", _double, _anchored),
    "fourierft": _Pattern("n_frequency_pattern", lambda rank, spec: min(2 * rank, spec.n_in * spec.n_out), _plain),
    "waveft": _Pattern("n_frequency_pattern", lambda rank, spec: min(2 * rank, spec.n_in * spec.n_out), _anchored),
    "c3a": _Pattern("block_size_pattern", lambda rank, spec: gcd(spec.n_in, spec.n_out), _plain),
    "osf": _Pattern("rank_pattern", lambda rank, spec: min(spec.n_in, spec.n_out) - 1, _whole),
}


def _patterned(method: Method, pattern: _Pattern) -> Method:
    """Return the method with another rank on every other layer, and twice the scale on every third."""

    def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
        fitted = method.variant.fit(adapter, layers, exact)
        ranks = tuple((t, pattern.other(fitted.rank, layers[t])) for t in fitted.targets if t % 2 == 0)
        alphas = tuple((t, 2.0 * fitted.alpha) for t in fitted.targets if t % 3 == 0 and pattern.alphas)
        return replace(
            fitted, options=tuple(sorted({**dict(fitted.options), "ranks": ranks, "alphas": alphas}.items()))
        )

    def config(adapter: AdapterSpec, targets: list[str]) -> Any:
        made = method.config(adapter, targets)
        for option, field in (("ranks", pattern.ranks), ("alphas", pattern.alphas)):
            given = dict(adapter.option(option, ()))
            named = zip(adapter.targets, targets, strict=True)
            if field and given:
                setattr(
                    made, field, {pattern.spelled(name): given[target] for target, name in named if target in given}
                )
        return made

    return replace(
        method, variant=replace(_narrow(method.variant), name=f"{method.variant.name}.pattern", fit=fit), config=config
    )


def _set(method: Method, name: str, keeps: tuple[str, ...] = (), **options: Any) -> Method:
    """Return the method with options set; `keeps` are the roles that its checkpoints hold besides trained ones then."""

    def config(adapter: AdapterSpec, targets: list[str]) -> Any:
        made = method.config(adapter, targets)
        for field, value in options.items():
            setattr(made, field, value)
        return made

    variant = replace(_narrow(method.variant), name=f"{method.variant.name}.{name}", keeps=keeping(*keeps))
    return replace(method, variant=variant, config=config)


def _narrow(variant: Variant) -> Variant:
    return replace(
        variant, like=variant.name, layers=_LINEAR, unasked=frozenset(SUBJECTS) - _LINEAR, dtypes=frozenset({"float32"})
    )


_SET: Mapping[str, tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...]] = {
    "frod": (("unsaved", (), {"save_projection": False}),),
    "tinylora": (("unsaved", ("A", "B"), {"save_projection": False}),),  # A and B are always saved
    "unilora": (("saved", ("entries.A", "entries.B", "scales.A", "scales.B"), {"save_indices": True}),),
    "supertuning": (("unsaved", (), {"save_precomputed_indices": False}),),
    "waveft": (("proportional", (), {"proportional_parameters": True}),),
    "psoft": (("lowrank", (), {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 4, "random_seed": 1}),),
}


def variations(methods: Mapping[str, Method]) -> Iterator[Method]:
    """Yield the variations of those of the methods that the installed PEFT has."""
    for name, pattern in _PATTERNS.items():
        if name in methods:
            yield _patterned(methods[name], pattern)
    for name, settings in _SET.items():
        for own, keeps, options in settings if name in methods else ():
            yield _set(methods[name], own, keeps, **options)
