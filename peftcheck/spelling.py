"""How a library's operations are spelled in source text: what a standalone script is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from peftcheck.case import Case
from peftcheck.implementation import Attached


@dataclass(frozen=True)
class Spelling:
    """Source text for a case, in a script where `model` holds the case's layers under their names.

    `imports`: lines; `attach`: lines after which the adapters are attached, and `model` is what the user then
    holds; `definitions`: functions that the expressions below may call, by name, each before those that it calls.
    Expressions: `layer(name)` is the module that stands at a layer's place, `base(name, tensor)` a base tensor in
    force, `delta(name, adapter)` what the library reports, `merged(name)` the adapters marked as merged,
    `disabled` a context manager, `unload` and `export(adapters, safe)` the exported model. Statements:
    `merge(adapters, safe)`, `unmerge`; where the library has them, `save(folder, adapters)`, `delete(adapter)`,
    `load(folder, adapter)`, `activate(adapters)`, `rescale(adapter, factor)`, `add(adapter)` of one of the case's;
    `combine(adapters, weights, kind, into, options)` too. Expressions, where it combines: `gain(name, adapter)` is the
    factor of an adapter's product on a layer and `rank(name, adapter)` the rank that its configuration declares (of
    `adapter` in source text), `holds(adapter)` whether there is an adapter of that name;
    `mixed(inputs, rows)` is an expression for the outputs of a batch with an adapter for each row.
    `merge` and `export` of no adapters are of those that are active.
    `root(attached)` is the module that `model` stands for then.
    """

    imports: tuple[str, ...]
    attach: tuple[str, ...]
    definitions: dict[str, tuple[str, ...]]
    layer: Callable[[str], str]
    base: Callable[[str, str], str]
    delta: Callable[[str, str], str]
    merged: Callable[[str], str]
    disabled: str
    unload: str
    export: Callable[[Sequence[str] | None, bool], str]
    merge: Callable[[Sequence[str] | None, bool], str]
    unmerge: str
    root: Callable[[Attached], nn.Module]
    save: Callable[[str, Sequence[str]], str] | None = None
    delete: Callable[[str], str] | None = None
    load: Callable[[str, str], str] | None = None
    activate: Callable[[Sequence[str]], str] | None = None
    rescale: Callable[[str, float], str] | None = None
    add: Callable[[str], str] | None = None
    mixed: Callable[[str, str], str] | None = None
    combine: Callable[[Sequence[str], Sequence[float], str, str, Mapping[str, Any]], str] | None = None
    gain: Callable[[str, str], str] | None = None
    rank: Callable[[str, str], str] | None = None
    holds: Callable[[str], str] | None = None


@runtime_checkable
class Speller(Protocol):
    """What an implementation may offer besides the port: the spelling of its operations."""

    def spelling(self, case: Case) -> Spelling:
        """Return how the library's operations are spelled for the case's adapters."""


def text(value: str) -> str:
    """Return a string literal in double quotes."""
    return json.dumps(value, ensure_ascii=False)
