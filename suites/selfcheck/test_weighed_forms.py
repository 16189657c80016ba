"""X-LoRA on a whole Llama: the closed form of a weighed layer, and that laws see what they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

from peft.tuners.xlora.classifier import XLoraClassifier
from peft.tuners.xlora.layer import XLoraLayer
from peft.tuners.xlora.model import XLoraModel

from peftcheck import engine, generator
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.implementations.peft import Peft
from peftcheck.law import laws
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.weighed import weights
from peftcheck.rounding import Arithmetic, leaf, precision

PEFT = Peft()
VARIANT = PEFT.variants()["xlora"]
AR = Arithmetic(precision(torch.float64))
OPTIONS = {"experts": 3, "layerwise": False, "softmax": "all", "temperature": 1.0, "top": None, "weight": 1.0}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def site(depth: int = 1, layers: int = 1, **options) -> Site:
    """Return a layer 'b' of 'a' and 'b', adapted at rank 2 and scale 1.5; the state is 5 wide, the classifier 4."""
    spec, own = LayerSpec("b", "linear", 3, 4, True), {**OPTIONS, "order": ("a", "b"), **options}
    tensors = {"hidden": drawn(2, 6, 5)}
    for expert in range(3):
        tensors |= {f"A.{expert}": drawn(2, 3, seed=expert), f"B.{expert}": drawn(4, 2, seed=expert)}
    widths = [5, *[4] * (depth - 1), 3 * layers]
    for place in range(depth):
        tensors[f"classifier.{place}.weight"] = drawn(widths[place + 1], widths[place], seed=9)
        tensors[f"classifier.{place}.bias"] = drawn(widths[place + 1], seed=8)
    adapter = AdapterSpec("x", (0, 1), 2, 3.0, tuple(sorted(own.items())))
    return Site(spec, adapter, {role: leaf(tensor) for role, tensor in tensors.items()})


def classified(one: Site) -> Tensor:
    """Return what the classifier says, written another way."""
    made = one.tensors["hidden"].value
    depth = sum(role.endswith("weight") for role in one.tensors)
    for place in range(depth):
        weight, bias = (one.tensors[f"classifier.{place}.{name}"].value for name in ("weight", "bias"))
        made = torch.einsum("bti,oi->bto", made, weight) + bias
        made = torch.relu(made) if place + 1 < depth else made
    return made


def test_the_classifier_weighs_by_a_softmax_at_its_temperature() -> None:
    one = site(depth=3, temperature=0.5)
    assert torch.allclose(weights(AR, one).value, torch.softmax(2 * classified(one), -1))


def test_layers_that_are_weighed_apart_take_their_own_scores() -> None:
    one = site(depth=2, layers=2, layerwise=True, softmax="none")
    assert torch.allclose(weights(AR, one).value, classified(one)[..., 3:])


@pytest.mark.parametrize("over", ["all", "top", "none"])
def test_only_the_largest_are_kept(over: str) -> None:
    one = site(top=2, softmax=over)
    found, scores = weights(AR, one).value, classified(one)
    least = scores.argmin(-1, keepdim=True)
    assert bool((found.gather(-1, least) == 0).all()) and bool((found != 0).sum(-1).eq(2).all())
    whole = torch.softmax(scores, -1) if over == "all" else scores
    if over == "top":
        whole = torch.softmax(scores.scatter(-1, least, -torch.inf), -1)
    assert torch.allclose(found, whole.scatter(-1, least, 0.0))


def test_nothing_is_vouched_for_where_two_experts_are_too_close_to_choose() -> None:
    one = site(top=1)
    alike = {
        role: leaf(t.value[:1].expand_as(t.value)) if "classifier" in role else t for role, t in one.tensors.items()
    }
    bound = weights(AR, replace(one, tensors=alike)).bound
    assert bool(torch.isinf(bound).all()) and bool(torch.isfinite(weights(AR, one).bound).all())


def test_a_layer_adds_each_expert_by_its_weight() -> None:
    one = site(weight=1.7)
    base, x = {"weight": drawn(4, 3, seed=7), "bias": drawn(4)}, drawn(2, 6, 3)
    found = FORMULAS["xlora"].forward(
        machine(torch.float64, torch.float64, False), [one], {name: leaf(t) for name, t in base.items()}, leaf(x)
    )
    shares, due = torch.softmax(classified(one), -1), x @ base["weight"].T + base["bias"]
    for expert in range(3):
        change = one.tensors[f"B.{expert}"].value @ one.tensors[f"A.{expert}"].value
        due = due + 1.7 * 1.5 * shares[..., expert, None] * (x @ change.T)
    assert torch.allclose(found.value, due, rtol=0, atol=1e-12)


# defects that are planted, and the law that is there for each


def case(**options) -> Case:
    """Return a case with these options, on two layers or more, whose sentences have tokens enough to tell apart."""
    sweep = Sweep("peft", "xlora", "model.llama", "float32")
    cases = (generator.draw(VARIANT, sweep, 1, index) for index in range(300))
    wanted = {"top": None, "softmax": "all", **options}
    found = next(
        one
        for one in cases
        if one.setting("blocks") == 2
        and len(one.adapters[0].targets) > 1
        and all(one.adapters[0].option(key) == value for key, value in wanted.items())
    )
    return replace(found, profile="normal", batch=(2, 4))


def verdict(law: str, one: Case) -> str:
    with engine.pinned():
        (outcome,) = engine.check(PEFT, one, laws(law))
    return outcome.status


def of_the_next_layer(self, scalings: Tensor) -> Tensor:
    return scalings[:, :, (self.layer_number + 1) % scalings.shape[2]]


def left_on(self) -> None:
    self.disabled = False


def detached(self, result, input_ids=None, inputs_embeds=None, *args, **kwargs) -> Tensor:
    return _CLASSIFY(self, result, input_ids, inputs_embeds, *args, **kwargs).detach()


def thawed(self) -> None:
    """Leave an embedding of the base to be trained."""
    for name, parameter in self.named_parameters():
        parameter.requires_grad = "classifier" in name or "embed_tokens" in name


_CLASSIFY = XLoraClassifier.forward
PLANTED: dict[str, tuple[str, type, str, Callable, dict]] = {
    "other layer": ("forward.oracle", XLoraLayer, "get_maybe_topk_scalings", of_the_next_layer, {"layerwise": True}),
    "disable": ("merge.disable", XLoraModel, "disable_adapter_layers", left_on, {}),
    "dead": ("train.live_gradients", XLoraClassifier, "forward", detached, {}),
    "thawed base": ("train.base_frozen", XLoraModel, "_maybe_freeze_all_adapters", thawed, {}),
}


@pytest.mark.parametrize("name", sorted(PLANTED))
@pytest.mark.filterwarnings("ignore")
def test_a_law_sees_its_defect_on_a_whole_model_and_nothing_without(name: str, monkeypatch) -> None:
    law, owner, attribute, planted, options = PLANTED[name]
    one = case(**options)
    assert verdict(law, one) == "pass"
    monkeypatch.setattr(owner, attribute, planted)
    assert verdict(law, one) == "violation"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore")
def test_what_peft_computes_is_the_closed_form_whatever_the_options(dtype: str) -> None:
    sweep = Sweep("peft", "xlora", "model.llama", dtype)
    assert {verdict("forward.oracle", generator.draw(VARIANT, sweep, 3, index)) for index in range(6)} <= {
        "pass",
        "skip",
    }
