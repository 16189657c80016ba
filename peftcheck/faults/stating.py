"""Faults of an adapter's state: saving, loading, deleting, weights that layers share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcheck.case import Case
from peftcheck.faults.fault import Fault, Operation, Port, Reloading, replacing
from peftcheck.faults.tensors import owner
from peftcheck.implementation import Attached, Implementation

Spoil = Callable[[Port, dict[str, Tensor]], dict[str, Tensor]]


def _saving(spoil: Spoil) -> dict[str, Operation]:
    """Return a save whose files hold what `spoil(port, tensors)` makes of their tensors."""

    def save(port: Port, folder: Path, adapters) -> None:
        port.inner.save(folder, adapters)
        for path in Path(folder).rglob("*.safetensors"):
            save_file(spoil(port, load_file(path)), path)

    return {"save": save}


def _one_zeroed(port: Port, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    last = sorted(tensors)[-1]
    return {**tensors, last: torch.zeros_like(tensors[last])}


def _halved(port: Port, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}


def _zeroed_while_merged(port: Port, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = any(port.inner.merged().values())
    return {key: torch.zeros_like(tensor) if merged else tensor for key, tensor in tensors.items()}


def _twice(port: Port, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, **{f"layers {key}": tensor.clone() for key, tensor in tensors.items()}}


def _with_base(port: Port, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    base = {f"base {key}": tensor.detach().clone() for key, tensor in port.inner.base_tensors().items()}
    return {**tensors, **base}


def _save_and_clear(port: Port, folder: Path, adapters) -> None:
    port.inner.save(folder, adapters)
    with torch.no_grad():
        for tensor in port.inner.adapter_tensors(adapters[0]).values():
            tensor.add_(1)


def _load_into_first(port: Port, folder: Path, adapter: str) -> None:
    port.inner.load(folder, adapter)
    with torch.no_grad():
        for tensor in port.inner.adapter_tensors(port.case.adapters[0].name).values():
            tensor.mul_(-1)


def _rescaled(implementation: Implementation | Reloading, model: nn.Module, case: Case) -> Attached:
    """Attach, with another scale where the adapters come from a checkpoint."""
    attached = implementation.attach(model, case)
    if isinstance(implementation, Reloading):
        for adapter in implementation.folders:
            attached.rescale(adapter, 2.0)
    return Port(attached, case, {})


def _delete_prefixed(port: Port, adapter: str) -> None:
    names = [one.name for one in port.case.adapters if port.inner.sites(one.name)]
    for name in names:
        if name.startswith(adapter):
            port.inner.delete(name)


def _delete_and_keep(port: Port, adapter: str) -> None:
    kept = next(iter(port.inner.adapter_tensors(adapter).values()))
    port.inner.delete(adapter)
    port.inner.roots()[0].register_buffer("kept", kept.detach())


def _delete_remembering(port: Port, adapter: str) -> None:
    port.notes["deleted"] = {key: t.detach().clone() for key, t in port.inner.adapter_tensors(adapter).items()}
    port.inner.delete(adapter)


def _add_remembered(port: Port, adapter) -> None:
    port.inner.add(adapter)
    with torch.no_grad():
        for key, tensor in port.inner.adapter_tensors(adapter.name).items():
            tensor.copy_(port.notes["deleted"][key])


def _delete_and_deactivate(port: Port, adapter: str) -> None:
    port.inner.delete(adapter)
    port.inner.activate(())


def _delete_from_half(port: Port, adapter: str) -> None:
    """Delete nothing, and stop using it."""
    port.inner.activate([one.name for one in port.case.adapters if one.name != adapter])


def _untie(port: Port) -> None:
    for spec in port.case.layers:
        if spec.tied is not None:
            module, name = owner(port, port.inner.base_tensors()[f"{spec.name}.weight"])
            module._parameters[name] = nn.Parameter(module._parameters[name].detach().clone(), False)


def _several(case: Case) -> bool:
    return len(case.adapters) > 1


def _alike(case: Case) -> bool:
    """Whether the adapter that is deleted has a name that opens another's."""
    names = [adapter.name for adapter in case.adapters]
    victim = names[case.poison.adapter % len(names)]
    return any(name != victim and name.startswith(victim) for name in names)


def _moving(case: Case) -> bool:
    return case.profile in ("normal", "dyadic", "large")


FAULTS = (
    Fault(
        "save.tensor-dropped",
        "one tensor of a checkpoint holds zeros",
        "huggingface/peft#3584: layers called like another adapter are left out of the checkpoint",
        ("state.save_load", "state.reload_merge"),
        replacing(**_saving(_one_zeroed)),
        variants=("lora", "lora.rslora", "ia3"),
        suits=_moving,
    ),
    Fault(
        "save.rounded",
        "values are rounded to bfloat16 on their way into the checkpoint",
        "a cast where none is due, a standard mutation",
        ("state.save_load",),
        replacing(**_saving(_halved)),
        dtypes=("float64", "float32"),
        suits=lambda case: case.profile == "normal",
    ),
    Fault(
        "save.while-merged",
        "what is saved while an adapter is merged is not the adapter",
        "PEFT's LN tuning merges by swapping adapter and base",
        ("state.save_merged",),
        replacing(**_saving(_zeroed_while_merged)),
        suits=_moving,
    ),
    Fault(
        "save.changes-model",
        "saving changes the tensors that it saves",
        "huggingface/peft#654: operations that rewrote their sources",
        ("state.save_load",),
        replacing(save=_save_and_clear),
    ),
    Fault(
        "load.changes-others",
        "loading an adapter changes another",
        "PEFT 0.21.2: loading a second PiSSA adapter takes its initial part out of the base of the first",
        ("state.save_load",),
        replacing(load=_load_into_first),
        suits=_moving,
    ),
    Fault(
        "load.scale",
        "a reloaded adapter acts with another scale than the one that was saved",
        "a constant changed, a standard mutation",
        ("state.save_load", "state.reload_merge"),
        _rescaled,
        variants=("lora", "lora.rslora"),
        suits=_moving,
    ),
    Fault(
        "checkpoint.per-layer",
        "what layers share is written once for each of them",
        "huggingface/peft#3709: RandLoRA's projections",
        ("state.checkpoint_size",),
        replacing(**_saving(_twice)),
    ),
    Fault(
        "checkpoint.base",
        "the checkpoint of an adapter holds the base as well",
        "PEFT 0.21.2: targeted embeddings are saved whole where they have one of three usual names",
        ("state.checkpoint_size",),
        replacing(**_saving(_with_base)),
    ),
    Fault(
        "delete.prefix",
        "deleting 'a' deletes 'ab' too",
        "huggingface/peft#3282: adapters found by a part of their name",
        ("state.delete",),
        replacing(delete=_delete_prefixed),
        suits=_alike,
    ),
    Fault(
        "delete.leaks",
        "the model keeps a tensor of a deleted adapter",
        "huggingface/peft#2466: modules to save stayed after their adapter was deleted",
        ("state.delete",),
        replacing(delete=_delete_and_keep),
    ),
    Fault(
        "delete.nothing",
        "deleting only deactivates",
        "statement deletion, a standard mutation operator",
        ("state.delete",),
        replacing(delete=_delete_from_half),
    ),
    Fault(
        "delete.remembers",
        "an adapter that is added under a deleted one's name has its values",
        "huggingface/peft#1105: layers that let go of some of an adapter's tensors only",
        ("state.delete",),
        replacing(delete=_delete_remembering, add=_add_remembered),
        suits=_moving,
    ),
    Fault(
        "delete.deactivates",
        "deleting one adapter deactivates the others",
        "huggingface/peft#3512: a stale active adapter after a deletion",
        ("state.delete",),
        replacing(delete=_delete_and_deactivate),
        suits=lambda case: _several(case) and _moving(case),
    ),
    Fault(
        "attach.unties",
        "attaching gives a layer whose weight is shared a weight of its own",
        "huggingface/peft#2972: adapters on tied embeddings",
        ("state.tied",),
        replacing(_untie),
        suits=_moving,
    ),
)
