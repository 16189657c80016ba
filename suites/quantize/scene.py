"""One quantized layer with a LoRA of PEFT's on it, and tables for what is measured there."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table as Rich
from torch import Tensor

from peftcheck import engine, quantizers
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.implementations.peft import Peft
from peftcheck.record import Table
from peftcheck.stage import Stage
from peftcheck.staging import note_start, set_up

SIZE = 256
warnings.filterwarnings("ignore", message=".*rounding errors.*")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def staged(quantizer: str, seed: int, dtype: str = "float32", spread: float = 1.0) -> Stage:
    """Return a layer of 256 x 256 normal weights, quantized, with a LoRA of rank 8 and scale 1.

    The factors are `spread` times normal / 2, see `values`. Blocks of 64.
    """
    declared = quantizers.DECLARED[quantizer]
    settings = {key: 64 for key in declared.options}
    layer = LayerSpec("layer", "linear", SIZE, SIZE)
    adapter = AdapterSpec("default", (0,), 8, 8.0)
    sweep = Sweep("peft", "lora", "linear", dtype, quantizer)
    case = Case(sweep, 0, 0, (layer,), (adapter,), dtype, "normal", seed, extra=tuple(sorted(settings.items())))
    with engine.pinned():
        stage = set_up(Peft(), case)
    rescaled(stage, spread)
    return stage


def rescaled(stage: Stage, factor: float) -> None:
    """Multiply the second factor of the LoRA."""
    with torch.no_grad():
        stage.attached.adapter_tensors("default")["layer", "B"].mul_(factor)
    note_start(stage)


def dense(stage: Stage) -> Tensor:
    """Return the weight that is there now, fp64."""
    return stage.attached.base_values()["layer.weight"].detach().double()


def delta(stage: Stage) -> Tensor:
    """Return what the adapter adds, by the closed form, fp64."""
    return stage.formula.delta(stage.machine, stage.site(0, "layer"))["weight"].value


def names(options: Sequence[str] | None) -> list[str]:
    """Return the installed quantizers, or those chosen; PEFT merges into none of quanto's."""
    return [
        n
        for n in quantizers.GRIDS
        if quantizers.available(n) and not n.startswith("quanto.") and (not options or n in options)
    ]


def show(table: Table) -> None:
    """Print a table."""
    rich = Rich(title=table.title, caption=table.note)
    for column in table.columns:
        rich.add_column(column, justify="right")
    for row in table.rows:
        rich.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    Console(width=150).print(rich)
