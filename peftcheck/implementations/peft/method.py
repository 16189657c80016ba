"""How a variant is configured in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.implementations.peft.attached import PeftAttached

MERGES = frozenset({Op.MERGE, Op.SAFE_MERGE, Op.UNMERGE, Op.EXPORT, Op.DELTA})


Step = Callable[[nn.Module, Any, str, Case], None]
"""A step of the attachment: (model, PEFT's configuration, the adapter's name, the case)."""


def _nothing(model: nn.Module, config: Any, adapter: str, case: Case) -> None:
    pass


def _attach(model: nn.Module, config: Any, adapter: AdapterSpec, autocast: bool, mixed: bool) -> PeftModel:
    return get_peft_model(model, config, adapter.name, mixed=mixed, autocast_adapter_dtype=autocast)


def _run(model: PeftModel, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return model(*inputs)


@dataclass(frozen=True)
class Method:
    """A variant and its PEFT configuration.

    `config(adapter, targets)` returns PEFT's configuration for the named target modules; `roles` renames PEFT's
    parameter attributes ('lora_A.weight') to the roles of the closed form ('A'). `before` is what the documentation
    asks to be run on the user's model before an adapter is attached (statistics of data), `after` what it asks to be
    run on PEFT's model afterwards, `tells` what is to be told its layers, adapted or loaded. `run(model, inputs)` runs
    a model that has to be told more than its inputs;
    `layer` defines, in a script, how its layers are called then. `mixed`: the adapters are of several types.
    `attach` makes PEFT's model of the user's with the first adapter, where `get_peft_model` alone does not; `own` yields
    a layer's tensors of an adapter as (role, tensor), where they are not all kept under the adapter's name; `scripted`
    returns the imports and the lines with which a script does what `attach` does; `finished(case, adapter)` the name that
    a script imports from PEFT, and the line with which it does what `after` does, to tensors that it then writes; `port`
    puts PEFT's model behind the port, where it is made of other wrappers than layers'.
    """

    variant: Variant
    config: Callable[[AdapterSpec, list[str]], Any]
    roles: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    before: Step = _nothing
    after: Step = _nothing
    tells: Step = _nothing
    run: Callable[[PeftModel, Sequence[Tensor]], Sequence[Tensor]] = _run
    layer: tuple[str, ...] | Callable[[Case], tuple[str, ...]] | None = None
    mixed: bool = False
    attach: Callable[[nn.Module, Any, AdapterSpec, bool, bool], PeftModel] = _attach
    scripted: Callable[[Case, Any], tuple[tuple[str, ...], tuple[str, ...]]] | None = None
    finished: Callable[[Case, AdapterSpec], tuple[str, str]] | None = None
    own: Callable[[BaseTunerLayer, str], Iterator[tuple[str, Tensor]]] | None = None
    port: Callable[..., PeftAttached] = PeftAttached


def no_delta(op: Op, spec: LayerSpec, adapter: AdapterSpec) -> Claim:
    """Claim everything but a reported delta."""
    return Claim.ABSENT if op is Op.DELTA else Claim.YES


def keeping(*roles: str) -> Callable[[AdapterSpec], frozenset[str]]:
    """Declare that a checkpoint holds tensors of these roles besides the trained ones."""
    return lambda adapter: frozenset(roles)
