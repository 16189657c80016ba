"""Merge and unmerge by hand, correctly, and measure how much of the round-trip budgets that uses.

    python suites/selfcheck/round_trips.py 10000

draws that many cases for each dtype and kind of merge, over all layer kinds and value profiles, and prints the worst
ratio of each. No library takes part: plain torch does what a correct one does, and the arithmetic of the closed
forms provides the budget.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftcheck import budgets, generator, values
from peftcheck.budgets.documented import IA3_EPSILON
from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, Case, LayerSpec, Sweep
from peftcheck.implementation import Variant
from peftcheck.measurement import ratios
from peftcheck.oracle import FORMULAS, Machine, Site, machine
from peftcheck.oracle.lowrank import scale
from peftcheck.rounding import DTYPES, Bounded, leaf, precision

MATRICES = ("linear", "conv1d-transformers", *CONVOLUTIONS)
LAYERS = {"additive": (*MATRICES, *EMBEDDINGS), "scaling": MATRICES}
VARIANTS = {
    "additive": Variant("lora", "lora", frozenset(LAYERS["additive"])),
    "scaling": Variant("ia3", "ia3", frozenset(MATRICES), options={"feedforward": (False, True)}),
}


@dataclass(frozen=True)
class Trip:
    """One round trip of one tensor: what it may cost, what it cost, and what the documented divisor may add."""

    layer: str
    profile: str
    exact: bool
    mixed: bool
    ratio: float
    documented: float = 0.0


def cases(family: str, dtype: str, count: int, seed: int = 0) -> Iterator[Case]:
    """Draw cases over all layer kinds of a family, every fourth in the exact regime."""
    for index in range(count):
        kind = LAYERS[family][index % len(LAYERS[family])]
        sweep = Sweep("by hand", VARIANTS[family].name, kind, dtype)
        yield generator.draw(VARIANTS[family], sweep, seed, index, exact=index % 4 == 3)


def trips(family: str, case: Case) -> Iterator[Trip]:
    """Merge all adapters of the first targeted layer in order, unmerge them in reverse, and measure."""
    formula = FORMULAS[VARIANTS[family].formula]
    spec = case.layers[case.adapters[0].targets[0]]
    if family == "additive":
        spec = replace(spec, groups=1)  # how LoRA pairs groups is no matter of rounding
    m = machine(DTYPES[case.sweep.dtype], DTYPES[case.adapter_dtype], case.profile == "dyadic")
    stored = [_tensors(family, case, index, spec) for index in range(len(case.adapters))]
    pick = random.Random(case.values)
    if family == "additive":
        changes = [_delta(pick, spec, scale(a), t) for a, t in zip(case.adapters, stored, strict=True)]
    else:
        changes = [_gain(spec, bool(a.option("feedforward")), t) for a, t in zip(case.adapters, stored, strict=True)]
    weight = values.base(case, spec, "weight", spec.weight_shape).to(DTYPES[case.sweep.dtype])
    if case.profile == "cancelling":
        weight = (-changes[0].double() * (1 + 4 * precision(weight.dtype).u)).to(weight.dtype)
    base = {"weight": leaf(weight, m.exact)}
    sites = [
        Site(spec, adapter, {role: leaf(tensor, m.exact) for role, tensor in tensors.items()})
        for adapter, tensors in zip(case.adapters, stored, strict=True)
    ]
    if not _sound(m, formula, sites, base):
        return
    budget = budgets.roundtrip(m, formula, sites, base)["weight"]
    back = _add_and_subtract if family == "additive" else _multiply_and_divide
    ratio = _ratio(back(weight, changes, case.safe), weight, budget)
    documented = 0.0
    if family == "scaling":
        extra = budgets.DOCUMENTED["ia3.epsilon"](m, formula, sites, base, 1)["weight"]
        documented = _ratio(_multiply_and_divide(weight, changes, case.safe, IA3_EPSILON), weight, budget + extra)
    yield Trip(spec.kind, case.profile, not bool(budget.any()), m.mixed, ratio, documented)


def _tensors(family: str, case: Case, index: int, spec: LayerSpec) -> dict[str, Tensor]:
    rank, dtype = case.adapters[index].rank, DTYPES[case.adapter_dtype]
    if family == "scaling":
        wide = spec.n_in if case.adapters[index].option("feedforward") else spec.n_out
        shapes, hint = {"scale": (wide,)}, "scale"
    else:
        inner = spec.weight_shape[1:] if spec.kind in CONVOLUTIONS else (spec.n_in,)
        shapes, hint = {"A": (rank, *inner), "B": (spec.n_out, rank)}, "factor"
    return {role: values.adapter(case, index, spec.name, role, shape, hint).to(dtype) for role, shape in shapes.items()}


def _delta(pick: random.Random, spec: LayerSpec, s: float, tensors: dict[str, Tensor]) -> Tensor:
    """Return s B A as a library stores it: in the adapter's dtype throughout, or in fp32 and cast at the end."""
    a, b = tensors["A"].flatten(1), tensors["B"]
    wide = pick.random() < 0.5 and a.dtype != torch.float64
    product = ((b.float() @ a.float()) * s).to(a.dtype) if wide else (b @ a) * s
    if spec.kind in CONVOLUTIONS:
        return product.reshape(spec.weight_shape)
    return product.t() if spec.weight_shape == (spec.n_in, spec.n_out) and spec.kind != "linear" else product


def _gain(spec: LayerSpec, inputs: bool, tensors: dict[str, Tensor]) -> Tensor:
    """Shape the vector so that it multiplies the stored weight along its outputs or its inputs."""
    vector = tensors["scale"]
    if spec.kind == "conv1d-transformers":
        return vector[:, None] if inputs else vector[None]
    if spec.kind in CONVOLUTIONS and inputs:  # output o of group o // (out / groups) sees the channels of its group
        rows = vector.reshape(spec.groups, -1)
        rows = torch.stack([rows[o // (spec.n_out // spec.groups)] for o in range(spec.n_out)])
        return rows.reshape(*rows.shape, *(1,) * len(spec.kernel))
    if inputs:
        return vector[None]
    return vector.reshape(-1, *(1,) * (len(spec.weight_shape) - 1))


def _sound(m: Machine, formula, sites: list[Site], base: dict[str, Bounded]) -> bool:
    largest, merged = m.base.store.largest / 2, dict(base)
    for site in sites:
        merged |= formula.merge(m, site, merged)
        if not all(bool((form.ceiling() <= largest).all()) for form in merged.values()):
            return False
    return True


def _add_and_subtract(weight: Tensor, deltas: list[Tensor], safe: bool) -> Tensor:
    """Add each delta, cast first or on the way; subtract them cast, last first."""
    merged = weight.clone()
    for delta in deltas:
        merged += delta.to(weight.dtype) if safe else delta
    for delta in reversed(deltas):
        merged -= delta.to(weight.dtype)
    return merged


def _multiply_and_divide(weight: Tensor, gains: list[Tensor], safe: bool, epsilon: float = 0.0) -> Tensor:
    merged = weight.clone()
    for gain in gains:
        merged = (merged * gain).to(weight.dtype)
    for gain in reversed(gains):
        merged = (merged / (gain + epsilon if epsilon else gain)).to(weight.dtype)
    return merged


def _ratio(found: Tensor, due: Tensor, budget: Tensor) -> float:
    # an infinite budget means that no number can be expected here (a factor that may be zero)
    quotient = ratios((found.double() - due.double()).abs(), budget)
    quotient = torch.where(budget.isinf(), torch.zeros_like(quotient), quotient)
    return float(quotient.max()) if quotient.numel() else 0.0


def measure(family: str, dtype: str, count: int, seed: int = 0) -> list[Trip]:
    """Return the round trips of `count` cases, adapters of the base's dtype and of fp32 as drawn."""
    return [trip for case in cases(family, dtype, count, seed) for trip in trips(family, case)]


def twins(family: str, case: Case) -> Iterator[Case]:
    """Return the case with the adapter in the base's dtype, and in fp32 where that differs."""
    yield replace(case, adapter_dtype=case.sweep.dtype)
    if case.sweep.dtype in ("bfloat16", "float16"):
        yield replace(case, adapter_dtype="float32")


def main(count: int) -> None:
    """Print the worst ratio for each family, dtype, adapter dtype and layer kind."""
    torch.set_num_threads(1)
    for family in LAYERS:
        for dtype in DTYPES:
            drawn = (twin for case in cases(family, dtype, count) for twin in twins(family, case))
            found = [trip for case in drawn for trip in trips(family, case)]
            for mixed in sorted({trip.mixed for trip in found}):
                own = [trip for trip in found if trip.mixed is mixed]
                rest = [trip for trip in own if not trip.exact]
                worst = {kind: max((t.ratio for t in rest if t.layer == kind), default=0.0) for kind in LAYERS[family]}
                name = f"{family} {dtype}" + (" with fp32 adapter" if mixed else "")
                exact = max((trip.ratio for trip in own if trip.exact), default=0.0)
                print(f"{name}: {len(own)} cases, {len(own) - len(rest)} exact with worst {exact}")
                print(f"  worst {max(worst.values()):.4f}: " + ", ".join(f"{k} {r:.3f}" for k, r in worst.items()))
                if family == "scaling":
                    print(f"  with the documented divisor {max(t.documented for t in own):.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
