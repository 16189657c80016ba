"""What scripts add for quantized layers: how they are quantized and read, and what each law does to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftcheck import quantizers
from peftcheck.case import Case
from peftcheck.laws import quantize
from peftcheck.laws.merge import merge_all
from peftcheck.laws.quantize_state import expected_after_forward
from peftcheck.oracle import Base
from peftcheck.repro.model import indented, literal
from peftcheck.repro.scene import Scene
from peftcheck.rounding import judged


@dataclass(frozen=True)
class _Library:
    """Source text of a quantizer: imports, the body of `quantized(old)`, what `dense(layer)` returns, and the flag.

    `before`: a line ahead of all of them.
    """

    imports: tuple[str, ...]
    quantized: tuple[str, ...]
    dense: str
    flag: str = ""
    before: str = ""


_SHAPE = "old.in_features, old.out_features, old.bias is not None"
_INT8 = _Library(
    ("import bitsandbytes as bnb",),
    (
        f"new = bnb.nn.Linear8bitLt({_SHAPE}, has_fp16_weights=False)",
        "codes = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)",
        'new.weight, new.bias = codes.to("cpu"), old.bias',
        "return new",
    ),
    "bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)",
    "model.is_loaded_in_8bit = True",
)


def _four(kind: str, double: bool, block: int, storage: str) -> _Library:
    given = f'compress_statistics={double}, quant_type="{kind}"'
    given += "" if storage == "uint8" else f", quant_storage=torch.{storage}"
    return _Library(
        ("import bitsandbytes as bnb",),
        (
            f"new = bnb.nn.Linear4bit({_SHAPE}, compute_dtype=old.weight.dtype, {given})",
            f"codes = bnb.nn.Params4bit(old.weight.data, requires_grad=False, blocksize={block}, {given}, module=new)",
            'new.weight, new.bias = codes.to("cpu"), old.bias',
            "return new",
        ),
        "bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)",
        "model.is_loaded_in_4bit = True",
    )


_TORCHAO = {
    "int8": "Int8WeightOnlyConfig()",
    "int8.dynamic": "Int8DynamicActivationInt8WeightConfig()",
    "float8": "Float8WeightOnlyConfig()",
    "intx4": "IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup({group}))",
    "intx4.dynamic": "Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup({group}))",
}


def _torchao(kind: str, group: int) -> _Library:
    config = _TORCHAO[kind].format(group=group)
    name, grouped = config.partition("(")[0], ", PerGroup" if "PerGroup" in config else ""
    return _Library(
        ("from types import SimpleNamespace", f"from torchao.quantization import {name}{grouped}, quantize_"),
        ("old.requires_grad_(False)", "quantize_(old, config())", "return old"),
        "layer.weight.dequantize()",
        "model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=config))",
        f"config = lambda: {config}",
    )


def _hqq(bits: int, group: int, optimised: bool) -> _Library:
    return _Library(
        ("from hqq.core.quantize import BaseQuantizeConfig, HQQLinear",),
        (
            f"config = BaseQuantizeConfig(nbits={bits}, group_size={group}, axis=1)",
            f'config["weight_quant_params"] |= {{"optimize": {optimised}, "round_zero": False}}',
            "old.requires_grad_(False)",
            'return HQQLinear(old, config, compute_dtype=old.weight.dtype, device="cpu", del_orig=False)',
        ),
        "layer.dequantize()",
    )


def _quanto(kind: str) -> _Library:
    return _Library(
        (f"from optimum.quanto import freeze, {kind}", "from optimum.quanto.nn import QLinear"),
        (
            f"new = QLinear.from_module(old, weights={kind})",
            "freeze(new)",
            "return new.requires_grad_(False)",
        ),
        "layer.weight.dequantize()",
    )


def _library(case: Case) -> _Library:
    family, _, kind = case.sweep.quantizer.partition(".")
    settings = quantizers.settings_of(case)
    if family == "hqq":
        return _hqq(int(kind.partition(".")[0]), int(settings["group"]), kind.endswith(".optimised"))
    if family == "torchao":
        return _torchao(kind, int(settings.get("group", 0)))
    if family == "quanto":
        return _quanto(kind)
    if kind == "int8":
        return _INT8
    return _four(
        kind.partition(".")[0], kind.endswith(".double"), int(settings["blocksize"]), settings.get("storage", "uint8")
    )


def imports(case: Case) -> tuple[str, ...]:
    """Return the import lines of the quantizer; none where the case has none."""
    return _library(case).imports if case.sweep.quantizer else ()


def definitions(case: Case) -> tuple[str, ...]:
    """Return the functions `quantized(old)`, a layer quantized, and `dense(layer)`, the weight through the library."""
    if not case.sweep.quantizer:
        return ()
    library = _library(case)
    first = (library.before,) if library.before else ()
    body = ("def quantized(old):", *indented(library.quantized))
    return (*first, *body, f"dense = lambda layer: {library.dense}.detach()")


def prepare(case: Case) -> tuple[str, ...]:
    """Return the lines that quantize every layer of `model` and set the flag that libraries dispatch on."""
    if not case.sweep.quantizer:
        return ()
    swap = "model.set_submodule(name, quantized(model.get_submodule(name)))"
    flag = _library(case).flag
    return (f"for name in {[spec.name for spec in case.layers]}: {swap}", *((flag,) if flag else ()))


def _layer(scene: Scene) -> str:
    return scene.say.base(scene.site, "weight").removesuffix(".weight")


def _ran(scene: Scene) -> str:
    runs = (f"{scene.say.layer(name)}({scene.takes(name)})" for name in scene.stage.targeted)
    return f"with torch.no_grad(): {'; '.join(runs)}"


def _numeric(scene: Scene, act: list[str], form: Base | None) -> list[str] | None:
    if scene.measured.symptom == "unreadable":
        return [
            *act,
            "try:",
            f"    dense({_layer(scene)})",
            "except Exception as error:",
            '    print("found:", type(error).__name__, error, "expected: a weight that its quantizer can read")',
            "    raise SystemExit(1)",
        ]
    if form is None or scene.tensor not in form:
        return None
    one = form[scene.tensor]
    found = f"dense({_layer(scene)})" if scene.tensor == "weight" else f"{_layer(scene)}.{scene.tensor}.detach()"
    return [
        *act,
        f"found = {found}.double()",
        f"expected = {literal(one.value)}  # the closed form, computed outside the libraries",
        f"allowed = {literal(judged(one))}  # what rounding to the grid may cost",
        "ratio = torch.where(found == expected, 0.0, (found - expected).abs() / allowed).max().item()",
        'print("found:", found, "expected:", expected, "largest difference / allowed:", ratio)',
        "raise SystemExit(int(not ratio <= 1))",
    ]


def merge_budget(scene: Scene) -> list[str] | None:
    """Merge, and compare with the closed form."""
    form = quantize.merged(scene.stage, scene.site, _chosen(scene))
    return _numeric(scene, scene.merges(), form)


def _chosen(scene: Scene) -> list:
    """Return what the merge has chosen of the layer's grid, where it is searched for."""
    if not quantizers.DECLARED[scene.stage.case.sweep.quantizer].searched:
        return []
    merge_all(scene.stage)
    return [quantize.chosen(scene.stage)[scene.site]]


def after_forward(scene: Scene) -> list[str] | None:
    """Run once, merge, and compare with the closed form."""
    form = expected_after_forward(scene.stage, scene.site, _chosen(scene))
    return _numeric(scene, [_ran(scene), *scene.merges()], form)


def rejects(scene: Scene) -> list[str] | None:
    """Merge a poisoned adapter safely: it must be refused."""
    if scene.poisoned is None or not scene.measured.symptom.startswith("accepted"):
        return None
    return [
        "try:",
        f"    {scene.say.merge((scene.stage.names[scene.poisoned.adapter],), True)}",
        "except ValueError as error:",
        '    raise SystemExit(print("refused:", error))',
        f"finite = torch.isfinite(dense({_layer(scene)})).all().item()",
        'print("found: accepted, the merged weight is", "finite" if finite else "not finite")',
        'print("expected: refused")',
        "raise SystemExit(1)",
    ]


def warns(scene: Scene) -> list[str]:
    """Merge, and look for a word about rounding."""
    return [
        "import warnings",
        "with warnings.catch_warnings(record=True) as caught:",
        '    warnings.simplefilter("always")',
        *indented(scene.merges()),
        'said = [str(one.message) for one in caught if "round" in str(one.message)]',
        'print("found:", said, "expected: a warning that the merge rounds to the grid")',
        "raise SystemExit(int(not said))",
    ]


def state_kept(scene: Scene) -> list[str] | None:
    """Merge, and look at what the layer keeps."""
    layer, fact = _layer(scene), scene.measured.role.partition(":")[2]
    marks = {
        "bias": f'getattr({layer}.bias, "dtype", None)',
        "dtype of the state": f"{layer}.weight.quant_state.dtype",
        "graph": f'{layer}.meta["scale"].grad_fn is not None',
    }
    if fact not in marks:
        return None
    return [
        f"mark = lambda: {marks[fact]}",
        "before = mark()",
        *scene.merges(),
        'print("found:", mark(), "expected:", before)',
        "raise SystemExit(int(mark() != before))",
    ]


def refuses(scene: Scene) -> list[str] | None:
    """Merge what cannot be merged: accepted, or a crash instead of a refusal."""
    statement = scene.say.merge(scene.stage.names[:1], scene.stage.case.safe)
    if scene.measured.symptom == "accepted":
        return [
            f"before = dense({_layer(scene)}).clone()",
            statement,
            f"moved = (dense({_layer(scene)}) - before).abs().max().item()",
            'print("found: merged, the weight moved by", moved, "expected: refused")',
            "raise SystemExit(1)",
        ]
    kind = crashed(scene.measured.symptom)
    if kind is None:
        return None
    return [
        "try:",
        f"    {statement}",
        "except Exception as error:",
        '    print("found:", type(error).__name__, error, "expected: a refusal that names what it cannot do")',
        f'    raise SystemExit(int(type(error).__name__ == "{kind}"))',
    ]


def crashed(symptom: str) -> str | None:
    """Return the kind of error of a symptom 'crash: KIND in file.py:function', None for another."""
    return symptom.removeprefix("crash: ").partition(" ")[0] if symptom.startswith("crash: ") else None


BODIES: dict[str, Callable[[Scene], list[str] | None]] = {
    "quantize.merge_budget": merge_budget,
    "quantize.after_forward": after_forward,
    "quantize.rejects": rejects,
    "quantize.warns": warns,
    "quantize.state_kept": state_kept,
    "quantize.refuses": refuses,
}


def steps(scene: Scene, law: str) -> list[str] | None:
    """Return the calls into the library that a law makes, for a crash that needs no comparison."""
    back = [scene.say.unmerge]
    ran = [_ran(scene)]
    if law in ("quantize.rejects", "quantize.atomic"):
        return None if scene.poisoned is None else [scene.say.merge((scene.stage.names[scene.poisoned.adapter],), True)]
    return {
        "quantize.merge_budget": scene.merges(),
        "quantize.effect": scene.merges(),
        "quantize.warns": scene.merges(),
        "quantize.state_kept": [*scene.merges(), *back],
        "quantize.roundtrip_budget": [*scene.merges(), *back],
        "quantize.zero_delta": [*scene.merges(), *back],
        "quantize.drift": [*scene.merges(), *back] * 2,
        "quantize.after_forward": [*ran, *scene.merges()],
        "quantize.forward": ran,
        "quantize.repeats": [*ran, *ran],
    }.get(law)
