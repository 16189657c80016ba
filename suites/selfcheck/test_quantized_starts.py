"""What test_lora_options.py says cannot be a variant: LoftQ, which starts on accelerators only, and QALoRA, which needs GPTQ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _loftq_init_new

GROUP, RANK, SCALE = 16, 4, 2.0


class Model(nn.Module):
    """A layer under test, and one beside it that has parameters: PEFT asks the model's first for its device."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.beside = layer, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def linear(n_in: int = 64, n_out: int = 32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias=False)


processor_alone = pytest.mark.skipif(
    torch.cuda.is_available() or torch.xpu.is_available(), reason="LoftQ can start here"
)


@processor_alone
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 2])
def test_loftq_asks_for_an_accelerator_before_it_changes_anything(bits: int, iterations: int) -> None:
    pytest.importorskip("bitsandbytes")
    model = Model(linear())
    config = LoraConfig(
        target_modules=["a"], init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": iterations}
    )
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda|NVIDIA"):
        get_peft_model(model, config)
    assert torch.equal(model.a.weight, linear().weight)


@processor_alone
def test_loftq_on_a_quantized_model_asks_for_an_accelerator_too() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    quantized = bnb.nn.Params4bit(linear().weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda|NVIDIA"):
        _loftq_init_new(quantized, linear().weight.data, 4, RANK)


def test_qalora_on_a_plain_layer_is_lora() -> None:
    """LoraConfig.use_qalora: "It is only implemented in GPTQ for now"; elsewhere it is read by nothing."""
    outputs = []
    for qalora in (False, True):
        torch.manual_seed(1)
        config = LoraConfig(
            r=RANK, target_modules=["a"], init_lora_weights=False, use_qalora=qalora, qalora_group_size=GROUP
        )
        model = get_peft_model(Model(linear()), config).eval()
        outputs.append(model(torch.ones(2, 64)))
    assert torch.equal(*outputs)


def gptq() -> nn.Module:
    """Return a layer of GPTQ's with four bits, computed by torch alone."""
    library = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    formats = pytest.importorskip("gptqmodel.quantization.config").FORMAT
    plain, group = linear(), 32
    made = library.TorchLinear(
        bits=4,
        group_size=group,
        sym=True,
        desc_act=False,
        in_features=64,
        out_features=32,
        bias=False,
        format=formats.GPTQ,
    )
    scales = plain.weight.detach().reshape(32, -1, group).abs().amax(-1) / 7
    made.pack(plain, scales, torch.full_like(scales, 8), (torch.arange(64) // group).int())
    made.post_init()
    return made


def adapted() -> nn.Module:
    config = LoraConfig(
        r=RANK,
        lora_alpha=SCALE * RANK,
        target_modules=["a"],
        init_lora_weights=False,
        use_qalora=True,
        qalora_group_size=GROUP,
    )
    return get_peft_model(Model(gptq()), config).eval()


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
def test_qalora_on_a_layer_of_gptq_adds_low_rank_products_of_pooled_inputs(shape: tuple[int, ...]) -> None:
    """Xu et al., QA-LoRA, 2023, algorithm 1: the inputs averaged by group, times the number of groups, through A and B.

    Bound: each of the products of 4 means and of 4 ranks in single precision, and one rounding to half of the result.
    """
    model, x = adapted(), torch.randn(shape, generator=torch.Generator().manual_seed(2)).half()
    layer = model.base_model.model.a
    with torch.no_grad():
        plain, found = gptq()(x), model(x)
    a, b = (getattr(layer, f"lora_{name}")["default"].weight.detach().double() for name in "AB")
    groups = 64 // GROUP
    pooled = x.double().unflatten(-1, (groups, GROUP)).mean(-1) * groups
    due = plain.double() + SCALE * pooled @ a.T @ b.T
    terms = plain.double().abs() + SCALE * pooled.abs() @ a.abs().T @ b.abs().T
    roundings = 2.0**-11 * (due.abs() + 3 * terms) + 64 * 2.0**-24 * terms
    assert bool(((found.double() - due).abs() <= roundings).all())
    assert bool(((found.double() - plain.double()).abs() > roundings).any()), (
        "an adapter that does nothing tests nothing"
    )


@pytest.mark.parametrize("operation", ["merge_adapter", "merge_and_unload"])
def test_qalora_refuses_to_merge_and_leaves_the_codes(operation: str) -> None:
    model = adapted()
    codes = model.base_model.model.a.quant_linear_module.qweight.clone()
    with pytest.raises(NotImplementedError):
        getattr(model, operation)()
    assert torch.equal(model.base_model.model.a.quant_linear_module.qweight, codes)
