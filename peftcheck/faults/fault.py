"""What a fault is: a deliberate defect put between the harness and an implementation, at the port."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from peftcheck.case import Case
from peftcheck.implementation import Attached, Implementation, Reloads, Variant

REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
)  # what libraries raise to refuse; NotImplementedError is of the last
Operation = Callable[..., Any]
Attach = Callable[[Implementation, nn.Module, Case], Attached]


def _any_case(case: Case) -> bool:
    return True


class Port:
    """An `Attached` some of whose operations are replaced; all others go through to `inner`.

    A replacement is called with the port first. `notes` is its memory: plain data and tensors, so that a memento
    of the port puts it back.
    """

    def __init__(self, inner: Attached, case: Case, operations: Mapping[str, Operation]) -> None:
        self.inner = inner
        self.case = case
        self.operations = dict(operations)
        self.notes: dict[Any, Any] = {}

    def roots(self) -> Sequence[object]:
        """Return the roots of the implementation, and the port's own memory."""
        return (*self.inner.roots(), self.notes)

    def __getattr__(self, name: str) -> Any:
        operations = self.__dict__.get("operations", {})
        if name in operations:
            return partial(operations[name], self)
        if "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)


def replacing(start: Operation | None = None, **operations: Operation) -> Attach:
    """Return an attach that replaces operations of the port; `start(port)` runs once at the end of attaching."""

    def attach(implementation: Implementation, model: nn.Module, case: Case) -> Attached:
        port = Port(implementation.attach(model, case), case, operations)
        if start is not None:
            start(port)
        return port

    return attach


@dataclass(frozen=True)
class Fault:
    """A deliberate defect.

    `models` names the real defect that it is modelled on, or 'statement deletion' and the like for a standard
    mutation operator. `laws` are those that must catch it. `attach(implementation, model, case)` attaches with
    the defect in place. Where it means anything: `variants` and `layers` (empty: all that there are), `suits(case)`
    and `exact` (None: in both regimes). `crashes`: the defect itself is a crash, so that an error is its catch.
    """

    name: str
    description: str
    models: str
    laws: tuple[str, ...]
    attach: Attach
    variants: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()  # kinds of combination, for faults of combining
    suits: Callable[[Case], bool] = _any_case
    exact: bool | None = None
    quantizers: tuple[str, ...] = ()  # where it spoils merges into codes: on linear layers quantized so
    unsupported: bool = False  # attaches to layers (merges into codes) that the variant does not accept
    crashes: bool = False


@dataclass(frozen=True)
class Reloading:
    """An implementation whose `attach` loads from checkpoints: so a fault spoils a reloaded model like any other."""

    inner: Reloads
    folders: Mapping[str, Path]

    def attach(self, model: nn.Module, case: Case) -> Attached:
        return self.inner.reload(model, case, self.folders)


@dataclass(frozen=True)
class Faulty:
    """An implementation with a fault in it. The fault's own source counts as the library's: its errors are its own."""

    inner: Implementation
    fault: Fault
    ledger: Path | None = None
    name: str = field(init=False)
    version: str = field(init=False)
    folders: tuple[Path, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.inner.name)
        object.__setattr__(self, "version", self.inner.version)
        object.__setattr__(self, "folders", (*self.inner.folders, Path(__file__).parent))

    def variants(self) -> Mapping[str, Variant]:
        return MappingProxyType(dict(self.inner.variants()))

    def attach(self, model: nn.Module, case: Case) -> Attached:
        return self.fault.attach(self.inner, model, case)

    def reload(self, model: nn.Module, case: Case, folders: Mapping[str, Path]) -> Attached:
        return self.fault.attach(Reloading(self.inner, folders), model, case)
