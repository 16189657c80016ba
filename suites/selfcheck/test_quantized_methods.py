"""No method that meets a quantized layer is a blank: what PEFT has for codes has claims, the rest must refuse."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
from peftcheck import quantizers, suite
from peftcheck.case import Sweep
from peftcheck.errors import UsageError
from peftcheck.implementation import Claim
from peftcheck.implementations.peft import Peft
from peftcheck.implementations.peft.quantization import MERGED
from peftcheck.law import laws
from peftcheck.rounding import DTYPES
from peftcheck.walk import Walk

TUNERS = Path(peft.__file__).parent / "tuners"
BY_HAND = [name for name, one in quantizers.DECLARED.items() if one.by_hand]
ADAPTED = {"adalora", "ia3"}
"""Methods with a module for bitsandbytes that runs and trains, and does not merge: documented."""


def with_a_module() -> set[str]:
    """Return the methods whose package has a module for bitsandbytes."""
    return {path.parent.name for path in TUNERS.glob("*/bnb.py")}


def with_backends() -> set[str]:
    """Return the methods that ask PEFT for a quantization backend."""
    return {
        path.parent.name for path in TUNERS.glob("*/model.py") if "resolve_quantization_backend" in path.read_text()
    }


def test_what_peft_has_for_codes_is_what_is_claimed() -> None:
    grids = {name: {q.partition(".")[0] for q in merged} for name, merged in MERGED.items() if name != "beft"}
    assert with_a_module() - ADAPTED == {n for n, found in grids.items() if n == "lora" or found == {"bitsandbytes"}}
    assert with_backends() == {n for n, found in grids.items() if n != "lora" and "torchao" in found}


def test_every_method_on_linear_layers_answers_for_every_quantizer() -> None:
    variants = Peft().variants()
    asked = {name: variant for name, variant in variants.items() if "linear" in variant.layers and "." not in name}
    blank = {name for name, variant in asked.items() if set(variant.quantizers) != set(quantizers.DECLARED)}
    # of BEFT the bias is at stake; the others put a copy in the weight's place, and some types copy codes as numbers
    assert blank == {"beft", "ln_tuning", "trainable_tokens"}
    assert {q.partition(".")[0] for q in variants["beft"].quantizers} == {"bitsandbytes", "torchao", "quanto"}
    assert {q.partition(".")[0] for q in variants["ln_tuning"].quantizers} == {"bitsandbytes", "hqq", "quanto"}
    assert {asked[name].quantizers["bitsandbytes.nf4"] for name in ADAPTED} == {Claim.REFUSES}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_needs_other_hardware_must_be_refused_by_every_method(name: str) -> None:
    claims = {variant.quantizers[name] for variant in Peft().variants().values() if name in variant.quantizers}
    assert claims == {Claim.REFUSES}


@pytest.mark.parametrize("name", [n for n in BY_HAND if quantizers.DECLARED[n].module and n != "aqlm.1x8"])
def test_a_layer_made_by_hand_holds_the_weight_to_half_a_step(name: str) -> None:
    pytest.importorskip(quantizers.DECLARED[name].package)
    model, quantizer = nn.Module(), quantizers.load(name)
    model.layer = nn.Linear(128, 32, dtype=DTYPES[quantizers.DECLARED[name].dtypes[0]])
    weight = model.layer.weight.detach().double()
    quantizer.quantize(model, "layer", {})
    step = weight.reshape(32, -1, 64).abs().amax(2, keepdim=True).expand(32, -1, 64).reshape(32, 128) / 7
    assert bool(((quantizer.values(model.layer) - weight).abs() <= 0.52 * step).all())


@pytest.mark.parametrize(
    "module, kind", [("gptq", "GPTQLoraLinear"), ("awq", "AwqLoraLinear"), ("aqlm", "AqlmLoraLinear")]
)
def test_what_peft_has_for_calibrated_codes_refuses_a_merge(module: str, kind: str) -> None:
    made = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), kind)
    base = nn.Linear(8, 8)
    before = base.weight.detach().clone()
    layer = made(base, "default", config=peft.LoraConfig(r=2, init_lora_weights=False), r=2, lora_alpha=2)
    with pytest.raises(NotImplementedError):
        layer.merge()
    assert torch.equal(base.weight, before)
    assert not layer.merged


def test_what_cannot_be_made_here_is_absent_and_says_why(monkeypatch) -> None:
    (law,) = laws("quantize.refuses")
    where = Sweep("peft", "lora", "linear", "float16", "eetq.int8")
    run = Walk(Peft(), where, {law.name: law}, suite.PROFILES["quick"], 0).run
    assert run()[law.name].state == "absent"
    assert run()[law.name].message == "not installed: eetq"
    monkeypatch.setattr(quantizers.importlib.util, "find_spec", lambda name: object())
    assert run()[law.name].message == "layers of eetq cannot be made without its hardware"
    with pytest.raises(UsageError, match="declared only"):
        quantizers.load("eetq.int8")
