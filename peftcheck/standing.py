"""What must stand after a step that had no business with it: tensors, their marks, modes of modules, what is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from peftcheck.architecture import layout
from peftcheck.implementation import Attached
from peftcheck.measurement import NOTHING, Measurement, broken, identical

Marks = dict[str, tuple]
Tensors = dict[tuple[str, str], Tensor]


def marks(attached: Attached) -> Marks:
    """Return dtype, shape, requires_grad and the strides that mean something of every base tensor, by name."""
    return {key: _marks(tensor) for key, tensor in attached.base_tensors().items()}


def _marks(tensor: Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, layout(tensor)


def astray(attached: Attached, mode: bool) -> frozenset[str]:
    """Return the modules that are not in the given mode of training."""
    models = [root for root in attached.roots() if isinstance(root, nn.Module)]
    return frozenset(name for model in models for name, module in model.named_modules() if module.training is not mode)


def modes(attached: Attached, mode: bool, before: Collection[str]) -> Measurement:
    """Return whether every module is in the given mode of training, but those that were not before either."""
    for name in sorted(astray(attached, mode)):
        if name not in before:
            return broken("model:module", "training flag", f"'{name}'.training is {not mode}, was {mode}")
    return NOTHING


def trained(attached: Attached, lasting: Mapping[str, Tensors]) -> dict[str, frozenset[tuple[str, str]]]:
    """Return which of the tensors that adapters keep for good require a gradient."""
    found: dict[str, frozenset[tuple[str, str]]] = {}
    for name, tensors in lasting.items():
        now = attached.adapter_tensors(name)
        found[name] = frozenset(key for key in tensors.keys() & now.keys() if now[key].requires_grad)
    return found


def bystanders(
    tensors: Mapping[str, Tensor], touched: Collection[str], due: Marks, held: Mapping[str, Tensor], strides: bool
) -> Iterator[Measurement]:
    """Yield every base tensor that has lost one of its marks, or changed without having been touched.

    `strides`: whether they are among what must be kept (not where a plain merge moves them already).
    """
    for key, marked in due.items():
        name, _, tensor = key.rpartition(".")
        if key not in tensors:
            yield broken(f"{key}:module", "lost", f"{key} is gone")
        elif (now := _marks(tensors[key]))[:3] != marked[:3]:
            yield broken(f"{key}:module", "marks", f"{key} is {now}, was {marked}")
        elif strides and now != marked:
            yield broken(f"{name}:{tensor}", "strides", f"{key} has strides {now[3]}, had {marked[3]}")
        elif key not in touched and not tensors[key].equal(held[key]):
            yield identical(f"{name}:{tensor}", tensors[key], held[key])


def adapters(
    attached: Attached,
    due: Mapping[str, Tensors],
    layouts: Mapping[str, Mapping[tuple[str, str], tuple]],
    trains: Mapping[str, frozenset[tuple[str, str]]] | None,
) -> Iterator[Measurement]:
    """Yield every tensor of an adapter that is gone, or changed in value, shape, dtype or strides.

    `trains`: which of them require a gradient, where that is known; then this may not change either.
    """
    for name, tensors in due.items():
        now = attached.adapter_tensors(name)
        if not now.keys() >= tensors.keys():
            site, role = min(tensors.keys() - now.keys())
            yield broken(
                f"{site}:{role} of the adapter",
                "lost",
                f"the tensors of '{name}' are not those that it had: {(site, role)}",
            )
            continue
        for (site, role), tensor in tensors.items():
            found, steps = now[site, role], layouts[name][site, role]
            if found.dtype != tensor.dtype or not found.equal(tensor):
                yield identical(f"{site}:{role} of the adapter", found, tensor)
            elif layout(found) != steps:
                yield broken(
                    f"{site}:{role} of the adapter",
                    "strides",
                    f"{role} of '{name}' has strides {layout(found)}, had {steps}",
                )
            elif trains is not None and found.requires_grad is not ((site, role) in trains[name]):
                state = "trained now" if found.requires_grad else "trained no more"
                yield broken(f"{site}:{role} of the adapter", "requires_grad", f"{role} of '{name}' is {state}")
