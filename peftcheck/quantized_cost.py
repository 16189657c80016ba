"""What a merge into quantized weights costs, measured on one layer: for the report, and judged by no law.

The layer is 64 x 256 in float32 with normal weights, the adapter one of rank 8 with normal values. Against every
number stands what the grid makes unavoidable: an error spread evenly between the points of the grid, whose root mean
square is b / sqrt(3) where rounding to the nearest point costs at most b.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck import generator, quantizers, refusal
from peftcheck.case import Case, LayerSpec, Sweep
from peftcheck.implementation import Implementation, Op
from peftcheck.laws.quantize import chosen, dense, rule
from peftcheck.laws.quantize_cycles import silenced, without_effect
from peftcheck.measurement import Measurement
from peftcheck.record import QuantizedRecord
from peftcheck.stage import Stage
from peftcheck.staging import note_start, set_up

NAME, SHAPE, RANK = "layer", (256, 64), 8
SMALL = 0.1  # the small change, as a share of the step
CYCLES = 10  # merges and unmerges that drift is measured after
_SETTING = 64  # block or group


class Unreadable(Exception):
    """Say that a merge left a layer that its quantizer can no longer read."""


def measure(implementation: Implementation, sweep: Sweep) -> QuantizedRecord | None:
    """Merge once at full size and once with a change far below the grid's step; None where the library cannot, or need not.

    Runs under `engine.pinned()`. What the harness does wrong is raised.
    """
    try:
        full = _staged(implementation, sweep)
        if "weight" not in full.merged(NAME):
            return None  # a bias is not quantized
        start, due = _start(full), _due(full)
        step = 2 * _bound(full, start)
        cost = rms(_merged(full) - start - due)
        unavoidable = rms(_bound(full, start + due)) / math.sqrt(3)
        small = _staged(implementation, sweep)
        shrunk = _weaken(small, SMALL * rms(step))
        kept = cosine = changed = None
        if shrunk:
            start, least = _start(small), _due(small)
            moved = _merged(small) - start
            kept = float((moved * least).sum() / least.square().sum())
            norm = float(torch.linalg.vector_norm(moved) * torch.linalg.vector_norm(least))
            cosine = float((moved * least).sum()) / norm if norm else 0.0
            changed = float((moved.abs() > 0.25 * step).double().mean())
    except Exception as error:
        if not isinstance(error, Unreadable) and not refusal.is_library(error, implementation):
            raise
        return None
    drift, idle = (_walked(implementation, sweep, nothing) for nothing in (False, True))
    return QuantizedRecord(
        sweep.quantizer, sweep.variant, rms(start), rms(step), rms(due), unavoidable, cost, kept, cosine, changed,
        drift, idle,
    )  # fmt: skip


def _walked(implementation: Implementation, sweep: Sweep, nothing: bool) -> float | None:
    """Return how far merges and unmerges have moved the weights, of a full change or of none.

    None where the method does not come back, or has no values without effect.
    """
    try:
        stage = _staged(implementation, sweep)
        if not stage.can(Op.UNMERGE) or (nothing and silenced(stage, without_effect(stage.case)) is None):
            return None
        for _ in range(CYCLES):
            stage.attached.merge(stage.names, safe=False)
            stage.attached.unmerge()
        return rms(_read(stage) - _start(stage))
    except Exception as error:
        if not isinstance(error, Unreadable) and not refusal.is_library(error, implementation):
            raise
        return None


def _bound(stage: Stage, value: Tensor) -> Tensor:
    """Return what rounding `value` to the grid may cost; of a searched grid, to the one that is there now."""
    return rule(stage, chosen=[chosen(stage)[NAME]])(value, torch.zeros_like(value))


def rms(tensor: Tensor) -> float:
    """Return the root mean square."""
    return float(tensor.double().square().mean().sqrt())


def _staged(implementation: Implementation, sweep: Sweep) -> Stage:
    variant = implementation.variants()[sweep.variant]
    drawn = generator.draw(variant, sweep, 0, 0)
    layers = (LayerSpec(NAME, "linear", *SHAPE, bias=variant.bias is not False),)
    adapter = replace(drawn.adapters[0], targets=(0,), rank=RANK, alpha=float(RANK))
    adapters = variant.fit_all((variant.fit(adapter, layers, False),), layers)
    settings = tuple(sorted((key, _SETTING) for key in quantizers.DECLARED[sweep.quantizer].options))
    case = Case(sweep, 0, 0, layers, adapters, sweep.dtype, "normal", 7, extra=settings)
    torch.default_generator.manual_seed(case.values)
    return set_up(implementation, case)


def _start(stage: Stage) -> Tensor:
    return stage.dense[f"{NAME}.weight"].double()


def _due(stage: Stage) -> Tensor:
    """Return what the adapter changes, by the closed form, fp64."""
    site = stage.site_of(0, NAME, stage.start_adapters[stage.names[0]])
    return stage.merge_of([site], stage.base(NAME))["weight"].value - _start(stage)


def _merged(stage: Stage) -> Tensor:
    stage.attached.merge(stage.names, safe=False)
    return _read(stage)


def _read(stage: Stage) -> Tensor:
    found = dense(stage)
    if isinstance(found, Measurement):
        raise Unreadable(found.note)
    return found[f"{NAME}.weight"].detach().double()


def _weaken(stage: Stage, wanted: float) -> bool:
    """Scale the adapter's factors until the change has the root mean square `wanted`; False where no scale does."""
    hints, full = stage.formula.hints, stage.start_adapters[stage.names[0]]
    scaled = {
        key
        for key, tensor in full.items()
        if hints.get(key[1], "factor") in ("factor", "rotation") and tensor.is_floating_point()
    }

    def at(factor: float) -> float:
        tensors = {key: t * factor if key in scaled else t for key, t in full.items()}
        changed = stage.merge_of([stage.site_of(0, NAME, tensors)], stage.base(NAME))["weight"].value - _start(stage)
        return rms(changed)

    low, high = 2.0**-20, 1.0
    if not scaled or at(low) > wanted or at(high) < wanted:
        return False
    for _ in range(14):  # to a hundredth
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle) < wanted else (low, middle)
    with torch.no_grad():
        for key, tensor in stage.attached.adapter_tensors(stage.names[0]).items():
            if key in scaled:
                tensor.mul_(high)
    note_start(stage)
    return True
