"""PSOFT in PEFT: Cayley by solving or by a series, with and without the gains, or an unconstrained middle."""

from __future__ import annotations

from dataclasses import replace

from peft import PsoftConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method

ROLES = {
    "psoft_R.weight": "R",
    "psoft_R.vector_a": "a",
    "psoft_R.vector_b": "b",
    "_psoft_A_cache": "A",
    "_psoft_B_cache": "B",
}


def _config(adapter: AdapterSpec, targets: list[str]) -> PsoftConfig:
    series = adapter.option("neumann")
    return PsoftConfig(
        r=adapter.rank,
        psoft_alpha=adapter.alpha,
        psoft_orth=adapter.option("orthogonal"),
        psoft_mag_a=adapter.option("gain_a"),
        psoft_mag_b=adapter.option("gain_b"),
        ab_svd_init=adapter.option("init"),
        use_cayley_neumann=series,
        num_cayley_neumann_terms=adapter.option("terms", 5),
        cayley_neumann_eps=adapter.option("eps") if series else None,
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """PSOFT combines no adapters, has no scale and mixes no batches."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """PSOFT declares that the rank is at most the smaller side of every target."""
    sides = [min(layers[target].n_in, layers[target].n_out) for target in adapter.targets]
    return replace(adapter, rank=min(adapter.rank, *sides))


def _method(name: str, **options) -> Method:
    choices = {
        "orthogonal": (True,),
        "neumann": (False,),
        "gain_a": (True, False),
        "gain_b": (True, False),
        "init": ("psoft_init", "pissa_init"),
        **options,
    }
    variant = Variant(
        name,
        "psoft",
        frozenset({"linear"}),
        options=choices,
        fit=fit,
        claim=claim,
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        avoids=frozenset({"cancelling"}),  # which changes the base after A and B were taken from it
    )
    return Method(variant, _config, ROLES)


METHODS = (
    _method("psoft"),
    _method("psoft.neumann", neumann=(True,), terms=(4, 5, 6), eps=(None, 0.5, 0.9)),
    _method("psoft.free", orthogonal=(False,)),
)
