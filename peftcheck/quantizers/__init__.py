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

    def dress(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
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

    def chosen(self, layer: nn.Module) -> Any:
        """Return what a search has chosen of the layer's grid, for `budget`; None where the values determine it."""

    def budget(
        self, value: Tensor, error: Tensor, settings: Mapping[str, Any], store: Precision, chosen: Any = None
    ) -> Tensor:
        """Bound abs(DQ(Q(T)) - T) for every T within `error` of `value`, stored as `store`; see `budgets.grids`.

        `chosen`: of the layer that was quantized, where its grid was searched for: the bound is one a posteriori.
        """


@dataclass(frozen=True)
class Declared:
    """A quantizer by name, known without its library.

    `package` is what has to import, `extra` what to install. `options` are the settings that cases draw, `rare` those
    that are drawn apart, `widths` and `heights` the layer sizes (in, out). `dtypes`: of the base. `largest`: magnitudes
    beyond it are not finite to the quantizer. `any_shape`: the library takes layers of any shape, and computes their
    forward on every CPU. `searched`: its grid is found by a search, and can be bounded only once it is known: one
    adapter a layer. `by_hand`: it needs other hardware or hours of calibration; layers of it are made by hand, to see
    that merging into them is refused, and with no `module` not even that.
    """

    name: str
    module: str
    package: str
    extra: str
    bits: float
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    rare: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    widths: tuple[int, ...] = (64, 128, 192)
    heights: tuple[int, ...] = (32, 64)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    largest: float = float("inf")
    any_shape: bool = True
    searched: bool = False
    by_hand: bool = False


_FOUR = {"blocksize": (64, 64, 128, 256, 512)}
_STORED = {"storage": ("uint8", "uint8", "uint8", "bfloat16")}  # of the codes: QLoRA under FSDP keeps them as bfloat16


def _bitsandbytes(kind: str, bits: float, **rest: Any) -> Declared:
    return Declared(f"bitsandbytes.{kind}", "bitsandbytes", "bitsandbytes", "bitsandbytes", bits, **rest)


def _four(kind: str) -> Declared:
    sizes = {"widths": (40, 64, 128, 256, 512), "heights": (6, 32, 64)}
    return _bitsandbytes(kind, 4, options=_FOUR, rare=_STORED, any_shape=False, **sizes)


_GROUPS = {"group": (32, 64)}


def _hqq(bits: int, optimised: bool = False) -> Declared:
    name = f"hqq.{bits}.optimised" if optimised else f"hqq.{bits}"
    return Declared(name, "hqq", "hqq", "hqq", bits, options=_GROUPS, searched=optimised)


def _torchao(kind: str, bits: int, **rest: Any) -> Declared:
    return Declared(f"torchao.{kind}", "torchao", "torchao", "torchao", bits, **rest)


def _quanto(kind: str, bits: int) -> Declared:
    return Declared(f"quanto.{kind}", "quanto", "optimum.quanto", "quanto", bits, widths=(64, 128, 192, 256))


def _by_hand(name: str, package: str, bits: int, dtype: str = "float16", module: str | None = None) -> Declared:
    sizes = {"widths": (64, 128), "heights": (32, 64)}
    return Declared(
        name, package if module is None else module, package, package, bits, dtypes=(dtype,), by_hand=True, **sizes
    )


_ROWS = {"widths": (24, 64, 128), "heights": (5, 32, 64)}


DECLARED: dict[str, Declared] = {
    one.name: one
    for one in (
        _bitsandbytes("int8", 8, widths=(5, 64, 128, 96), heights=(3, 32, 64), largest=65504.0),
        _four("nf4"),
        _four("nf4.double"),
        _four("fp4"),
        _four("fp4.double"),
        _torchao("int8", 8, **_ROWS),
        _torchao("int8.dynamic", 8, **_ROWS),
        _torchao("float8", 8, **_ROWS),
        _torchao("intx4", 4, options=_GROUPS),
        _torchao("intx4.dynamic", 4, options=_GROUPS),
        _hqq(8),
        _hqq(4),
        _hqq(2),
        _hqq(8, optimised=True),
        _hqq(4, optimised=True),
        _hqq(2, optimised=True),
        _quanto("qint8", 8),
        _quanto("qfloat8", 8),
        _quanto("qint4", 4),
        _quanto("qint2", 2),
        _by_hand("torchao.int4", "torchao", 4, "bfloat16"),
        _by_hand("gptqmodel.gptq", "gptqmodel", 4),
        _by_hand("gptqmodel.awq", "gptqmodel", 4),
        _by_hand("aqlm.1x8", "aqlm", 1),
        _by_hand("eetq.int8", "eetq", 8, module=""),
    )
}


# Those that merges can be judged on: their grids have budgets.
GRIDS = tuple(name for name, one in DECLARED.items() if not one.by_hand)


def available(name: str) -> bool:
    """Return whether the library of a quantizer is installed, and a layer of it can be made here."""
    return not absence(name)


def absence(name: str) -> str:
    """Return why no layer of a quantizer can be made here; '' where one can."""
    one = DECLARED[name]
    found = importlib.util.find_spec(one.package.partition(".")[0]) and importlib.util.find_spec(one.package)
    if not found:
        return f"not installed: {one.package}"
    return "" if one.module else f"layers of {one.package} cannot be made without its hardware"


def load(name: str) -> Quantizer:
    """Return a quantizer by name; raises UsageError for an unknown name or where its library is not installed."""
    if name not in DECLARED:
        raise UsageError(f"unknown quantizer '{name}': choose from {', '.join(DECLARED)}")
    one = DECLARED[name]
    if not one.module:
        raise UsageError(
            f"quantizer '{name}' is declared only: layers of {one.package} cannot be made without its hardware"
        )
    if not available(name):
        raise UsageError(f"quantizer '{name}' needs the package '{one.package}': pip install 'peftcheck[{one.extra}]'")
    module = importlib.import_module(f"peftcheck.quantizers.{one.module}")
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
    quantizer.dress(model, settings)


def settings_of(case: Case) -> dict[str, Any]:
    """Return the settings of the case's quantizer; of the rare ones those that the case has."""
    one = DECLARED[case.sweep.quantizer]
    return {key: case.setting(key) for key in (*one.options, *(key for key in one.rare if case.setting(key)))}
