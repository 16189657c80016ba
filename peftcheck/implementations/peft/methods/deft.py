"""DEFT in PEFT, with both projectors, and PaRa, which only takes out."""

from __future__ import annotations

from peft import DeftConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import Method


def _config(adapter: AdapterSpec, targets: list[str]) -> DeftConfig:
    return DeftConfig(
        r=adapter.rank,
        decomposition_method=adapter.option("decomposition"),
        alpha=adapter.alpha if adapter.option("scaled") else None,
        para=adapter.option("para"),
        target_modules=targets,
    )


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """DEFT's change depends on the base; it is neither combined, rescaled nor mixed within a batch."""
    return Claim.ABSENT if op in (Op.DELTA, Op.COMBINE, Op.RESCALE, Op.MIXED_BATCH) else Claim.YES


def _method(name: str, formula: str, decomposition: str, para: bool, avoids: tuple[str, ...] = ()) -> Method:
    variant = Variant(
        name,
        formula,
        frozenset({"linear", "conv1d-transformers"}),
        options={"decomposition": (decomposition,), "para": (para,), "scaled": (False, True)},
        claim=claim,
        avoids=frozenset(avoids),
    )
    return Method(variant, _config, {"deft_P": "P", "deft_R": "R"})


DEPENDENT = ("zero", "onehot", "subnormal")  # dependent columns, or what underflows to them, have no Q of their own
METHODS = (
    _method("deft", "deft", "relu", False),
    _method("deft.qr", "deft.qr", "qr", False, DEPENDENT),
    _method("deft.para", "deft", "relu", True),
    _method("deft.para.qr", "deft.qr", "qr", True, DEPENDENT),
)
