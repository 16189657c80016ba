"""AdaMSS in PEFT, which needs scikit-learn for its clusters."""

from __future__ import annotations

from peft import AdamssConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method, keeping

_MOST = 3
ROLES = {
    **{f"adamss_{factor}.{k}": f"{factor}.{k}" for factor in "AB" for k in range(_MOST)},
    "adamss_newB": "basis",
    "scatter_index": "rows",
}


def _config(adapter: AdapterSpec, targets: list[str]) -> AdamssConfig:
    return AdamssConfig(
        r=adapter.rank,
        num_subspaces=adapter.option("subspaces"),
        subspace_rank=adapter.option("inner"),
        use_dynamic_rank=adapter.option("dynamic"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """AdaMSS is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


_ADAMSS = Method(
    Variant(
        "adamss",
        "adamss",
        frozenset({"linear"}),
        options={"subspaces": (1, 2, _MOST), "inner": (1, 2, 3), "dynamic": (False, False, True)},
        claim=claim,
        keeps=keeping("basis"),
        package="sklearn",
        # decomposed in single precision when attached, and from the base as it is then
        avoids=frozenset({"huge", "cancelling"}),
    ),
    _config,
    ROLES,
)
METHODS = (_ADAMSS,)
