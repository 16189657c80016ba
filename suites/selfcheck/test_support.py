"""No layer kind is a silent blank: each variant is asked of it, must refuse it, or says why another variant is asked."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

pytest.importorskip("peft")

from peftcheck import engine, generator, models
from peftcheck.case import LAYERS, Sweep
from peftcheck.implementations.peft import Peft

UNASKED = {
    "lora.gaussian": "its start changes values, not arithmetic: lora asks these layers",
    "lora.pissa*": "on embeddings PEFT passes over the start's name, and the adapter is any LoRA's",
    "lora.eva": "on embeddings PEFT passes over the start's name, and the adapter is any LoRA's",
    "lora.corda-*": "on embeddings PEFT passes over the start's name, and the adapter is any LoRA's",
    "lora.olora": "as for the other starts; on a Conv1D that is not square the factors come out transposed,"
    " and no input fits them",
    "lora.parameter": "any module with a weight of two or three dimensions holds a parameter; its own variants ask that module",
    "oft.conv2d": "other variants of the method ask them",
    "boft.conv2d": "other variants of the method ask them",
    "hra.conv2d": "other variants of the method ask them",
    "ln_tuning": "a trained copy of an attention layer cannot be unloaded, and part of it is not loaded under another name",
    "mixed.*": "on other layers each method does what its own variants show",
}
"""Variants that PEFT attaches to more layer kinds than are asked of them: why."""

VARIANTS = Peft().variants()


def kinds(variant) -> frozenset[str]:
    return variant.unasked & frozenset(LAYERS)


def test_every_blank_has_a_reason_and_every_reason_a_blank():
    blank = {name for name, variant in VARIANTS.items() if kinds(variant) and not variant.like}
    assert {name for name in blank if not any(fnmatchcase(name, pattern) for pattern in UNASKED)} == set()
    assert {pattern for pattern in UNASKED if not any(fnmatchcase(name, pattern) for name in blank)} == set()


@pytest.mark.parametrize(
    "name", sorted(name for name, variant in VARIANTS.items() if kinds(variant) and not variant.like)
)
def test_what_is_not_asked_is_accepted_all_the_same(name):
    """A layer that PEFT refuses is no blank: `refuse.attach` has to see how."""
    variant = VARIANTS[name]
    for kind in sorted(kinds(variant)):
        assert any(_attaches(name, kind, index) for index in range(16)), f"{name} refuses {kind}: it is not 'unasked'"


def _attaches(name: str, kind: str, index: int) -> bool:
    case = generator.draw(VARIANTS[name], Sweep("peft", name, kind, "float32"), 0, index)
    with engine.pinned():
        try:
            Peft().attach(models.build(case), case)
        except (ValueError, TypeError, AttributeError):
            return False
    return True
