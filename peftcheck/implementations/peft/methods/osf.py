"""OSF in PEFT."""

from __future__ import annotations

from dataclasses import replace

from peft import OSFConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Inverts, Op, Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.shira import two_wide

ROLES = {
    "osf_svd_params.U_low": "U",
    "osf_svd_params.S_low": "S",
    "osf_svd_params.V_low": "V",
    "_osf_U_low_init": "U.start",
    "_osf_S_low_init": "S.start",
    "_osf_V_low_init": "V.start",
}


def _config(adapter: AdapterSpec, targets: list[str]) -> OSFConfig:
    return OSFConfig(effective_rank=adapter.rank, target_modules=targets)


def fit(adapter: AdapterSpec, layers: tuple[LayerSpec, ...], exact: bool) -> AdapterSpec:
    """Preserve fewer directions than the smallest target has, so that some are left to be trained."""
    least = min(n for target in adapter.targets for n in (layers[target].n_in, layers[target].n_out))
    return replace(adapter, rank=min(adapter.rank, least - 1))


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """OSF declares that it does not unmerge; it is neither combined, rescaled nor mixed within a batch."""
    if op is Op.UNMERGE:
        return Claim.REFUSES
    return Claim.ABSENT if op in (Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "osf",
            "osf",
            frozenset({"linear"}),
            fit=fit,
            admit=two_wide,
            claim=claim,
            inverts=Inverts.NEVER,
            avoids=frozenset({"huge"}),  # decomposed in single precision when attached
        ),
        _config,
        ROLES,
    ),
)
