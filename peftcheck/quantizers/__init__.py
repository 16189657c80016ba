"""Quantizers under adapters: how a layer is quantized, read back, and what error its grid makes unavoidable.

One module per library, imported only when one of its quantizers is asked for; what is declared here needs none.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftcheck.case import Case, LayerSpec
from peftcheck.errors import UsageError
from peftcheck.rounding import Bounded, Precision


class Quantizer(Protocol):
    """One grid of one library. `settings` are the case's choices: block size and the like.

    `weight` arguments are dense (out, in); a layer is the module that holds the quantized weight.
    """

    def quantize(self, model: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        """Replace the linear layer `name` of a built model by the same one quantized, from the values it has."""

    def dress(self, model: nn.Module) -> None:
        """Set on the model what transformers sets when it loads one quantized: what libraries dispatch on."""

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return everything the layer stores: 'weight' the codes, 'weight.scale' and the like, 'bias'."""

    def values(self, layer: nn.Module) -> Tensor:
        """Return the dense weight through the library's own dequantization; changes nothing."""

    def decoded(self, layer: nn.Module) -> Bounded:
        """Return the dense weight from codes, scales and the grid's definition, without the library.

        Its bound is what the library's own dequantization may round on the way to the same numbers.
        """

    def proved(self, layer: nn.Module, adapter_dtype: torch.dtype) -> Tensor:
        """Return for each element whether requantizing its block is proved to change nothing (bool, as the weight).

        `adapter_dtype`: the dtype through which a library may pass the dequantized values.
        """

    def facts(self, layer: nn.Module) -> dict[str, Any]:
        """Return what a merge has to keep: kind, block size, dtype, flags."""

    def budget(self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision) -> Tensor:
        """Bound abs(DQ(Q(T)) - T) for every T within `error` of `value`, stored as `store`; see `budgets.quantized`."""


@dataclass(frozen=True)
class Declared:
    """A quantizer by name, known without its library.

    `package` is what has to import, `extra` what to install. `options` are the settings that cases draw, `widths` and
    `heights` the layer sizes (in, out). `dtypes`: of the base. `largest`: magnitudes beyond it are not finite to the
    quantizer. `any_shape`: the
    library takes layers of any shape, and computes their forward on every CPU.
    """

    name: str
    module: str
    package: str
    extra: str
    bits: float
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    widths: tuple[int, ...] = (64, 128, 192)
    heights: tuple[int, ...] = (32, 64)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    largest: float = float("inf")
    any_shape: bool = True


_FOUR = {"blocksize": (64, 64, 128, 256, 512)}


def _bitsandbytes(kind: str, bits: float, **rest: Any) -> Declared:
    return Declared(f"bitsandbytes.{kind}", "bitsandbytes", "bitsandbytes", "bitsandbytes", bits, **rest)


def _four(kind: str) -> Declared:
    sizes = {"widths": (40, 64, 128, 256, 512), "heights": (6, 32, 64)}
    return _bitsandbytes(kind, 4, options=_FOUR, any_shape=False, **sizes)


def _hqq(bits: int) -> Declared:
    return Declared(f"hqq.{bits}", "hqq", "hqq", "hqq", bits, options={"group": (32, 64)})


def _quanto(kind: str, bits: int) -> Declared:
    return Declared(f"quanto.{kind}", "quanto", "optimum.quanto", "quanto", bits, dtypes=("float32",))


DECLARED: dict[str, Declared] = {
    one.name: one
    for one in (
        _bitsandbytes("int8", 8, widths=(5, 64, 128, 96), heights=(3, 32, 64), largest=65504.0),
        _four("nf4"),
        _four("nf4.double"),
        _four("fp4"),
        _four("fp4.double"),
        Declared("torchao.int8", "torchao", "torchao", "torchao", 8, widths=(24, 64, 128), heights=(5, 32, 64)),
        _hqq(8),
        _hqq(4),
        _hqq(2),
        _quanto("qint8", 8),
        _quanto("qint4", 4),
    )
}


def available(name: str) -> bool:
    """Return whether the library of a quantizer is installed."""
    parent = DECLARED[name].package.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(DECLARED[name].package) is not None


def load(name: str) -> Quantizer:
    """Return a quantizer by name; raises UsageError for an unknown name or where its library is not installed."""
    if name not in DECLARED:
        raise UsageError(f"unknown quantizer '{name}': choose from {', '.join(DECLARED)}")
    if not available(name):
        one = DECLARED[name]
        raise UsageError(f"quantizer '{name}' needs the package '{one.package}': pip install 'peftcheck[{one.extra}]'")
    module = importlib.import_module(f"peftcheck.quantizers.{DECLARED[name].module}")
    return module.QUANTIZERS[name]


def forwards(name: str, spec: LayerSpec, settings: Mapping[str, Any]) -> bool:
    """Return whether a layer of this shape can run a forward on every CPU.

    bitsandbytes repacks 4-bit weights for AVX512 there, and that wants rows in 32s and columns in whole blocks.
    """
    if DECLARED[name].any_shape:
        return True
    return spec.n_out % 32 == 0 and spec.n_in % int(settings["blocksize"]) == 0


def fits(name: str, spec: LayerSpec, settings: Mapping[str, Any]) -> bool:
    """Return whether the quantizer takes a layer of this shape: an even number of columns, whole groups."""
    if "group" in settings:
        return spec.n_in % int(settings["group"]) == 0
    return DECLARED[name].any_shape or spec.n_in % 2 == 0


def apply(model: nn.Module, case: Case) -> None:
    """Quantize every layer of a built model in place, and dress the model as transformers would."""
    quantizer, settings = load(case.sweep.quantizer), settings_of(case)
    for spec in case.layers:
        quantizer.quantize(model, spec.name, settings)
    quantizer.dress(model)


def settings_of(case: Case) -> dict[str, Any]:
    """Return the settings of the case's quantizer."""
    return {key: case.setting(key) for key in DECLARED[case.sweep.quantizer].options}
