"""The shape of a model without its numbers: what an export must give back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from peftcheck.measurement import NOTHING, Measurement, broken

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Architecture:
    """Per module its type, instance attributes, hooks and mode; per tensor its shape, dtype and strides."""

    modules: dict[str, tuple[str, frozenset[str], int, bool]]
    tensors: dict[str, tuple]
    shared: frozenset[frozenset[str]]


def layout(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that mean something: those of dimensions longer than one."""
    return tuple(step for step, extent in zip(tensor.stride(), tensor.shape, strict=True) if extent > 1)


def architecture(model: nn.Module) -> Architecture:
    """Return the architecture of a model."""
    modules = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = sum(len(getattr(module, hook, ())) for hook in _HOOKS)
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        modules[name] = (kind, frozenset(module.__dict__), hooks, module.training)
    tensors, owners = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors[name] = (tuple(tensor.shape), tensor.dtype, layout(tensor), str(tensor.device))
        owners.setdefault(tensor.data_ptr(), set()).add(name)
    shared = frozenset(frozenset(names) for names in owners.values() if len(names) > 1)
    return Architecture(modules, tensors, shared)


def difference(found: Architecture, expected: Architecture) -> Measurement:
    """Return the first difference between two architectures, or nothing."""
    for name in sorted(found.modules.keys() | expected.modules.keys()):
        if name not in found.modules:
            return broken(f"{name}:module", "module lost", f"module '{name}' is gone")
        if name not in expected.modules:
            return broken(f"{name}:module", "module added", f"module '{name}' was not there before")
        kind, attributes, hooks, training = found.modules[name]
        kind0, attributes0, hooks0, training0 = expected.modules[name]
        if kind != kind0:
            return broken(f"{name}:module", "module type", f"module '{name}' is a {kind}, was a {kind0}")
        if attributes != attributes0:
            changed = ", ".join(sorted(attributes ^ attributes0))
            return broken(f"{name}:module", "attributes", f"instance attributes of '{name}' differ: {changed}")
        if hooks != hooks0:
            return broken(f"{name}:module", "hooks", f"'{name}' has {hooks} hooks, had {hooks0}")
        if training != training0:
            return broken(f"{name}:module", "training flag", f"'{name}'.training is {training}, was {training0}")
    for name in sorted(found.tensors.keys() | expected.tensors.keys()):
        if found.tensors.get(name) != expected.tensors.get(name):
            return broken(
                f"{name}:module", "tensor", f"'{name}' is {found.tensors.get(name)}, was {expected.tensors.get(name)}"
            )
    if found.shared != expected.shared:
        return broken(":module", "tying", f"shared tensors are {_sets(found)}, were {_sets(expected)}")
    return NOTHING


def _sets(a: Architecture) -> list[list[str]]:
    return sorted(sorted(group) for group in a.shared)
