"""The figures of weighted combinations that a hand computation gives, measured on the installed PEFT.

    python suites/combine/figures.py

Five hand tests for every kind: a single adapter at -1; two identical at [1, -1]; two different at [1, -1]; three at
[2, -1, 0.5]; and two at [1, 1] whose true and cross terms lie in disjoint places. Adapters of rank 4 on a linear layer
12 -> 12 in float32; errors are relative to sum w_i D_i in fp64 (where nothing is due: norms), kinds that prune keep
everything. With the interpreter of another environment it measures that environment's PEFT: 0.18.1 put the sign of a
negative weight on both factors, and `combine.single` is violated there.
"""

from __future__ import annotations

import torch

from peftcheck import combination as combining
from peftcheck import engine, law
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.implementations.peft import Peft
from peftcheck.oracle.combination import KINDS, tail
from peftcheck.staging import set_up

HAND = {
    "single [-1]": ((-1.0,), "normal"),
    "identical [1, -1]": ((1.0, -1.0), "duplicated"),
    "two [1, -1]": ((1.0, -1.0), "normal"),
    "three [2, -1, .5]": ((2.0, -1.0, 0.5), "normal"),
    "probes [1, 1]": ((1.0, 1.0), "probe"),
}


def case(kind: str, weights: tuple[float, ...], profile: str = "normal", **options) -> Case:
    """Return the case of one hand test."""
    if KINDS[kind].prunes:
        options["density"] = 1.0
    adapters = tuple(AdapterSpec(name, (0,), 4, 4.0) for name in ("a", "b", "c")[: len(weights)])
    extra = {"kind": kind, "weights": weights, "members": tuple(range(len(weights))), **options}
    layer = LayerSpec("proj", "linear", 12, 12)
    return Case(
        Sweep("peft", "lora", "linear", "float32"),
        0,
        0,
        (layer,),
        adapters,
        "float32",
        profile,
        7,
        extra=tuple(sorted(extra.items())),
    )


def measured(peft: Peft, asked_case: Case) -> tuple[float, float, int]:
    """Return the relative error of the combined delta, the least that its rank allows, and its rank."""
    with engine.pinned():
        torch.manual_seed(asked_case.values)
        stage = set_up(peft, asked_case)
        asked = combining.requested(asked_case)
        made = combining.snapshot(stage, combining.combine(stage, asked))
        due = combining.total(stage, asked, "proj", plain=True)["weight"].value
        found = combining.outcome(stage, made, "proj")["weight"].value
        rank = made.tensors["proj"]["A"].shape[0]
    size = float(due.norm()) or 1.0
    return float((found - due).norm()) / size, tail(due, rank) / size, rank


def judged(peft: Peft, name: str, asked_case: Case) -> str:
    """Return what a law says of a case, in a line."""
    (outcome,) = engine.check(peft, asked_case, law.laws(name))
    return f"{outcome.status}" + (
        f": {outcome.message}" if outcome.failed else f", ratio {outcome.measurement.ratio:.3g}"
    )


def main() -> None:
    """Print every figure."""
    peft = Peft()
    print(f"PEFT {peft.version}: relative error of the combined delta, by kind and hand test")
    print(f"{'kind':<22}" + "".join(f"{name:>20}" for name in HAND))
    for kind in KINDS:
        row = [f"{measured(peft, case(kind, weights, profile))[0]:.2g}" for weights, profile in HAND.values()]
        print(f"{kind:<22}" + "".join(f"{text:>20}" for text in row))
    print("\nsvd of two adapters of rank 4 at [1, -1]: error, and the least of any matrix of that rank (Eckart, Young)")
    for rank in (4, 8):
        error, least, stored = measured(peft, case("svd", (1.0, -1.0), svd_rank=rank))
        verdict = judged(peft, "combine.best_rank", case("svd", (1.0, -1.0), svd_rank=rank))
        print(f"  rank {stored}: {error:.3g}, least {least:.3g}; combine.best_rank {verdict}")
    print("\ncombine.linear, two different at [1, -1]")
    for kind in ("linear", "cat"):
        print(f"  {kind}: {judged(peft, 'combine.linear', case(kind, (1.0, -1.0)))}")
    for weights in ((1.0, 1.0), (2.0, -1.0, 0.5)):
        print(f"\ncombine.cross_term_free, probes at {list(weights)}")
        print(f"  linear: {judged(peft, 'combine.cross_term_free', case('linear', weights, 'probe'))}")
    print("\ncombine.single, one adapter at [-1.0]")
    print(f"  linear: {judged(peft, 'combine.single', case('linear', (-1.0,)))}")


if __name__ == "__main__":
    main()
