"""Adaption prompts on a whole Llama: what its attention computes, and that each law sees what it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

from peft.tuners.adaption_prompt.layer import AdaptedAttention, _BaseAdaptedAttention
from peft.tuners.adaption_prompt.model import AdaptionPromptModel

from peftcheck import attention, engine, generator, transformer_models
from peftcheck.case import Case, LayerSpec, Sweep
from peftcheck.implementations.peft import Peft
from peftcheck.law import laws
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import DTYPES, Arithmetic, leaf, precision

PEFT = Peft()
VARIANT = PEFT.variants()["adaption_prompt"]


def drawn(dtype: str = "float32", **settings) -> Case:
    """Return the first case in which all settings are as asked."""
    sweep = Sweep("peft", "adaption_prompt", "model.llama", dtype)
    wanted = {"blocks": 2, "bias": False, **settings}
    cases = (generator.draw(VARIANT, sweep, 0, index) for index in range(200))
    found = next(one for one in cases if all(one.setting(key) == value for key, value in wanted.items()))
    return replace(found, profile="normal", batch=(2, 4))


def attending(dtype: str, **settings) -> tuple[LayerSpec, nn.Module, Tensor]:
    """Return an attention layer of a case's model, and an input of its width."""
    case = drawn(dtype, **settings)
    spec = next(one for one in case.layers if one.kind == "attention.llama")
    module = transformer_models.build(case).requires_grad_(False).get_submodule(spec.name)
    generator_ = torch.Generator().manual_seed(1)
    return spec, module, torch.randn(2, 5, spec.n_in, generator=generator_, dtype=torch.float64).to(DTYPES[dtype])


def compared(spec: LayerSpec, module: nn.Module, x: Tensor, output: Tensor) -> float:
    base = {name: leaf(tensor) for name, tensor in module.named_parameters()}
    form = layer_output(Arithmetic(precision(x.dtype)), spec, base, leaf(x))
    assert output.shape == form.value.shape
    return float(((output.double() - form.value).abs() / (2 * form.bound)).max())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("bias", [False, True])
def test_the_attention_computes_what_the_oracle_says_of_it(bias: bool, dtype: str) -> None:
    spec, module, x = attending(dtype, bias=bias)
    assert compared(spec, module, x, attention.run(spec, module, x)) <= 1


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_bound_tells_other_positions_a_missing_mask_and_other_heads_apart(dtype: str) -> None:
    spec, module, x = attending(dtype)
    assert compared(spec, module, x, attention.run(replace(spec, causal=False), module, x)) > 50
    assert compared(spec, module, x, attention.run(spec, module, x.flip(1)).flip(1)) > 50
    module.q_proj.weight.data = module.q_proj.weight.roll(module.head_dim, 0)
    assert compared(spec, attending(dtype)[1], x, attention.run(spec, module, x)) > 50


def test_what_is_recorded_is_the_attention_in_its_place() -> None:
    """A layer that is called by itself gives what it gives in the model: positions and mask are those of the model."""
    case = drawn()
    model = transformer_models.build(case).requires_grad_(False)
    spec = next(one for one in case.layers if one.kind == "attention.llama")
    seen: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(spec.name)
    module.register_forward_hook(
        lambda m, args, given, out: seen.append((given["hidden_states"], out[0])), with_kwargs=True
    )
    model(*transformer_models.arguments(case))
    ((x, y),) = seen
    assert torch.equal(attention.run(spec, module, x), y)


# defects that are planted in PEFT, and the law that is there for each


def verdict(law: str, case: Case | None = None) -> str:
    with engine.pinned():
        (outcome,) = engine.check(PEFT, case or drawn(), laws(law))
    return outcome.status


def gateless(cls, model, config, adapter_name, state_dict, unwanted_adapter_names) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state_dict.items() if key.endswith("adaption_prompt")}


def unprompted(self, given: dict) -> Tensor:
    """Return the output of the attention alone; a cache would keep its keys and values twice."""
    return self.model(**{key: value for key, value in given.items() if key not in ("cache", "past_key_values")})[0]


def opened(self, model_type: str, adapter_len: int, model: nn.Module, target_dtype: torch.dtype) -> None:
    _INIT(self, model_type, adapter_len, model, target_dtype)
    self.adaption_gate.data.fill_(0.5)


def detached(self, **given) -> tuple:
    plain, (output, *rest) = unprompted(self, given), _FORWARD(self, **given)
    return plain + (output - plain).detach(), *rest


def scaled_twice(self, **given) -> tuple:
    plain, (output, *rest) = unprompted(self, given), _FORWARD(self, **given)
    return plain + 2 * (output - plain), *rest


def left_in(self, adapter_name: str) -> None:
    self._cached_adapters[adapter_name] = [parent.self_attn for parent in self._parents[adapter_name]]


def all_blocks(self, adapter_name: str, config) -> None:
    config.adapter_layers = self.model.config.num_hidden_layers
    _ADD(self, adapter_name, config)


def nothing_frozen(self, model: nn.Module) -> None:
    pass


def with_values(cls, model, config, adapter_name, state_dict, unwanted_adapter_names) -> dict[str, Tensor]:
    return {key: t for key, t in state_dict.items() if ".".join(key.split(".")[-2:]) == "v_proj.weight"} | {
        key: t for key, t in state_dict.items() if key.split(".")[-1].startswith("adaption_")
    }


_INIT, _FORWARD, _ADD = _BaseAdaptedAttention.__init__, AdaptedAttention.forward, AdaptionPromptModel.add_adapter
PLANTED: dict[str, tuple[type, str, Callable]] = {
    "forward.oracle": (AdaptedAttention, "forward", scaled_twice),
    "merge.disable": (AdaptionPromptModel, "_remove_adapted_attentions", left_in),
    "attach.targets": (AdaptionPromptModel, "add_adapter", all_blocks),
    "state.save_load": (AdaptionPromptModel, "_get_adapter_state_dict", classmethod(gateless)),
    "state.checkpoint_size": (AdaptionPromptModel, "_get_adapter_state_dict", classmethod(with_values)),
    "train.identity_at_init": (_BaseAdaptedAttention, "__init__", opened),
    "train.live_gradients": (AdaptedAttention, "forward", detached),
    "train.base_frozen": (AdaptionPromptModel, "_mark_only_adaption_prompts_as_trainable", nothing_frozen),
}


@pytest.mark.parametrize("law", sorted(PLANTED))
@pytest.mark.filterwarnings("ignore")
def test_a_law_sees_its_defect_on_a_whole_model_and_nothing_without(law: str, monkeypatch) -> None:
    case = drawn()
    case = replace(case, adapters=(replace(case.adapters[0], targets=case.adapters[0].targets[-1:]),))
    assert verdict(law, case) == "pass"
    monkeypatch.setattr(*PLANTED[law])
    assert verdict(law, case) == "violation"
