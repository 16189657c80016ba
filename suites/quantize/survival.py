"""Below the step: how much of a delta survives a merge, by its size relative to the grid's step.

    python suites/quantize/survival.py [--quantizer NAME ...]

The step at an element is twice b(W), what rounding to the grid may cost there.
"""

from __future__ import annotations

import argparse

import torch
from scene import delta, dense, names, rescaled, show, staged

from peftcheck.laws.quantize import chosen, rule
from peftcheck.record import Table

SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def survival(name: str) -> Table:
    """Merge deltas of each size and measure what became of them."""
    rows = []
    for size in SIZES:
        cosine, changed, kept, error = [], [], [], []
        for seed in range(3):
            stage = staged(name, seed)
            start = dense(stage)
            step = 2 * rule(stage, chosen=[chosen(stage)["layer"]])(start, torch.zeros_like(start))
            rescaled(stage, size * float(step.square().mean().sqrt()) / float(delta(stage).square().mean().sqrt()))
            due = delta(stage)
            stage.attached.merge(("default",))
            moved = dense(stage) - start
            norm = float(torch.linalg.vector_norm(moved) * torch.linalg.vector_norm(due))
            cosine.append(float((moved * due).sum()) / norm if norm else 0.0)
            changed.append(float((moved.abs() > 0.25 * step).double().mean()))
            kept.append(float((moved * due).sum() / due.square().sum()))
            error.append(float(torch.linalg.vector_norm(moved - due) / torch.linalg.vector_norm(due)))
        rows.append((size, *(sum(values) / len(values) for values in (cosine, changed, kept, error))))
    columns = ("rms delta / step", "cosine", "share of codes changed", "share of the delta kept", "error / delta")
    return Table(name, columns, tuple(rows))


def main() -> None:
    """Print a table for each quantizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantizer", action="append")
    torch.set_num_threads(1)
    for name in names(parser.parse_args().quantizer):
        show(survival(name))


if __name__ == "__main__":
    main()
