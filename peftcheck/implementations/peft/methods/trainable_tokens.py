"""Trainable tokens in PEFT: chosen rows of an embedding, or of a linear layer."""

from __future__ import annotations

from dataclasses import replace

from peft import TrainableTokensConfig

from peftcheck.case import EMBEDDINGS, AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Inverts, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=list(adapter.option("tokens")), target_modules=targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """Trained rows have no delta, are not combined or rescaled."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE) else Claim.YES


def _rows(layer: LayerSpec) -> int:
    return layer.n_in if layer.kind in EMBEDDINGS else layer.n_out


def disjoint(adapters: tuple[AdapterSpec, ...], layers: tuple[LayerSpec, ...]) -> tuple[AdapterSpec, ...]:
    """Draw rows that no other adapter of the case has, which is PEFT's condition; drop adapters left without any."""
    taken: set[int] = set()
    fitted = []
    for adapter in adapters:
        count = min(_rows(layers[target]) for target in adapter.targets)
        start, stride = adapter.option("start"), adapter.option("stride")
        wanted = dict.fromkeys((start + stride * step) % count for step in range(min(adapter.rank, count)))
        rows = tuple(row for row in wanted if row not in taken)
        if not rows:
            continue
        taken.update(rows)
        options = {**dict(adapter.options), "tokens": rows}
        fitted.append(replace(adapter, options=tuple(sorted(options.items()))))
    return tuple(fitted)


METHODS = (
    Method(
        Variant(
            "trainable_tokens",
            "trainable_tokens",
            frozenset({"linear", *EMBEDDINGS}),
            options={"start": (0, 1, 3, 5), "stride": (1, 1, 2, 5)},
            fit_all=disjoint,
            claim=claim,
            inverts=Inverts.EXACT,
            by_name=True,  # PEFT wraps what is tied to a target, too; without modules to save 'all-linear' takes the head
        ),
        _config,
        {"trainable_tokens_delta": "rows", "trainable_tokens_original": "original"},
    ),
)
