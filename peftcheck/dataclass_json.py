"""Turn frozen dataclasses into JSON values and back, strictly: no field is guessed, dropped or converted.

Non-finite numbers are the strings "inf", "-inf" and "nan". A field may be left out only where its dataclass
has a default for it; a field that the dataclass does not have is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable
from typing import Any

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_WORDS = {str: "text", int: "a whole number", bool: "a truth value"}


class Mismatch(ValueError):
    """Say where a value does not have the shape that its dataclass asks for."""


def encode(value: Any) -> Any:
    """Return dataclasses, mappings, sequences and scalars as JSON values; raise TypeError for the rest."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"a record holds text, numbers, truth values and null, not {type(value).__name__}")


def parse(text: str) -> Any:
    """Parse JSON; raise ValueError for what is not, the NaN and Infinity of Python's dialect included."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def decode(cls: Any, value: Any, where: str) -> Any:
    """Return the dataclass `cls` made from a JSON value; `where` names it in the message of a Mismatch."""
    return _decoder(cls)(value, where)


def _refuse(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is no JSON number")


@functools.cache
def _decoder(hint: Any) -> Callable[[Any, str], Any]:
    """Return the function (value, where) -> object for one annotation."""
    if dataclasses.is_dataclass(hint):
        return _object(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = _decoder(next(argument for argument in arguments if argument is not type(None)))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is tuple:
        return _sequence(_decoder(arguments[0]))
    if origin is dict:
        return _mapping(_decoder(arguments[1]))
    if hint is Any:
        return lambda value, where: value
    return _number if hint is float else _scalar(hint)


def _object(cls: type) -> Callable[[Any, str], Any]:
    hints = typing.get_type_hints(cls)
    decoders = {field.name: _decoder(hints[field.name]) for field in dataclasses.fields(cls)}
    required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise Mismatch(f"{where} is not an object")
        if missing := required - value.keys():
            raise Mismatch(f"{where} lacks the field {min(missing)!r}")
        if unknown := value.keys() - decoders.keys():
            raise Mismatch(f"{where} has the unknown field {min(unknown)!r:.80}")
        return cls(**{name: decoders[name](item, f"{where}.{name}") for name, item in value.items()})

    return read


def _sequence(item: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple]:
    def read(value: Any, where: str) -> tuple:
        if not isinstance(value, list):
            raise Mismatch(f"{where} is not a list")
        return tuple(item(entry, f"{where}[{index}]") for index, entry in enumerate(value))

    return read


def _mapping(item: Callable[[Any, str], Any]) -> Callable[[Any, str], dict]:
    def read(value: Any, where: str) -> dict:
        if not isinstance(value, dict):
            raise Mismatch(f"{where} is not an object")
        return {key: item(entry, f"{where}.{key}") for key, entry in value.items()}

    return read


def _scalar(cls: type) -> Callable[[Any, str], Any]:
    def read(value: Any, where: str) -> Any:
        # A truth value is an int to Python, but not to JSON.
        if not isinstance(value, cls) or (cls is int and isinstance(value, bool)):
            raise Mismatch(f"{where} is not {_WORDS[cls]}")
        return value

    return read


def _number(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Mismatch(f"{where} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise Mismatch(f"{where} is too large a number") from None
