"""PEFT's weighted combinations where the laws of combinations do not go: attention layers, other quantiles to clamp at.

An attention layer has two adapted weights, the stacked projections and the output's; those laws compare one. (What
merging makes of them is in the ledger: lora-attention-output-twice.) A test whose name says 'known issue' holds as long
as PEFT has that issue; what is right stands in its docstring.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from small_llama import SINGLE, known, scatter
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = {"a": 1.0, "b": -0.5}
WHOLE = {"cat": {}, "svd": {"svd_rank": 5}}
"""The kinds that PEFT calls precise, at a rank that holds the sum."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.attention(x, x, x, need_weights=False)[0])


def base() -> Block:
    torch.manual_seed(0)
    return Block().double().eval()


def two() -> PeftModel:
    """Return adapters 'a' of rank 2 and 'b' of rank 3 on both layers, in double precision."""
    configs = [LoraConfig(r=rank, lora_alpha=3, target_modules=["attention", "up"]) for rank in (2, 3)]
    model = get_peft_model(base(), configs[0], "a")
    model.add_adapter("b", configs[1])
    for adapter in WEIGHTS:
        scatter(model, adapter)
    return model.eval()


def changes(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return what an adapter adds to each of the three weights, (alpha / r) B A."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == 3, "the stacked projections, the output projection, the linear layer"
    found = {}
    for name, layer in layers.items():
        a, b = (part[adapter].weight.detach().contiguous() for part in (layer.lora_A, layer.lora_B))
        found[name] = layer.scaling[adapter] * (b @ a)
    return found


def due(model: PeftModel) -> dict[str, Tensor]:
    found = {adapter: changes(model, adapter) for adapter in WEIGHTS}
    return {name: sum(weight * found[adapter][name] for adapter, weight in WEIGHTS.items()) for name in found["a"]}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Weights go through single precision (the ledger's combine-weights-in-single-precision): some of its roundings."""
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=16 * SINGLE * float(value.abs().max())), name


@pytest.mark.parametrize("kind", WHOLE)
def test_both_projections_of_an_attention_layer_are_combined(kind: str, tmp_path: Path) -> None:
    model, x = two(), torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before, sources = model(x).detach(), [changes(model, adapter) for adapter in WEIGHTS]
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "c", combination_type=kind, **WHOLE[kind])
    combined = changes(model, "c")
    agree(combined, due(model))
    assert torch.equal(model(x), before), "nothing else is activated"
    for adapter, own in zip(WEIGHTS, sources, strict=True):
        assert all(torch.equal(changes(model, adapter)[name], value) for name, value in own.items())
    model.save_pretrained(str(tmp_path), selected_adapters=["c"])
    again = PeftModel.from_pretrained(base(), str(tmp_path / "c"), "c")
    assert all(torch.equal(changes(again, "c")[name], value) for name, value in combined.items())


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_one_adapter_on_an_attention_layer_comes_out_as_itself(kind: str) -> None:
    model = two()
    model.add_weighted_adapter(["b"], [2.0], "c", combination_type=kind)
    agree(changes(model, "c"), {name: 2.0 * value for name, value in changes(model, "b").items()})


@known
@pytest.mark.parametrize("quantile", [0.05, 0.2])
def test_known_issue_a_low_quantile_turns_both_factors_into_one_number(quantile: float) -> None:
    """Right: of 'a quantile threshold for clamping', what is larger than the threshold is cut to it, the rest stays.

    tuners/lora/model.py, _svd_generalized_task_arithmetic_weighted_adapter takes the quantile of the signed entries of
    both factors for the upper limit and its negative for the lower: below the median it is negative, the limits cross,
    and torch's clamp sets every entry to the upper one. (The ledger's combine-clamp-by-signed-quantile, at a quantile
    other than 1.)
    """
    model = two()
    given = {"combination_type": "svd", "svd_rank": 5}
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "whole", **given)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "cut", svd_clamp=quantile, **given)
    layer = model.base_model.model.up
    pairs = [(layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()) for name in ("whole", "cut")]
    whole, cut = (torch.cat([b.flatten(), a.flatten()]) for b, a in pairs)
    limit = torch.quantile(whole.abs(), quantile)
    assert not torch.equal(cut, whole.clamp(-limit, limit)), "fixed: only what is larger is cut"
    assert torch.equal(cut, torch.full_like(cut, float(torch.quantile(whole, quantile)))) and float(cut[0]) < 0
