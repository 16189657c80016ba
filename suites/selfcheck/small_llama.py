"""A small Llama in double precision, for what no layer alone can show, and the words for a known issue of PEFT."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

HIDDEN, VOCABULARY = 16, 32
SINGLE = 2.0**-24
IDS = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))

known = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="the issue was found in PEFT 0.21.2")
"""A test that holds as long as PEFT has the issue that it names, and says so where it is fixed."""


def llama(bias: bool = False, tied: bool = False, blocks: int = 2) -> nn.Module:
    """Return a Llama, the same each time, in double precision; its norms and its softmax go through single."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=bias,
        attn_implementation="eager",
        tie_word_embeddings=tied,
        initializer_range=0.3,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def lora(**options) -> LoraConfig:
    """Return a LoRA's configuration, of rank 2 and scale 1.5, on some of the blocks' layers unless told otherwise."""
    usual = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**usual | options)


def adapted(config: LoraConfig, adapter: str = "a", **model) -> PeftModel:
    """Return the Llama with an adapter in which nothing is zero."""
    wrapped = get_peft_model(llama(**model), config, adapter).eval()
    scatter(wrapped)
    return wrapped


def add(model: PeftModel, adapter: str, config: LoraConfig) -> None:
    """Add an adapter in which nothing is zero, and which is not active."""
    model.add_adapter(adapter, config)
    scatter(model, adapter)
    model.eval()


def logits(model: nn.Module, **given) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


def only(model: PeftModel, adapter: str) -> Tensor:
    """Return the logits with one adapter active; it stays active."""
    model.set_adapter(adapter)
    return logits(model)


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def scatter(model: PeftModel, adapter: str | None = None) -> None:
    """Write random values into every tensor that is trained, or into those of one adapter; zeros hide what meets them.

    A tensor with two names gets one value.
    """
    generator = torch.Generator().manual_seed(3 + sum(map(ord, adapter or "")))
    own = dict(model.named_parameters()) if adapter else trained(model)
    written: set[int] = set()
    for name, parameter in sorted(own.items()):
        if (adapter and adapter not in name.split(".")) or parameter.data_ptr() in written:
            continue
        written.add(parameter.data_ptr())
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def close(found: Tensor, due: Tensor) -> bool:
    """Return whether two outputs are one but for some hundreds of single precision's roundings."""
    return torch.allclose(found.double(), due.double(), rtol=0, atol=512 * SINGLE * float(due.abs().max()))


def stands(found: Tensor, right: Tensor, wrong: Tensor) -> None:
    """Assert that a known issue is there: `wrong` is found, and not what is `right`."""
    assert not close(found, right), "fixed: PEFT does what is right now; turn this into a plain test"
    assert close(found, wrong), "neither what is right nor what PEFT 0.21.2 does"


def crashes(error: type[Exception], run: Callable[[], object]) -> None:
    """Assert that a known crash is there."""
    try:
        run()
    except error:
        return
    pytest.fail("fixed: this runs now; turn this into a plain test")
