"""VeRA in PEFT."""

from __future__ import annotations

from dataclasses import replace

from peft import VeraConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> VeraConfig:
    return VeraConfig(
        r=adapter.rank,
        d_initial=adapter.option("d_initial"),
        save_projection=adapter.option("save_projection"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """VeRA is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def sharing(adapters: tuple[AdapterSpec, ...], layers: tuple[LayerSpec, ...]) -> tuple[AdapterSpec, ...]:
    """Let later adapters fit the first one's projections: no wider, no higher in rank, saved or not like them."""
    first, *others = adapters
    widest = max(layers[target].n_in for target in first.targets)
    tallest = max(layers[target].n_out for target in first.targets)
    fitted = [first]
    for adapter in others:
        targets = tuple(t for t in adapter.targets if layers[t].n_in <= widest and layers[t].n_out <= tallest)
        options = {**dict(adapter.options), "save_projection": first.option("save_projection")}
        fitted.append(
            replace(
                adapter,
                targets=targets or first.targets,
                rank=min(adapter.rank, first.rank),
                options=tuple(sorted(options.items())),
            )
        )
    return tuple(fitted)


def keeps(adapter: AdapterSpec) -> frozenset[str]:
    """The shared projections are stored where asked for; else they follow from `projection_prng_key`."""
    return frozenset({"A", "B"}) if adapter.option("save_projection") else frozenset()


METHODS = (
    Method(
        Variant(
            "vera",
            "vera",
            frozenset({"linear", "conv1d-transformers"}),
            options={"d_initial": (0.1, 1.0), "save_projection": (False, True)},
            fit_all=sharing,
            claim=claim,
            keeps=keeps,
        ),
        _config,
        {"vera_A": "A", "vera_B": "B", "vera_lambda_b": "b", "vera_lambda_d": "d"},
    ),
)
