"""ShadowPEFT on a whole Llama: what a decoder block and what rides beside it compute, and that laws see what they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

from peft.tuners.shadow.layers import ShadowLayer
from peft.tuners.shadow.model import ShadowModel

from peftcheck import attention, engine, generator, transformer_models
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.implementations.peft import Peft
from peftcheck.law import laws
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import DTYPES, Arithmetic, leaf, precision

PEFT = Peft()
VARIANT = PEFT.variants()["shadow"]
SPEC = LayerSpec("b", "block.llama", 4, 4)


def drawn(**wanted) -> Case:
    """Return a case on two blocks, all adapted unless told otherwise, whose sentences have four tokens."""
    sweep = Sweep("peft", "shadow", "model.llama", "float32")
    wanted = {"blocks": "all", "dropout": 0.0, **wanted}
    cases = (generator.draw(VARIANT, sweep, 0, index) for index in range(300))
    found = next(
        one
        for one in cases
        if one.setting("blocks") == 2 and all(one.adapters[0].option(key) == value for key, value in wanted.items())
    )
    return replace(found, profile="normal", batch=(2, 4))


def block(dtype: str, bias: bool) -> tuple[LayerSpec, nn.Module, Tensor]:
    """Return a decoder block of a case's model in a dtype, and an input of its width."""
    cases = (generator.draw(VARIANT, Sweep("peft", "shadow", "model.llama", dtype), 0, index) for index in range(50))
    case = replace(next(one for one in cases if one.setting("bias") == bias), profile="normal")
    spec = next(one for one in case.layers if one.kind == "block.llama")
    module = transformer_models.build(case).requires_grad_(False).get_submodule(spec.name)
    x = torch.randn(2, 5, spec.n_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return spec, module, x.to(DTYPES[dtype])


def ratio(spec: LayerSpec, module: nn.Module, x: Tensor, output: Tensor) -> float:
    base = {name: leaf(tensor) for name, tensor in module.named_parameters()}
    form = layer_output(Arithmetic(precision(x.dtype)), spec, base, leaf(x))
    assert output.shape == form.value.shape and bool(torch.isfinite(form.bound).all())
    return float(((output.double() - form.value).abs() / (2 * form.bound)).max())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_computes_what_the_oracle_says_of_it(bias: bool, dtype: str) -> None:
    spec, module, x = block(dtype, bias)
    assert ratio(spec, module, x, attention.run(spec, module, x)) <= 1


def test_the_bound_tells_another_norm_and_another_activation_apart() -> None:
    spec, module, x = block("float64", True)
    module.mlp.act_fn = nn.GELU()
    assert ratio(spec, module, x, attention.run(spec, module, x)) > 1
    spec, module, x = block("float64", True)
    module.input_layernorm.variance_epsilon = 0.5
    assert ratio(spec, module, x, attention.run(spec, module, x)) > 1


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def test_a_state_is_injected_and_goes_on_by_a_gate() -> None:
    tensors = {"down": numbers(2, 4), "up": numbers(4, 2)}
    for seed, name in enumerate(("transform", "gate")):
        tensors |= {f"{name}.0.weight": numbers(3, 4, seed=seed), f"{name}.0.bias": numbers(3, seed=seed)}
        tensors |= {f"{name}.2.weight": numbers(4, 3, seed=seed), f"{name}.2.bias": numbers(4, seed=seed)}
    site = Site(SPEC, AdapterSpec("x", (0,), 2, 0.7), {role: leaf(tensor) for role, tensor in tensors.items()})
    hidden, state, after = x = numbers(3, 2, 5, 4)
    found = FORMULAS["shadow"].forward(machine(torch.float64, torch.float64, False), [site], {}, leaf(x))

    def network(name: str) -> Tensor:
        layers = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 4)).double()
        layers.load_state_dict({key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(name)})
        return layers(after).detach()

    gate = torch.sigmoid(network("gate"))
    given = hidden + 0.7 * torch.einsum("bti,ri,or->bto", hidden - state, tensors["down"], tensors["up"])
    due = torch.stack((given, state + gate * (network("transform") - state), after))
    assert torch.allclose(found.value, due, rtol=0, atol=1e-12) and bool((found.bound < 1e-12).all())


# defects that are planted in PEFT, and the law that is there for each


def verdict(law: str, one: Case) -> str:
    with engine.pinned():
        (outcome,) = engine.check(PEFT, one, laws(law))
    return outcome.status


def from_the_state(self, hidden_states: Tensor, shadow_states: Tensor, adapter_name: str) -> Tensor:
    return _INJECT(self, shadow_states, hidden_states, adapter_name) - shadow_states + hidden_states


def ungated(self, hidden_states: Tensor, shadow_states: Tensor, adapter_name: str) -> Tensor:
    return self.shadow_update_transform[adapter_name](hidden_states)


def dead(self, hidden_states: Tensor, shadow_states: Tensor, adapter_name: str) -> Tensor:
    return hidden_states + (_INJECT(self, hidden_states, shadow_states, adapter_name) - hidden_states).detach()


def at_random(self, adapter_name: str, config) -> None:
    _UPDATE(self, adapter_name, replace(config, init_weights=False))


def left_in(self, *args, **kwargs) -> bool:
    return bool(self._boundary_layers)


def thawed(self, model: nn.Module) -> None:
    _MARK(self, model)
    model.get_input_embeddings().requires_grad_(True)


def undropped(self, hidden_states: Tensor, shadow_states: Tensor, adapter_name: str) -> Tensor:
    self.shadow_dropout[adapter_name].p = 0.0
    return _INJECT(self, hidden_states, shadow_states, adapter_name)


def merged(self) -> None:
    pass


_INJECT, _UPDATE, _MARK = (
    ShadowLayer.shadow_inject,
    ShadowLayer.update_layer,
    ShadowModel._mark_only_adapters_as_trainable,
)
PLANTED: dict[str, tuple[str, type, str, Callable]] = {
    "sign": ("forward.oracle", ShadowLayer, "shadow_inject", from_the_state),
    "gate": ("forward.oracle", ShadowLayer, "shadow_update", ungated),
    "start": ("train.identity_at_init", ShadowLayer, "update_layer", at_random),
    "dead": ("train.live_gradients", ShadowLayer, "shadow_inject", dead),
    "disable": ("merge.disable", ShadowModel, "_shadow_path_active", left_in),
    "dropout": ("train.dropout", ShadowLayer, "shadow_inject", undropped),
    "thawed": ("train.base_frozen", ShadowModel, "_mark_only_adapters_as_trainable", thawed),
}


@pytest.mark.parametrize("name", sorted(PLANTED))
@pytest.mark.filterwarnings("ignore")
def test_a_law_sees_its_defect_on_a_whole_model_and_nothing_without(name: str, monkeypatch) -> None:
    law, owner, attribute, planted = PLANTED[name]
    one = drawn(dropout=0.5 if name == "dropout" else 0.0)
    assert verdict(law, one) == "pass"
    monkeypatch.setattr(owner, attribute, planted)
    assert verdict(law, one) == "violation"


@pytest.mark.filterwarnings("ignore")
def test_a_refusal_to_merge_that_is_gone_is_seen(monkeypatch) -> None:
    one = drawn(blocks="first")
    assert verdict("refuse.merge", one) == "pass"
    monkeypatch.setattr(ShadowModel, "_check_merge_allowed", merged)
    monkeypatch.setattr(ShadowLayer, "merge", lambda self, safe_merge=False, adapter_names=None: None)
    assert verdict("refuse.merge", one) == "violation"
