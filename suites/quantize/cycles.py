"""Drift: the error after 1, 10 and 100 cycles of merge and unmerge, against what the grid implies.

python suites/quantize/cycles.py [--quantizer NAME ...]
"""

from __future__ import annotations

import argparse

import torch
from scene import delta, dense, names, rescaled, show, staged

from peftcheck.budgets import quantized
from peftcheck.laws.quantize import chosen, rule
from peftcheck.record import Table

AT = (1, 10, 100)


def drift(listed: list[str], spread: float, title: str) -> Table:
    """Cycle a LoRA whose factors are `spread` times those of the profile, and compare with the start."""
    rows = []
    for name in listed:
        stage = staged(name, 7)
        rescaled(stage, spread)
        start, found, grids = dense(stage), {}, []
        for cycle in range(1, max(AT) + 1):
            stage.attached.merge(("default",))
            grids.append(chosen(stage)["layer"])
            stage.attached.unmerge()
            grids.append(chosen(stage)["layer"])
            if cycle in AT:
                found[cycle] = dense(stage) - start
        b, sites = rule(stage, chosen=grids[:2]), stage.sites("layer")
        once = quantized.cycled(stage.machine, stage.formula, sites, stage.base("layer"), b, 1)["weight"].bound
        rms = [float(e.square().mean().sqrt()) for e in found.values()]
        worst = [float((e.abs() / once).max()) for e in found.values()]
        rows.append(
            (name, *rms, *worst, float(once.square().mean().sqrt()), float(delta(stage).square().mean().sqrt()))
        )
    columns = (
        "quantizer",
        *(f"rms {k}" for k in AT),
        *(f"worst/b {k}" for k in AT),
        "rms of b(T)+b(U)",
        "rms of the delta",
    )
    return Table(
        title,
        columns,
        tuple(rows),
        "worst/b: the largest error over the budget of ONE round trip; the law allows k times it",
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantizer", action="append")
    listed = names(parser.parse_args().quantizer)
    torch.set_num_threads(1)
    show(drift(listed, 1.0, "a delta as large as the weights"))
    show(drift(listed, 0.02, "a delta of 2 % of that"))
    show(drift(listed, 0.0, "no delta at all: what the grid does by itself"))


if __name__ == "__main__":
    main()
