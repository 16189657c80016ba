"""Record an object graph with its tensors and put it back bit for bit, so that many laws share an attach."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import logging
import operator
import pathlib
import re
import sys
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
import torch
from torch.nn.parameter import UninitializedTensorMixin


class Unrestorable(Exception):
    """Say that the graph holds an object that the memento cannot see into, with its type and its path."""


_Path = tuple[Any, ...]  # (text,) at a root, else (parent path, format of one step, what the step names)

# Instances of exactly these types never change, and refer to nothing that does.
_LEAVES = frozenset({
    type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented), re.Pattern,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo, torch.iinfo,
    types.CodeType, types.GenericAlias, types.UnionType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType, datetime.date, datetime.datetime, datetime.timedelta, datetime.timezone,
    decimal.Decimal, fractions.Fraction,
})  # fmt: skip
# So do the instances of their subclasses; types, modules and loggers change, but belong to the process.
_LEAF_BASES = (
    type, types.ModuleType, enum.Enum, pathlib.PurePath, numpy.generic, numpy.dtype, logging.Logger,
)  # fmt: skip

_TENSOR_DATA = torch._C.TensorBase.data  # the descriptor itself, in case a subclass shadows `.data`
_POINTER = object.__basicsize__ // 2  # bytes; the header of an object is a count and a type


class Memento:
    """Record everything reachable from `roots`, and restore it in place.

    Recorded are, once for each object: its class and `__dict__` (identity and order of the values), the
    contents of containers, the attributes, defaults and closure cells of functions, and of tensors the bytes
    of each storage, the alias (storage, offset, size, stride, dtype), `requires_grad`, `grad` and hooks.
    References are followed through attributes, containers, bound methods, partials, closures and weakrefs.

    Out of scope, hence not restored: what belongs to the process and not to the graph (class attributes,
    module globals, functions found under their qualified name, loggers, random state, autograd mode), version
    counters of tensors, and the iteration order of a set whose members changed.

    The memento keeps all recorded objects alive. Memory: one copy of every storage.

    Raises:
        Unrestorable: state lies where the memento cannot see it, such as `__slots__`, deques, generators,
            locks, tensors with an autograd graph, wrapper tensor subclasses, parametrized modules.
    """

    def __init__(self, roots: Sequence[object]) -> None:
        self._seen: dict[int, object] = {}  # by id; holding the object keeps the id from being used again
        self._pending: list[tuple[object, _Path]] = []
        self._objects: list[tuple[object, type, dict]] = []
        self._dicts: list[tuple[dict, dict]] = []
        self._ordered: list[tuple[OrderedDict, tuple]] = []
        self._factories: list[tuple[defaultdict, object]] = []
        self._lists: list[tuple[list, list]] = []
        self._sets: list[tuple[set, tuple]] = []
        self._empty: list[Any] = []  # plain containers with nothing in them: most are for hooks
        self._functions: list[tuple[types.FunctionType, tuple | None, dict | None]] = []
        self._cells: list[tuple[types.CellType, tuple]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, bool]] = []
        self._gradients: list[tuple[torch.Tensor, torch.Tensor | None, dict | None, dict | None]] = []
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._bytes_now: list[torch.Tensor] = []
        self._bytes_then: list[torch.Tensor] = []
        kinds: dict[type, tuple[_Recorder | None, bool]] = {}
        self._pending.extend((root, (f"roots[{index}]",)) for index, root in enumerate(roots))
        with torch._C.DisableTorchFunctionSubclass():
            while self._pending:
                value, path = self._pending.pop()
                cls = type(value)
                if cls in _LEAVES or id(value) in self._seen:
                    continue
                self._seen[id(value)] = value
                kind = kinds.get(cls)
                if kind is None:
                    kind = kinds[cls] = _kind(cls, path)
                record, has_attributes = kind
                if record is not None:
                    record(self, value, path)
                if has_attributes:
                    self._record_attributes(value, cls, path)

    def restore(self) -> None:
        """Put every recorded object back, in place; callable any number of times.

        Raises:
            Unrestorable: a tensor cannot be put back, such as a view that has since joined an autograd graph.
                The roots are then restored in part only, and must be built anew.
        """
        with torch._C.DisableTorchFunctionSubclass():
            try:
                self._restore_tensors()
            except RuntimeError as error:
                raise Unrestorable(f"a recorded tensor cannot be put back: {error}") from error
        for value, cls, attributes in self._objects:
            if type(value) is not cls:
                object.__setattr__(value, "__class__", cls)
            if object.__getattribute__(value, "__dict__") is not attributes:
                object.__setattr__(value, "__dict__", attributes)
        for container in self._empty:
            if container:
                container.clear()
        for mapping, items in self._dicts:
            dict.clear(mapping)
            dict.update(mapping, items)
        for mapping, items in self._ordered:
            OrderedDict.clear(mapping)
            for key, value in items:
                OrderedDict.__setitem__(mapping, key, value)
        for mapping, factory in self._factories:
            mapping.default_factory = factory
        for values, members in self._lists:
            list.__setitem__(values, slice(None), members)
        for values, members in self._sets:
            # An untouched set is left alone: filling it again could change the order in which it iterates.
            now = tuple(set.__iter__(values))
            if len(now) != len(members) or not all(map(operator.is_, now, members)):
                set.clear(values)
                set.update(values, members)
        for function, defaults, keyword_defaults in self._functions:
            function.__defaults__ = defaults
            function.__kwdefaults__ = keyword_defaults
        for cell, content in self._cells:
            if content:
                cell.cell_contents = content[0]
            else:
                del cell.cell_contents

    def _restore_tensors(self) -> None:
        for storage, size in self._storages.values():
            if storage.nbytes() != size:
                storage.resize_(size)
        if self._bytes_now:
            # Comparing first would cost as much as copying. Byte views have version counters of their own.
            torch._foreach_copy_(self._bytes_now, self._bytes_then)
        for tensor, alias, requires_grad in self._tensors:
            if tensor.grad_fn is not None:
                tensor.detach_()
            _TENSOR_DATA.__set__(tensor, alias)
            if tensor.requires_grad is not requires_grad:
                tensor.requires_grad_(requires_grad)
        # A gradient must match its tensor when it is assigned, so every alias is back before.
        for tensor, grad, hooks, grad_hooks in self._gradients:
            if tensor.grad is not grad:
                tensor.grad = grad
            if tensor._backward_hooks is not hooks:
                tensor._backward_hooks = hooks
            if tensor._post_accumulate_grad_hooks is not grad_hooks:
                # Assigning None leaves torch calling what is in the old dictionary, so that is emptied too.
                if tensor._post_accumulate_grad_hooks is not None:
                    tensor._post_accumulate_grad_hooks.clear()
                tensor._post_accumulate_grad_hooks = grad_hooks

    def _follow(self, values: Iterable[tuple[object, object]], path: _Path, form: str) -> None:
        found = ((value, (path, form, step)) for step, value in values if type(value) not in _LEAVES)
        self._pending.extend(found)

    def _record_attributes(self, value: object, cls: type, path: _Path) -> None:
        attributes = object.__getattribute__(value, "__dict__")
        self._objects.append((value, cls, attributes))
        if id(attributes) not in self._seen:
            self._seen[id(attributes)] = attributes
            self._record_dict(attributes, path, ".{}")

    def _record_module(self, value: torch.nn.Module, path: _Path) -> None:
        # Registering a parametrization makes a class for this one module, and removing it edits that class.
        if "parametrizations" in object.__getattribute__(value, "__dict__").get("_modules", ()):
            raise _refusal(type(value), path, "a parametrized module keeps state in its class")

    def _record_dict(self, mapping: dict, path: _Path, form: str = "[{!r}]") -> None:
        if not mapping and type(mapping) is dict:
            self._empty.append(mapping)
            return
        items = dict.copy(mapping)
        self._dicts.append((mapping, items))
        self._follow(items.items(), path, form)
        self._follow(enumerate(items), path, ".keys()[{}]")

    def _record_ordered(self, mapping: OrderedDict, path: _Path) -> None:
        if not mapping and type(mapping) is OrderedDict:
            self._empty.append(mapping)
            return
        items = tuple(OrderedDict.items(mapping))
        self._ordered.append((mapping, items))
        self._follow(items, path, "[{!r}]")
        self._follow(enumerate(key for key, _ in items), path, ".keys()[{}]")

    def _record_defaultdict(self, mapping: defaultdict, path: _Path) -> None:
        self._factories.append((mapping, mapping.default_factory))
        self._record_dict(mapping, path)
        self._follow([("default_factory", mapping.default_factory)], path, ".{}")

    def _record_list(self, values: list, path: _Path) -> None:
        if not values and type(values) is list:
            self._empty.append(values)
            return
        members = list(list.__iter__(values))
        self._lists.append((values, members))
        self._follow(enumerate(members), path, "[{}]")

    def _record_set(self, values: set, path: _Path) -> None:
        if not values and type(values) is set:
            self._empty.append(values)
            return
        members = tuple(set.__iter__(values))
        self._sets.append((values, members))
        self._follow(enumerate(members), path, ".members[{}]")

    def _record_function(self, function: types.FunctionType, path: _Path) -> None:
        if _belongs_to_process(function):
            return
        self._functions.append((function, function.__defaults__, function.__kwdefaults__))
        names = ("__defaults__", "__kwdefaults__", "__closure__")
        self._follow(((name, getattr(function, name)) for name in names), path, ".{}")
        self._record_attributes(function, types.FunctionType, path)

    def _record_cell(self, cell: types.CellType, path: _Path) -> None:
        try:
            content = (cell.cell_contents,)
        except ValueError:  # the variable has no value yet
            content = ()
        self._cells.append((cell, content))
        self._follow((("cell_contents", value) for value in content), path, ".{}")

    def _record_tensor(self, tensor: torch.Tensor, path: _Path) -> None:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise _refusal(type(tensor), path, f"its layout is {tensor.layout}")
        if tensor.grad_fn is not None:
            raise _refusal(type(tensor), path, "it is part of an autograd graph, which cannot be recorded")
        alias = _TENSOR_DATA.__get__(tensor)
        storage = alias.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = (storage, storage.nbytes())
            if storage.nbytes() and storage.device.type != "meta":
                view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                self._bytes_now.append(view)
                self._bytes_then.append(view.clone())
        names = ("grad", "_backward_hooks", "_post_accumulate_grad_hooks")
        state = tuple(getattr(tensor, name) for name in names)
        self._tensors.append((tensor, alias, tensor.requires_grad))
        self._gradients.append((tensor, *state))
        self._follow(zip(names, state, strict=True), path, ".{}")


_Recorder = Callable[[Memento, Any, _Path], None]


def _members(native: type) -> _Recorder:
    """Follow the members of an immutable container, past any `__iter__` of a subclass."""
    return lambda memento, values, path: memento._follow(enumerate(native.__iter__(values)), path, "[{}]")


def _fields(*names: str) -> _Recorder:
    """Follow what an object refers to by `names` for as long as it lives."""
    return lambda memento, value, path: memento._follow(
        ((name, getattr(value, name, None)) for name in names), path, ".{}"
    )


def _referent(memento: Memento, value: weakref.ref, path: _Path) -> None:
    memento._follow((("referent", value()), ("__callback__", value.__callback__)), path, ".{}")


# What is neither one of these nor a class written in Python over one of them, without slots, is refused.
_NATIVE: dict[type, _Recorder | None] = {
    object: None, dict: Memento._record_dict, OrderedDict: Memento._record_ordered,
    defaultdict: Memento._record_defaultdict, list: Memento._record_list, set: Memento._record_set,
    tuple: _members(tuple), frozenset: _members(frozenset), int: None, float: None, complex: None, str: None,
    bytes: None, torch.Tensor: Memento._record_tensor, torch.nn.Module: Memento._record_module,
    types.FunctionType: Memento._record_function, types.CellType: Memento._record_cell,
    types.MethodType: _fields("__self__", "__func__"), types.BuiltinFunctionType: _fields("__self__"),
    types.MethodWrapperType: _fields("__self__"), functools.partial: _fields("func", "args", "keywords"),
    weakref.ref: _referent,
}  # fmt: skip


def _kind(cls: type, path: _Path) -> tuple[_Recorder | None, bool]:
    """Find how to record instances of `cls`, and whether they have a `__dict__` besides."""
    if cls in _LEAVES or issubclass(cls, _LEAF_BASES):
        return None, False
    native = next(base for base in cls.__mro__ if base in _NATIVE)
    if native is torch.Tensor:
        if cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise _refusal(cls, path, "a tensor subclass with __torch_dispatch__ keeps its values elsewhere")
        if issubclass(cls, UninitializedTensorMixin):
            raise _refusal(cls, path, "it has no storage yet")
    hidden = _hidden_bytes(cls, native)
    if hidden:
        if _is_frozen(cls) and native is object and hidden == _POINTER * len(cls.__dataclass_fields__):
            return _fields(*cls.__dataclass_fields__), cls.__dictoffset__ != 0
        raise _refusal(cls, path, "it has __slots__, or state in C, that only a new object brings back")
    # A function that belongs to the process is left alone, attributes and all: its recorder decides.
    return _NATIVE[native], cls.__dictoffset__ != 0 and native is not types.FunctionType


def _hidden_bytes(cls: type, native: type) -> int:
    """Count the bytes of an instance that neither `native`, a `__dict__` nor weak references account for."""
    size = cls.__basicsize__ - native.__basicsize__
    # A negative offset is a dictionary kept before the object, except where the object varies in size.
    if not native.__dictoffset__ and (cls.__dictoffset__ > 0 or (cls.__dictoffset__ and cls.__itemsize__)):
        size -= _POINTER
    if not native.__weakrefoffset__ and cls.__weakrefoffset__ > 0:
        size -= _POINTER
    return size


def _is_frozen(cls: type) -> bool:
    parameters = getattr(cls, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def _belongs_to_process(function: types.FunctionType) -> bool:
    """Tell whether `function` is what its module holds under its qualified name."""
    found: object = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _refusal(cls: type, path: _Path, why: str) -> Unrestorable:
    steps = []
    while len(path) > 1:
        path, form, step = path
        # Only names and numbers: the text of any other key is the library's business, and may be long.
        plain = isinstance(step, (str, int))
        steps.append(form.format(step) if plain else f"[<{type(step).__name__}>]")
    where = path[0] + "".join(reversed(steps))
    return Unrestorable(f"cannot see into {cls.__module__}.{cls.__qualname__} at {where}: {why}")
