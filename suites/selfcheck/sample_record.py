"""Build records that look like those of a run over PEFT, for the tests of the record and the reports."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace

from peftcheck.record import (
    SCHEMA,
    CellRecord,
    DefectRecord,
    FaultRecord,
    Implementation,
    LedgerRecord,
    Record,
    Table,
    Worst,
    headroom,
    totals,
)
from peftcheck.tokens import pack

LAWS = {
    "forward": ["oracle"],
    "merge": [
        "forward",
        "oracle",
        "delta",
        "roundtrip",
        "drift",
        "isolated",
        "preserves",
        "subset",
        "order",
        "guarded",
        "disable",
        "export",
    ],
    "safe_merge": ["rejects", "atomic", "all_or_nothing", "names", "agrees"],
    "combine": [
        "linear",
        "cross_term_free",
        "single",
        "cancel",
        "homogeneous",
        "permutation",
        "best_rank",
        "sources_untouched",
        "base_untouched",
        "density_one",
    ],
    "quantize": [
        "merge_budget",
        "roundtrip_budget",
        "zero_delta",
        "drift",
        "effect",
        "warns",
        "backward",
        "state_kept",
    ],
    "state": ["save_load", "reload_merge", "checkpoint_size", "delete", "tied"],
    "train": ["identity_at_init", "live_gradients", "base_frozen", "dropout", "mixed_batch"],
    "refuse": ["clear"],
}
LINEAR = ["linear", "conv1d-transformers"]
CONVOLUTIONS = ["conv1d", "conv2d", "conv3d"]
# Those that the defects below need come first: a small sample has them too.
VARIANTS = {
    "lora.bias": LINEAR + CONVOLUTIONS,
    "lora.bdlora": ["linear"],
    "ia3": [*LINEAR, "conv2d", "conv3d"],
    "oft": ["linear", "conv2d"],
    "trainable_tokens": ["embedding"],
    "boft": ["linear", "conv2d"],
    "lora": LINEAR + CONVOLUTIONS + ["embedding", "mha", "parameter"],
    "hra.gs": ["linear"],
    "lora.rslora": LINEAR + CONVOLUTIONS,
    "lora.dora": LINEAR + CONVOLUTIONS + ["embedding"],
    "lora.pissa": LINEAR,
    "lora.olora": LINEAR,
    "adalora": [*LINEAR, "conv2d"],
    "ia3.feedforward": LINEAR,
    "loha": ["linear", "conv1d", "conv2d"],
    "lokr": ["linear", "conv1d", "conv2d"],
    "hra": ["linear", "conv2d"],
    "vera": LINEAR,
    "vblora": LINEAR,
    "randlora": LINEAR,
    "fourierft": LINEAR,
    "miss": ["linear"],
    "miss.mini": ["linear"],
    "road": ["linear"],
    "shira": ["linear"],
    "ln_tuning": ["layernorm"],
    "mixed.oft-lora": ["linear"],
}
DTYPES = ["float64", "float32", "bfloat16", "float16"]
QUANTIZERS = ["bitsandbytes.int8", "bitsandbytes.nf4", "torchao.int8"]
KINDS = ["linear", "cat", "svd"]


def cell(
    law: str,
    variant: str,
    layer: str,
    dtype: str | None = "float32",
    quantizer: str | None = None,
    kind: str | None = None,
    status: str = "pass",
    ratio: float | None = 0.5,
    **fields,
) -> CellRecord:
    """Build a cell; an id, a headroom and a fingerprint follow from the rest."""
    key = "-".join(part for part in (law, variant, layer, dtype, quantizer, kind) if part)
    bad = status in ("violation", "error", "known")
    case = json.dumps({"variant": variant, "layer": layer, "dtype": dtype, "quantizer": quantizer})
    values = dict(
        id=key,
        law=law,
        variant=variant,
        layer=layer,
        dtype=dtype,
        quantizer=quantizer,
        kind=kind,
        status=status,
        cases=0 if status == "absent" else 40,
        ratio=ratio,
        headroom=headroom(ratio),
        effect=0.31,
        seconds=0.4,
        worst=Worst(pack(law, case), f"{layer} 5 -> 3, rank 2") if ratio is not None else None,
        fingerprint=f"{law}/{variant}/numeric" if bad else None,
        issue=None,
        message=f"{law}: ratio {ratio}" if bad else None,
    )
    return CellRecord(**(values | fields))


def defect(cells: Iterable[CellRecord], **fields) -> DefectRecord:
    """Build the defect that some cells share."""
    cells = tuple(cells)
    first = cells[0]
    values = dict(
        fingerprint=first.fingerprint,
        status=first.status,
        law=first.law,
        headline=f"{first.law} breaks on {first.variant}",
        issue=first.issue,
        cells=tuple(c.id for c in cells),
        variants=tuple(sorted({c.variant for c in cells})),
        layers=tuple(sorted({c.layer for c in cells})),
        dtypes=tuple(sorted({c.dtype for c in cells if c.dtype})),
        ratio=first.ratio,
        token="pc1_eyJsYXciOiJtZXJnZSJ9",
        words="linear 5 -> 3 without bias, float32, rank 2, one adapter at scale 2",
        message=first.message,
        script="import torch\nimport peft\n\nprint(torch.zeros(1))\n",
        steps=(),
        repair=None,
    )
    return DefectRecord(**(values | fields))


def record(cells: Iterable[CellRecord], defects: Iterable[DefectRecord] | None = None, **fields) -> Record:
    """Build a record around cells; every fingerprint gets a defect unless defects are given."""
    cells = tuple(cells)
    if defects is None:
        groups: dict[str, list[CellRecord]] = {}
        for item in cells:
            if item.fingerprint is not None:
                groups.setdefault(item.fingerprint, []).append(item)
        defects = [defect(group) for group in groups.values()]
    values = dict(
        schema=SCHEMA,
        peftcheck="0.1.0",
        implementation=Implementation("peft", "0.21.2"),
        environment={
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "platform": "Linux x86_64",
            "processor": "AVX2",
        },
        calibration={
            "linear.bfloat16": {"accumulates": "float32", "ratio": 0.996},
            "conv2d.float16": {"accumulates": "float32", "ratio": 0.971},
        },
        profile="quick",
        seed=0,
        seconds=143.2,
        cells=cells,
        defects=tuple(defects),
        ledger=(),
        totals=totals(cells),
    )
    return Record(**(values | fields))


def sample(least: int = 3000) -> Record:
    """Build a realistic record of at least so many cells, the same at every call."""
    draw = random.Random(7)
    cells: list[CellRecord] = []
    copy = 0
    while len(cells) < least:
        for variant, layers in VARIANTS.items():
            if len(cells) < least:
                cells += _variant(variant if not copy else f"{variant}.option{copy}", layers, draw)
        copy += 1
    return _described(cells)


def _variant(variant: str, layers: list[str], draw: random.Random) -> list[CellRecord]:
    cells = []
    base = variant.partition(".")[0]
    for layer in layers:
        for group, names in LAWS.items():
            for law in (f"{group}.{name}" for name in names):
                if group == "combine" and base != "lora":
                    continue
                if group == "quantize":
                    cells += [
                        _drawn(law, variant, layer, "bfloat16", quantizer, None, draw)
                        for quantizer in QUANTIZERS
                        if layer == "linear" and base in ("lora", "vera", "oft", "ia3")
                    ]
                elif group == "refuse":
                    cells.append(cell(law, variant, layer, None, ratio=None))
                else:
                    kinds = KINDS if law in ("combine.linear", "combine.single") else [None]
                    cells += [
                        _drawn(law, variant, layer, dtype, None, kind, draw) for dtype in DTYPES for kind in kinds
                    ]
    return cells


def _drawn(law, variant, layer, dtype, quantizer, kind, draw: random.Random) -> CellRecord:
    name = law.split(".")[1]
    base = variant.partition(".")[0]
    key = (law, variant, layer, dtype, quantizer, kind)
    half = dtype in ("bfloat16", "float16")
    if quantizer == "torchao.int8":
        return cell(*key, status="absent", ratio=None)
    if (
        (quantizer and base == "ia3")
        or (base == "boft" and name == "drift")
        or (law == "train.mixed_batch" and base == "oft")
    ):
        return cell(*key, status="unsupported", ratio=None)
    exact = name in (
        "isolated",
        "preserves",
        "subset",
        "guarded",
        "export",
        "delete",
        "tied",
        "warns",
        "atomic",
        "all_or_nothing",
        "names",
        "save_load",
        "base_frozen",
        "sources_untouched",
        "base_untouched",
    )
    ratio = 0.0 if exact else draw.uniform(0.3, 0.99) if half else draw.uniform(0.01, 0.9) ** 2
    if law == "safe_merge.rejects" and variant == "lora.bias":
        return cell(
            *key,
            status="violation",
            ratio=float("inf"),
            message="safe_merge.rejects: NaN in lora_B.bias went in",
        )
    if law == "merge.roundtrip" and variant == "oft" and layer == "conv2d":
        return cell(*key, status="violation", ratio=10 ** draw.uniform(1, 6), issue="https://example.org/issues/41")
    if law == "combine.cross_term_free" and variant.startswith("lora") and layer == "linear":
        return cell(
            *key,
            status="known",
            ratio=10 ** draw.uniform(5, 12),
            fingerprint="combine.cross_term_free/lora/numeric",
            issue="https://github.com/huggingface/peft/issues/1155",
        )
    if law == "merge.roundtrip" and base == "ia3" and dtype == "float64":
        return cell(*key, status="known", ratio=4.5e7, fingerprint="merge.roundtrip/ia3/numeric")
    if law == "state.tied" and variant == "trainable_tokens":
        return cell(
            *key,
            status="error",
            ratio=None,
            message="AttributeError: 'Embedding' object has no attribute "
            "'token_adapter'\n  in peft/tuners/trainable_tokens/layer.py, line 88",
        )
    if law == "merge.delta" and variant == "lora.bdlora":
        return cell(*key, status="violation", ratio=float("nan"))
    return cell(*key, ratio=ratio)


SCRIPT = """import torch
from peft import LoraConfig, get_peft_model

model = torch.nn.Sequential(torch.nn.Linear(1, 1))
model = get_peft_model(model, LoraConfig(target_modules=["0"], r=1, lora_bias=True))
layer = model.base_model.model[0]
layer.lora_B["default"].bias.data.fill_(float("nan"))
layer.merge(safe_merge=True)
assert torch.isfinite(layer.weight).all()
"""
TOLD = {
    "safe_merge.rejects/lora.bias/numeric": dict(
        headline="A non-finite LoRA bias is merged into the base although safe_merge=True",
        words="linear 1 -> 1 with bias, float32, adapter float32, rank 1, lora_bias, NaN in lora_B.bias[0]",
        steps=(
            "NaN in lora_A or lora_B is refused; NaN in lora_B.bias is not.",
            "Every layer kind with a bias shows it; 1 x 1 is enough.",
        ),
        message="safe_merge.rejects: where the oracle's merged tensor is not finite, the merge is refused\n"
        "ratio inf, residual nan, bound 0, effect 0.4\nfloat64 inf, float32 inf, bfloat16 inf",
        script=SCRIPT,
        repair="Merge only after checking lora_B.bias for finite values.",
    ),
    "merge.roundtrip/oft/numeric": dict(
        headline="Unmerging OFT on a grouped convolution does not give the base weight back",
        words="conv2d 4 -> 4, kernel 2x2, groups 2, float32, block size 2",
        issue="https://example.org/issues/41",
        steps=("Kernel 1x1 holds; 2x2 violates.", "groups 1 holds; groups 2 violates."),
    ),
    "combine.cross_term_free/lora/numeric": dict(
        headline="Linear combination of LoRA adapters adds B_a A_b cross terms",
        words="linear 2 -> 2, two adapters of rank 1 with orthogonal factors, weights 1 and 1",
        steps=("One adapter holds; two violate.",),
        repair="Combine with combination_type='cat'.",
        issue="https://github.com/huggingface/peft/issues/1155",
    ),
    "merge.roundtrip/ia3/numeric": dict(headline="(IA)^3 unmerge divides by s + 1e-8"),
    "state.tied/trainable_tokens/numeric": dict(headline="Saving a tied embedding raises AttributeError", script=None),
}


def _described(cells: list[CellRecord]) -> Record:
    plain = record(cells)
    defects = tuple(replace(item, **TOLD.get(item.fingerprint, {})) for item in plain.defects)
    known = {item.fingerprint: item for item in defects if item.status == "known"}
    terms, divisor = known["combine.cross_term_free/lora/numeric"], known["merge.roundtrip/ia3/numeric"]
    ledger = (
        LedgerRecord(
            "peft-001", "bug", terms.law, "known", "add_weighted_adapter sums A and B apart: cross terms.",
            "https://github.com/huggingface/peft/issues/1155", ">=0.7", (terms.token,), terms.cells,
        ),
        LedgerRecord(
            "peft-002", "documented", divisor.law, "known", "The divisor is s + 1e-8; announced as inexact.",
            "https://huggingface.co/docs/peft", None, (divisor.token,), divisor.cells,
        ),
    )  # fmt: skip
    faults = tuple(
        FaultRecord(name, text, models, laws, bool(laws))
        for name, text, models, laws in (
            ("scale-dropped", "Merges with scale 1", "wrong scale", ("merge.oracle", "merge.forward")),
            (
                "unmerge-twice",
                "Subtracts though unmerged",
                "unmerge of an unmerged layer",
                ("merge.guarded",),
            ),
            ("bias-forgotten", "Leaves the bias out", "lora_bias", ("merge.oracle", "safe_merge.agrees")),
            ("nan-accepted", "Skips the finite check", None, ("safe_merge.rejects", "safe_merge.atomic")),
            ("cast-late", "Casts only once", "half-precision merge", ("merge.roundtrip", "merge.drift")),
        )
    )
    sizes = (("lora", 12_800, 12_800, 0.0), ("vera", 96_000, 2_048, 45.875), ("vblora", 70_144, None, None))
    note = "Adapter file of two linear layers, 512 wide, float32."
    table = Table("Checkpoint size", ("variant", "bytes", "needed", "excess"), sizes, note)
    return replace(plain, defects=defects, ledger=ledger, faults=faults, measurements=(table,))
