"""What faults need of a port: which tensors a merge changes, and ways to spoil them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftcheck.case import AdapterSpec
from peftcheck.faults.fault import Port

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def named(port: Port, adapter: str) -> AdapterSpec:
    """Return the spec of an adapter of the case."""
    return next(spec for spec in port.case.adapters if spec.name == adapter)


def targeted(port: Port) -> list[str]:
    """Return the layers that some adapter of the case targets, in the order of the model."""
    wanted = {target for adapter in port.case.adapters for target in adapter.targets}
    return [spec.name for index, spec in enumerate(port.case.layers) if index in wanted]


def own(port: Port, role: str | None = None) -> dict[str, Tensor]:
    """Return the base tensors of the targeted layers by name, or those called `role` ('weight', 'bias')."""
    names = targeted(port)
    return {
        key: tensor
        for key, tensor in port.inner.base_tensors().items()
        if key.rpartition(".")[0] in names and role in (None, key.rpartition(".")[2])
    }


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return clones."""
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def write(port: Port, values: dict[str, Tensor]) -> None:
    """Write values into base tensors."""
    tensors = port.inner.base_tensors()
    with torch.no_grad():
        for key, value in values.items():
            tensors[key].copy_(value)


def next_up(tensor: Tensor) -> None:
    """Move the largest element of a tensor one unit in the last place away from zero."""
    with torch.no_grad():
        flat = tensor.detach().reshape(-1).clone()
        if flat.numel():
            at = flat.abs().argmax()
            flat.view(_BITS[flat.element_size()])[at] += 1
            tensor.copy_(flat.reshape(tensor.shape))


def finite(tensor: Tensor) -> bool:
    """Return whether every element is finite."""
    return bool(torch.isfinite(tensor).all())


def owner(port: Port, tensor: Tensor) -> tuple[nn.Module, str]:
    """Return the first module of the model that holds a parameter, and the name under which it does."""
    for root in port.inner.roots():
        for module in root.modules() if isinstance(root, nn.Module) else ():
            for name, parameter in module._parameters.items():
                if parameter is tensor:
                    return module, name
    raise LookupError("no module of the model holds this parameter")


def rounded(port: Port, dtype: torch.dtype) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Round every adapter tensor to `dtype` in place; return (tensor, value before) by adapter."""
    before = {}
    with torch.no_grad():
        for adapter in port.case.adapters:
            held = list(port.inner.adapter_tensors(adapter.name).values())
            before[adapter.name] = [(tensor, tensor.detach().clone()) for tensor in held]
            for tensor in held:
                tensor.copy_(tensor.to(dtype))
    return before


def put_back(before: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    """Undo `rounded`."""
    with torch.no_grad():
        for pairs in before.values():
            for tensor, value in pairs:
                tensor.copy_(value)
