"""Which cases an entry of the ledger speaks of: conditions on the fields of a case."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from peftcheck.case import AdapterSpec, Case, LayerSpec, Poison, Sweep

_SWEEP = ("variant", "layer", "dtype", "quantizer")
_CASE = ("adapter_dtype", "profile", "batch", "safe", "joint", "cycles", "train", "adapters")
_LAYER = tuple(f.name for f in fields(LayerSpec))
_ADAPTER = tuple(f.name for f in fields(AdapterSpec) if f.name not in ("targets", "options"))
_POISON = tuple(f.name for f in fields(Poison))
_TABLES = ("options", "poison", "extra")
FIELDS = tuple(dict.fromkeys((*_SWEEP, *_CASE, *_LAYER, *_ADAPTER, *_TABLES)))

_COMPARISON = re.compile(r"(<=|>=|!=|<|>)\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


class UnknownField(ValueError):
    """Say which condition names no field of a case, or asks for what no field can be."""


@dataclass(frozen=True)
class Where:
    """Conditions that must all hold; the empty one covers every case.

    Each is a field (dotted within a table: `options.use_dora`, `poison.value`) and its alternatives. A string is
    a glob ('!' before it: anything else), against a number a comparison ('>1'), against no value 'none'. Against
    a field of several numbers an alternative asks for one of them, a tuple for all. Conditions on a layer and on
    an adapter speak of one adapter and one layer that it targets; `adapters` is how many there are.
    """

    conditions: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def alternatives(self, field: str) -> tuple[Any, ...]:
        """Return what is asked of a field: nothing where it may be anything."""
        return dict(self.conditions).get(field, ())

    def reaches(self, sweep: Sweep) -> bool:
        """Return whether some case of the sweep may be covered, by the sweep's own fields."""
        return all(_any(getattr(sweep, field), wanted) for field, wanted in self.conditions if field in _SWEEP)

    def covers(self, case: Case) -> bool:
        """Return whether the case is one that the entry speaks of.

        A kind of layer is also found within a whole model, on the layers that are adapted there.
        """
        inside = case.whole and not _any(case.sweep.layer, self.alternatives("layer") or ("*",))
        if not Where(tuple(c for c in self.conditions if c[0] != "layer" or not inside)).reaches(case.sweep):
            return False
        local = [
            (field, wanted) for field, wanted in self.conditions if field not in _SWEEP or (inside and field == "layer")
        ]
        whole = [(field, wanted) for field, wanted in local if _root(field) in (*_CASE, "poison", "extra")]
        if not all(_any(_of_case(case, field), wanted) for field, wanted in whole):
            return False
        rest = [condition for condition in local if condition not in whole]
        sites = [(adapter, case.layers[target]) for adapter in case.adapters for target in adapter.targets]
        return not rest or any(all(_site_has(*site, *condition) for condition in rest) for site in sites)


def parse(table: Mapping[str, Any]) -> Where:
    """Return the conditions of a TOML table; raises UnknownField, naming the field."""
    conditions = []
    for field, wanted in table.items():
        if field not in FIELDS:
            raise UnknownField(f"no case has a field '{field}': choose from {', '.join(FIELDS)}")
        if field not in _TABLES:
            conditions.append((field, _alternatives(field, wanted)))
            continue
        if not isinstance(wanted, Mapping):
            raise UnknownField(f"'{field}' must be a table, such as {field} = {{ name = value }}")
        for key, inner in wanted.items():
            if field == "poison" and key not in _POISON:
                raise UnknownField(f"no poison has a field '{key}': choose from {', '.join(_POISON)}")
            conditions.append((f"{field}.{key}", _alternatives(f"{field}.{key}", inner)))
    return Where(tuple(conditions))


def _alternatives(field: str, wanted: Any) -> tuple[Any, ...]:
    items = wanted if isinstance(wanted, list) else [wanted]
    if not items:
        raise UnknownField(f"'{field}' names no alternative: it would match nothing")
    found = tuple(tuple(item) if isinstance(item, list) else item for item in items)
    for item in found:
        if not all(isinstance(part, str | int | float) for part in (item if isinstance(item, tuple) else (item,))):
            raise UnknownField(f"'{field}' must be text, a number, a truth value or a list of them")
    return found


def _root(field: str) -> str:
    return field.partition(".")[0]


def _of_case(case: Case, field: str) -> Any:
    table, _, key = field.partition(".")
    if table == "poison":
        return getattr(case.poison, key)
    if field == "adapters":
        return len(case.adapters)
    return case.setting(key) if table == "extra" else getattr(case, field)


def _of_site(field: str, adapter: AdapterSpec, layer: LayerSpec) -> Iterable[Any]:
    if field == "layer":
        yield layer.kind
    if _root(field) == "options":
        yield adapter.option(field.partition(".")[2])
    if field in _LAYER:
        yield getattr(layer, field)
    if field in _ADAPTER:
        yield getattr(adapter, field)


def _site_has(adapter: AdapterSpec, layer: LayerSpec, field: str, wanted: tuple[Any, ...]) -> bool:
    return any(_any(value, wanted) for value in _of_site(field, adapter, layer))


def _any(value: Any, wanted: Iterable[Any]) -> bool:
    return any(matches(value, one) for one in wanted)


def matches(value: Any, wanted: Any) -> bool:
    """Return whether a field's value is what one alternative asks for."""
    if isinstance(wanted, tuple):
        return isinstance(value, tuple) and value == wanted
    if isinstance(value, tuple):
        return any(matches(part, wanted) for part in value)
    if value is None or isinstance(value, str):
        return isinstance(wanted, str) and _glob("none" if value is None else value, wanted)
    if isinstance(wanted, str):
        return not isinstance(value, bool) and isinstance(value, int | float) and _compares(value, wanted)
    if isinstance(wanted, bool) or isinstance(value, bool):
        return value is wanted
    return value == wanted


def _glob(text: str, pattern: str) -> bool:
    return not fnmatchcase(text, pattern[1:]) if pattern.startswith("!") else fnmatchcase(text, pattern)


def _compares(value: float, wanted: str) -> bool:
    found = _COMPARISON.fullmatch(wanted.strip())
    return found is not None and _OPERATORS[found[1]](value, float(found[2]))
