"""FRoD in PEFT."""

from __future__ import annotations

from peft import FrodConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Inverts, Op, Variant
from peftcheck.implementations.peft.method import Method, keeping

ROLES = {
    "frod_U": "U",
    "frod_V": "V",
    "frod_lambda_l": "lambda",
    "frod_lambda_s_values": "values",
    "frod_s_indices": "entries",
}


def _config(adapter: AdapterSpec, targets: list[str]) -> FrodConfig:
    return FrodConfig(sparse_rate=adapter.option("rate"), progressbar=False, target_modules=targets)


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """FRoD's change depends on the base; it is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


METHODS = (
    Method(
        Variant(
            "frod",
            "frod",
            frozenset({"linear", "conv1d-transformers"}),
            options={"rate": (0.01, 0.2, 0.6)},
            claim=claim,
            keeps=keeping("V", "entries", "frod_s_size"),  # save_projection is the default
            inverts=Inverts.EXACT,
            avoids=frozenset({"huge"}),  # decomposed in single precision when attached
        ),
        _config,
        ROLES,
    ),
)
