"""What a checkpoint of a variant holds: a table of bytes for the record, its rows functions of the implementation alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from peftcheck import checkpoint, engine, generator, refusal
from peftcheck.case import CONVOLUTIONS, LAYERS, AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.implementation import Claim, Implementation, Op, Variant, stored
from peftcheck.record import Table
from peftcheck.staging import set_up

TITLE = "What a checkpoint holds"
_COLUMNS = (
    "variant", "held besides, as declared", "trainable bytes", "declared besides", "values written",
    "container", "written / trainable",
)  # fmt: skip
_NOTE = (
    "One adapter of rank 8 (less where the method asks for it) on four layers of 64 inputs and 48 outputs, float32. "
    "Container: what safetensors needs for names, dtypes and shapes. A ratio above 1 is what is stored and not trained."
)
_NAMES = tuple(f"layers.{number}.proj" for number in range(4))
_DRAWS = 24  # cases whose options are looked at, for each set of declared tensors


def table(implementation: Implementation, names: Collection[str]) -> Table | None:
    """Return the table, a row for each of the named variants and each set of tensors it declares; None if nothing saves."""
    rows = []
    variants = implementation.variants()
    with engine.pinned():
        for name, variant in sorted((name, variants[name]) for name in names):
            rows += [_row(implementation, case, variant) for case in specimens(implementation, name, variant)]
    found = tuple(row for row in rows if row is not None)
    return Table(TITLE, _COLUMNS, found, _NOTE) if found else None


def specimens(implementation: Implementation, name: str, variant: Variant) -> Iterator[Case]:
    """Yield a case on four equal layers for each set of tensors that the variant's options let a checkpoint hold.

    None of a method of whole models.
    """
    alone = variant.layers & frozenset(LAYERS)
    if variant.layers and not alone:
        return
    kind = "linear" if "linear" in alone else min(alone, default="linear")
    layers = tuple(variant.admit(_layer(site, kind, variant)) for site in _NAMES)
    seen = set()
    for index in range(_DRAWS):
        drawn = generator.draw(variant, Sweep(implementation.name, name, kind, "float32"), 0, index)
        options = tuple((key, value) for key, value in drawn.adapters[0].options if key not in ("ranks", "alphas"))
        adapter = variant.fit(AdapterSpec("default", tuple(range(len(layers))), 8, 16.0, options), layers, False)
        if variant.keeps(adapter) not in seen and variant.claim(Op.SAVE, layers[0], adapter) is Claim.YES:
            seen.add(variant.keeps(adapter))
            plain = {"profile": "normal", "adapter_dtype": "float32", "batch": (2,), "train": False}
            yield replace(drawn, layers=layers, adapters=variant.fit_all((adapter,), layers), **plain)


def _layer(name: str, kind: str, variant: Variant) -> LayerSpec:
    spec = LayerSpec(name, kind, 64, 48, bias=variant.bias is not False or kind == "conv1d-transformers")
    if kind in CONVOLUTIONS:
        dims = CONVOLUTIONS.index(kind) + 1
        once = (1,) * dims
        return replace(spec, kernel=(3,) * dims, stride=once, padding=once, dilation=once, size=(5,) * dims)
    return replace(spec, n_out=64) if kind in ("layernorm", "mha") else spec


def _row(implementation: Implementation, case: Case, variant: Variant) -> tuple | None:
    """Return a row; None where the library cannot attach or save the case: laws of their own say so."""
    try:
        stage = set_up(implementation, case)
        folder = stored(checkpoint.saved(stage), "default")
    except Exception as error:
        if not refusal.is_library(error, implementation):
            raise
        return None
    found, due = checkpoint.sizes(folder), checkpoint.declared(stage, "default")
    trained = checkpoint.declared(stage, "default", besides=False)
    kept = ", ".join(sorted(variant.keeps(case.adapters[0]))) or None
    values = found.values + found.extra
    ratio = round(values / trained, 2) if trained else None
    return case.sweep.variant, kept, trained, due - trained, values, found.container, ratio
