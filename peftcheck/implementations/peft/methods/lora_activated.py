"""Activated LoRA in PEFT: told where each row is invoked, or finding it in the ids of a whole model."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peftcheck import transformer_models
from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.method import MERGES, Method
from peftcheck.implementations.peft.methods.lora import ROLES, configured
from peftcheck.implementations.peft.methods.lora_inits import BOTH
from peftcheck.oracle.activated import lasts


def claim(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """LoraConfig.alora_invocation_tokens: "merging is not possible due to the selective application of the weights"."""
    if op in MERGES:
        return Claim.ABSENT if op is Op.DELTA else Claim.REFUSES
    return Claim.ABSENT if op is Op.COMBINE else Claim.YES


def _told(model: nn.Module, config: Any, adapter: str, case: Case) -> None:
    """Tell a layer alone which tokens of its input are invoked; a whole model's are found by PEFT in its ids."""
    for module in model.modules():
        if not case.whole and isinstance(module, LoraLayer) and _tell not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "alora_offsets": lasts(args[0])}


_ALONE = (
    "def layer(name):  # a row is invoked by the first token whose first feature is positive",
    '    module = model.get_submodule("base_model.model." + name)',
    "    def run(x):",
    "        heads = (x[..., 0] > 0).reshape(len(x), -1).int()",
    "        lasts = [int(h.numel() - h.argmax()) if h.any() else None for h in heads]",
    "        return module(x, alora_offsets=lasts)",
    "    return run",
)


def _layer(case: Case) -> tuple[str, ...]:
    """Return how a script calls a layer: a whole model's with the offsets that PEFT finds in the ids."""
    if not case.whole:
        return _ALONE
    ids = transformer_models.arguments(case)[0].tolist()
    return (
        "def layer(name):",
        "    from peft.tuners.lora.variants import calculate_alora_offsets",
        '    module = model.get_submodule("base_model.model." + name)',
        f"    found = calculate_alora_offsets(model.peft_config, model.active_adapter, torch.tensor({ids}))",
        "    return lambda x: module(x, alora_offsets=found)",
    )


METHODS = (
    Method(
        Variant(
            "lora.alora",
            "lora.alora",
            BOTH,
            options={"rslora": (False, True)},
            claim=claim,
            batches=((2,), (1, 1), (1, 4), (2, 3), (3, 5)),  # a language model's hidden states, or its tokens in a row
        ),
        configured(alora_invocation_tokens=[1]),  # of a whole model the case says which: see as_users_write
        ROLES,
        tells=_told,
        layer=_layer,
    ),
)
