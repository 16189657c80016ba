"""`layer_replication` of PEFT's LoraConfig: blocks that share the base's weights, each with a LoRA of its own.

It has no cells: it changes which layers the model has, and a shared weight has no merged value. A test whose name says
'known issue' holds as long as PEFT has that issue; what is right stands in its docstring.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from small_llama import adapted, close, known, llama, logits, lora, only, scatter, stands
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")
MAP, BLOCKS = [[0, 2], [1, 2]], (0, 1, 1)  # blocks 0 and 1, then 1 again


def replicated() -> PeftModel:
    return adapted(lora(layer_replication=MAP))


def by_hand(blocks: tuple[int, ...] = BLOCKS, changes: list[dict[str, Tensor]] | None = None) -> nn.Module:
    """Return a Llama of as many blocks, each with the weights of a block of the small one and a change of its own."""
    small, large = llama(), llama(blocks=len(blocks))
    values = {name: value for name, value in small.state_dict().items() if ".layers." not in name}
    for new, old in enumerate(blocks):
        start = f"model.layers.{old}."
        own = {name.removeprefix(start): value for name, value in small.state_dict().items() if name.startswith(start)}
        moved = changes[new] if changes else {}
        values |= {f"model.layers.{new}.{name}": value + moved.get(name, 0.0) for name, value in own.items()}
    large.load_state_dict(values)
    return large


def changes(model: PeftModel) -> list[dict[str, Tensor]]:
    """Return what the adapter 'a' adds to each block's weights, (alpha / r) B A, by the weight's name in its block."""
    found = []
    for block in model.base_model.model.model.layers:
        layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, LoraLayer)]
        pairs = {f"{name}.weight": (layer.lora_B["a"].weight, layer.lora_A["a"].weight) for name, layer in layers}
        found.append({name: (1.5 * b @ a).detach() for name, (b, a) in pairs.items()})
    return found


def test_blocks_are_repeated_on_shared_weights_each_with_its_own_lora() -> None:
    """PEFT's guide, 'Memory efficient Layer Replication with LoRA', after Kim et al., SOLAR, 2023: depth up-scaling."""
    model = replicated()
    first, second = (model.base_model.model.model.layers[i].self_attn.q_proj for i in (1, 2))
    assert first.base_layer.weight is second.base_layer.weight
    assert not torch.equal(first.lora_A["a"].weight, second.lora_A["a"].weight)
    assert close(logits(model), logits(by_hand(changes=changes(model))))
    assert not close(logits(model), logits(by_hand()))


def test_disabled_they_are_the_repeated_base() -> None:
    model = replicated()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(by_hand()))


def test_a_saved_one_repeats_the_blocks_when_it_is_loaded(tmp_path: Path) -> None:
    model = replicated()
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), str(tmp_path / "a"), "a").eval()), logits(model))


@known
@pytest.mark.parametrize("export", [False, True])
def test_known_issue_merging_replicated_layers_is_not_refused(export: bool) -> None:
    """Right: 'Cannot merge LORA layers when base model layers are replicated', as PEFT's own text says.

    tuners/lora/model.py, LoraModel._check_merge_allowed asks self.peft_config.get("layer_replication"): peft_config
    maps names of adapters to configurations, so that the answer is None whatever they hold, and every copy adds its
    change to the one weight; tuners/oft/model.py has a copy of the check. (The maintainers say in issue 1707 that
    merging is impossible here; of the dead check: not found.)
    """
    model = replicated()
    adapters, own = logits(model), changes(model)
    both = {name: own[1][name] + own[2][name] for name in own[1]}
    summed = logits(by_hand(changes=[own[0], both, both]))
    try:
        merged = model.merge_and_unload(safe_merge=True) if export else model.merge_adapter()
    except ValueError as refusal:
        pytest.fail(f"fixed: merging is refused ({refusal}); turn this into a plain test")
    stands(logits(merged or model), right=adapters, wrong=summed)
    if not export:  # as many changes come off again
        model.unmerge_adapter()
        assert close(logits(model), adapters)


@known
def test_known_issue_a_second_adapter_replicates_the_replicated_model() -> None:
    """Right: an adapter that is added leaves the active one's output as it was.

    tuners/lora/model.py, LoraModel._prepare_model replicates whenever an adapter is injected, also where the model is
    replicated already: blocks 0, 1, 1 become 0, 1, 1 of these, so that the third, with the first adapter's LoRA in it,
    is replaced by another copy of the second. Two adapters that were trained on one replicated model cannot be loaded
    together. (Reported: not found.)
    """
    model = replicated()
    before, own = logits(model), changes(model)
    model.add_adapter("b", lora(layer_replication=MAP))
    stands(logits(model), right=before, wrong=logits(by_hand(changes=[own[0], own[1], own[1]])))


def test_a_second_adapter_without_the_option_takes_the_blocks_as_they_are() -> None:
    model = replicated()
    before = logits(model)
    model.add_adapter("b", lora())
    scatter(model, "b")
    assert torch.equal(logits(model), before)
    assert not close(only(model, "b"), before)


@known
def test_known_issue_unloading_keeps_the_replicated_blocks() -> None:
    """Right: "Return the base model by removing all the PEFT modules", the model of two blocks that was given.

    Nothing puts the list of blocks back that replicate_layers replaced, or config.num_hidden_layers. (Reported: not
    found.)
    """
    base = replicated().unload()
    assert base.config.num_hidden_layers == len(base.model.layers)
    stands(logits(base), right=logits(llama()), wrong=logits(by_hand()))
