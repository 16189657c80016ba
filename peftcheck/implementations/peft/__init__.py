"""Hugging Face PEFT behind the port."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from pathlib import Path
from types import MappingProxyType

import peft
from peft import PeftModel
from torch import nn

from peftcheck import models, quantizers
from peftcheck.case import AdapterSpec, Case
from peftcheck.errors import UsageError
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.attached import PeftAttached
from peftcheck.implementations.peft.methods import METHODS
from peftcheck.implementations.peft.quantization import with_quantizers
from peftcheck.implementations.peft.script import spelling
from peftcheck.implementations.peft.whole_models import as_users_write, with_models
from peftcheck.spelling import Spelling

_CASTS_ON_REQUEST = "autocast_adapter_dtype" in signature(PeftModel.add_adapter).parameters  # since 0.19


@cache
def _variants() -> Mapping[str, Variant]:
    return MappingProxyType({name: with_models(with_quantizers(method.variant)) for name, method in METHODS.items()})


def _names(model: nn.Module, case: Case) -> Sequence[str]:
    """Return the names of what holds tensors or is adapted: of a whole model, parts that hold none of their own too."""
    own = [spec.name for spec in case.layers]
    return tuple(dict.fromkeys((*models.holders(model), *own))) if case.whole else own


class Peft:
    """The installed PEFT."""

    name = "peft"
    version = peft.__version__
    folders = (Path(peft.__file__).parent,)
    ledger = Path(__file__).parent / "ledger"

    def variants(self) -> Mapping[str, Variant]:
        return _variants()

    def attach(self, model: nn.Module, case: Case) -> PeftAttached:
        try:
            method = METHODS[case.sweep.variant]
        except KeyError:
            raise UsageError(f"peft has no variant '{case.sweep.variant}': see peftcheck list variants") from None
        names = _names(model, case)

        def config(adapter: AdapterSpec):
            made = method.config(adapter, [case.layers[target].name for target in adapter.targets])
            return as_users_write(made, case, adapter)

        first, *others = case.adapters
        autocast = case.adapter_dtype != case.sweep.dtype
        quantizer = quantizers.load(case.sweep.quantizer) if case.sweep.quantizer else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = config(first)
            method.before(model, given, first.name, case)
            wrapped = method.attach(model, given, first, autocast, method.mixed)
            method.after(wrapped, given, first.name, case)
            method.tells(wrapped, given, first.name, case)

            def add(model: PeftModel, adapter: AdapterSpec) -> None:
                given = config(adapter)
                method.before(model.base_model.model, given, adapter.name, case)
                cast = {"autocast_adapter_dtype": autocast} if _CASTS_ON_REQUEST else {}
                model.add_adapter(adapter.name, given, **cast)
                method.after(model, given, adapter.name, case)
                method.tells(model, given, adapter.name, case)

            attached = method.port(
                wrapped, names, method.roles, add, autocast, quantizer, method.run, case.whole, method.own
            )
            for adapter in others:
                attached.add(adapter)
            if others:
                attached.activate([adapter.name for adapter in case.adapters])
        wrapped.train(case.train)
        return attached

    def reload(self, model: nn.Module, case: Case, folders: Mapping[str, Path]) -> PeftAttached:
        """Attach saved adapters to a pristine model: `PeftModel.from_pretrained`, then `load_adapter`.

        What the user must do to a model before attaching (find its activations, say), is done before loading too.
        """
        method = METHODS[case.sweep.variant]
        names = _names(model, case)
        adapters = {adapter.name: adapter for adapter in case.adapters}

        def config(name: str):
            own = adapters[name]
            return as_users_write(method.config(own, [case.layers[target].name for target in own.targets]), case, own)

        def add(model: PeftModel, adapter: AdapterSpec) -> None:
            model.add_adapter(adapter.name, config(adapter.name), autocast_adapter_dtype=autocast)

        first, *others = folders
        autocast = case.adapter_dtype != case.sweep.dtype
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method.before(model, config(first), first, case)
            wrapped = PeftModel.from_pretrained(
                model, str(folders[first]), adapter_name=first, autocast_adapter_dtype=autocast
            )
            attached = method.port(
                wrapped, names, method.roles, add, autocast, None, method.run, case.whole, method.own
            )
            for name in others:
                method.before(wrapped.base_model.model, config(name), name, case)
                attached.load(folders[name], name)
            if others:
                attached.activate(tuple(folders))
            method.tells(wrapped, wrapped.peft_config[first], first, case)
        wrapped.train(case.train)
        return attached

    def spelling(self, case: Case) -> Spelling:
        """Return how PEFT's operations are spelled in a standalone script."""
        return spelling(case, METHODS[case.sweep.variant])
