"""Compute, from shapes alone, what RandLoRA checkpoints of a 4-billion-parameter model weigh.

    python suites/state/randlora_checkpoint.py [--rank 32] [--bytes 4]

A report said that saved projections inflate checkpoints to about 42 GB on a model of 4 billion parameters
(huggingface/peft#3227). RandLoRA (Albert et al., 2025) freezes a pair of random bases, shared by all layers: with the
largest input n and output m among the targets, A has r x 1 x min(n, m) entries and B has max(n, m) x N x r, where
N = ceil(min(n, m) / r). A layer of in i and out o trains lambda (r x k) and gamma (k x min(i, o)),
k = ceil(min(i, o) / r). Written once the bases are cheap; PEFT 0.21.2 writes them once more for each layer.
Prints a line per set of targets: values trained, bases once, bases per layer, in bytes, and the ratio.
"""

from __future__ import annotations

import argparse
from math import ceil

HIDDEN, INTERMEDIATE, LAYERS = 2560, 9728, 36  # the shapes of Qwen3-4B, as its configuration has them
HEADS, GROUPS, HEAD = 32, 8, 128
ATTENTION = {
    "q_proj": (HIDDEN, HEADS * HEAD),
    "k_proj": (HIDDEN, GROUPS * HEAD),
    "v_proj": (HIDDEN, GROUPS * HEAD),
    "o_proj": (HEADS * HEAD, HIDDEN),
}
MLP = {"gate_proj": (HIDDEN, INTERMEDIATE), "up_proj": (HIDDEN, INTERMEDIATE), "down_proj": (INTERMEDIATE, HIDDEN)}
TARGETS = {
    "q, v": {name: ATTENTION[name] for name in ("q_proj", "v_proj")},
    "attention": ATTENTION,
    "mlp": MLP,
    "all linear": {**ATTENTION, **MLP},
}


def trained(shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Return how many values the layers of one block train."""
    sides = [min(shape) for shape in shapes.values()]
    return sum(ceil(side / rank) * (rank + side) for side in sides)


def bases(shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Return how many values the shared bases have."""
    n, m = (max(shape[side] for shape in shapes.values()) for side in (0, 1))
    short, long = min(n, m), max(n, m)
    return rank * short + long * ceil(short / rank) * rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=4, help="bytes of a value: 4 for float32")
    options = parser.parse_args()
    print(f"Qwen3-4B, rank {options.rank}, {options.bytes} bytes a value; GB = 10^9 bytes")
    print(f"{'targets':12} {'layers':>6} {'trained GB':>11} {'with bases once':>16} {'as written':>11} {'ratio':>7}")
    for name, shapes in TARGETS.items():
        count = LAYERS * len(shapes)
        own = LAYERS * trained(shapes, options.rank) * options.bytes / 1e9
        once = bases(shapes, options.rank) * options.bytes / 1e9
        written = own + (count + 1) * once  # a reference per layer, and the model's own
        print(f"{name:12} {count:6} {own:11.3f} {own + once:16.3f} {written:11.2f} {written / own:7.0f}")


if __name__ == "__main__":
    main()
