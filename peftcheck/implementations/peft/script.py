"""PEFT's operations as source text, for standalone scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any

import peft

from peftcheck.case import AdapterSpec, Case
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.whole_models import as_users_write
from peftcheck.spelling import Spelling, text

_DEFINITIONS = {
    "base": (
        "def base(name):  # the layer inside PEFT's wrapper",
        '    module = model.get_submodule("base_model.model." + name)',
        '    return getattr(module, "get_base_layer", lambda: module)()',
    ),
    "layer": (
        "def layer(name):",
        '    return model.get_submodule("base_model.model." + name)',
    ),
}


def spelling(case: Case, method: Method) -> Spelling:
    """Return how PEFT's operations are spelled for the adapters of a case."""
    configs = [_config(method, case, adapter) for adapter in case.adapters]
    half = case.sweep.dtype in ("bfloat16", "float16")  # elsewhere PEFT casts no adapter
    cast = ", autocast_adapter_dtype=False" if half and case.adapter_dtype == case.sweep.dtype else ""
    mixed = ", mixed=True" if method.mixed else ""
    by_name = {adapter.name: config for adapter, config in zip(case.adapters, configs, strict=True)}
    first, *others = zip(case.adapters, configs, strict=True)
    finished = {a.name: [method.finished(case, a)[1]] for a in case.adapters} if method.finished else {}
    attach = [f"model = get_peft_model(model, {source(first[1])}, {text(first[0].name)}{cast}{mixed})"]
    attach += finished.get(first[0].name, [])
    for adapter, config in others:
        attach += [f"model.add_adapter({text(adapter.name)}, {source(config)}{cast})", *finished.get(adapter.name, [])]
    if others:
        attach.append(f"model.base_model.set_adapter({_list([adapter.name for adapter in case.adapters])})")
    mode = "train" if case.train else "eval"
    attach = [*attach, f"model.{mode}()"] if len(attach) > 1 else [f"{attach[0]}.{mode}()"]
    imports = _imports(configs)
    if method.finished:
        imports = (f"{imports[0]}, {method.finished(case, first[0])[0]}", *imports[1:])
    if method.scripted:
        imports, lines = method.scripted(case, configs[0])
        attach = [*lines, f"model.{mode}()"]
    return Spelling(
        imports=imports,
        attach=tuple(attach),
        definitions={**_DEFINITIONS, **({"layer": _called(method, case)} if method.layer else {})},
        layer=lambda name: f"layer({text(name)})",
        base=lambda name, tensor: f"base({text(name)}).{tensor}",
        delta=lambda name, adapter: f"layer({text(name)}).get_delta_weight({text(adapter)})",
        merged=lambda name: f"layer({text(name)}).merged_adapters",
        disabled="model.disable_adapter()",
        unload="model.unload()",
        export=lambda own, safe: (
            f"model.merge_and_unload(safe_merge={safe}{'' if own is None else f', adapter_names={_list(own)}'})"
        ),
        merge=lambda own, safe: f"model.merge_adapter({'' if own is None else f'{_list(own)}, '}safe_merge={safe})",
        unmerge="model.unmerge_adapter()",
        root=lambda attached: attached.model,
        save=lambda folder, own: f"model.save_pretrained(str({folder}), selected_adapters={_list(own)})",
        delete=lambda own: f"model.delete_adapter({text(own)})",
        load=lambda folder, own: f"model.load_adapter(str({folder}), {text(own)}{cast})",
        mixed=lambda inputs, rows: f"model({inputs}, adapter_names={rows})",
        activate=lambda own: f"model.base_model.set_adapter({_list(own)})",
        rescale=lambda own, factor: (
            f'[m.set_scale({text(own)}, {factor}) for m in model.modules() if hasattr(m, "set_scale")]'
        ),
        add=lambda own: f"model.add_adapter({text(own)}, {source(by_name[own])}{cast})",
        combine=partial(_combined, isinstance(configs[0], peft.IA3Config)) if method.variant.combinations else None,
        gain=lambda name, adapter: f"model.get_submodule({text(f'base_model.model.{name}')}).scaling[{adapter}]",
        rank=lambda name, adapter: f"model.peft_config[{adapter}].r",
        holds=lambda own: f"{text(own)} in model.peft_config",
    )


def _combined(
    only: bool, own: Sequence[str], weights: Sequence[float], kind: str, into: str, options: Mapping[str, Any]
) -> str:
    """Return the call that combines; where there is one kind only it is not named."""
    given = options if only else {"combination_type": kind, **options}
    named = "".join(f", {name}={source(value)}" for name, value in given.items())
    return f"model.add_weighted_adapter({_list(own)}, {list(weights)}, {text(into)}{named})"


def _called(method: Method, case: Case) -> tuple[str, ...]:
    """Return the lines that define how a layer is called."""
    return method.layer(case) if callable(method.layer) else method.layer


def _config(method: Method, case: Case, adapter: AdapterSpec) -> Any:
    made = method.config(adapter, [case.layers[target].name for target in adapter.targets])
    return as_users_write(made, case, adapter)


def _list(items: Sequence[str]) -> str:
    return "[" + ", ".join(text(item) for item in items) + "]"


def _within(config: Any) -> list[Any]:
    """Return a configuration and those that its source names inside."""
    return [config, *(inner for value in _given(config).values() if _is_config(value) for inner in _within(value))]


def _is_config(value: Any) -> bool:
    own = type(value).__module__.partition(".")[0] == "peft"
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and own


def _imports(configs: list[Any]) -> tuple[str, ...]:
    """Return the import lines for the classes that configurations' sources name; PEFT exports not all of them itself."""
    inside = [config for one in configs for config in _within(one)]
    others = sorted(
        {f"from {type(c).__module__} import {type(c).__name__}" for c in inside if not hasattr(peft, type(c).__name__)}
    )
    names = dict.fromkeys(type(c).__name__ for c in inside if hasattr(peft, type(c).__name__))
    return (f"from peft import {', '.join((*names, 'get_peft_model'))}", *others)


def _default(field: dataclasses.Field) -> Any:
    """Return a field's default; PEFT's configurations do not all construct without arguments."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _given(config: Any) -> dict[str, Any]:
    """Return the arguments that make the configuration: neither defaults nor what it works out by itself."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    usual = {field.name: _default(field) for field in dataclasses.fields(config)}
    given = {name: value for name, value in values.items() if value != usual[name]}
    for name in tuple(given):
        fewer = {key: value for key, value in given.items() if key != name}
        if _makes(type(config), fewer, config):
            given = fewer
    return given


def _makes(kind: type, arguments: dict[str, Any], config: Any) -> bool:
    try:
        return kind(**arguments) == config
    except (TypeError, ValueError):
        return False  # the configuration insists on what was left out


def source(value: Any) -> str:
    """Return an expression for a configuration (only what differs from its defaults) or for one of its fields."""
    if _is_config(value):
        arguments = ", ".join(f"{name}={source(item)}" for name, item in _given(value).items())
        return f"{type(value).__name__}({arguments})"
    if isinstance(value, str) and not isinstance(value, Enum):
        return text(value)
    if isinstance(value, Enum):
        return source(value.value)
    if isinstance(value, set | frozenset):
        return "[" + ", ".join(source(item) for item in sorted(value)) + "]"
    if isinstance(value, list | tuple):
        inner = ", ".join(source(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{source(key)}: {source(item)}" for key, item in value.items()) + "}"
    return repr(value)
