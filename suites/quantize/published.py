"""Reproduce bitsandbytes' own table for N(0, 1), and what double quantization costs and saves.

python suites/quantize/published.py
"""

from __future__ import annotations

import torch
from scene import show
from torch import nn

from peftcheck import quantizers
from peftcheck.record import Table

# bitsandbytes, tests/test_functional.py (mean absolute error, mean relative error)
PUBLISHED = {
    ("nf4", 64): (0.0728, 0.203), ("nf4", 128): (0.0768, 0.2153), ("nf4", 256): (0.0803, 0.2260),
    ("nf4", 512): (0.0835, 0.2360), ("fp4", 64): (0.0965, 0.2601),
}  # fmt: skip
SAMPLES, SIZE = 40, 1024


def held(name: str, weight: torch.Tensor, block: int) -> nn.Module:
    """Return a quantized layer."""
    model = nn.Module()
    model.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.layer.weight = nn.Parameter(weight, requires_grad=False)
    quantizers.load(name).quantize(model, "layer", {"blocksize": block})
    return model.layer


def errors() -> Table:
    """Quantize samples of N(0, 1), decode them independently, and compare with what is published."""
    rows = []
    for (kind, block), (absolute, relative) in PUBLISHED.items():
        torch.manual_seed(0)
        found = torch.zeros(2, dtype=torch.float64)
        for _ in range(SAMPLES):
            weight, quantizer = torch.randn(SIZE, SIZE), quantizers.load(f"bitsandbytes.{kind}")
            miss = (quantizer.decoded(held(f"bitsandbytes.{kind}", weight, block)).value - weight).abs()
            found += torch.stack([miss.mean(), (miss / (weight.abs().double() + 1e-8)).mean()]) / SAMPLES
        rows.append(
            (
                kind,
                block,
                float(found[0]),
                absolute,
                f"{float(found[0]) - absolute:+.5f}",
                float(found[1]),
                relative,
                f"{float(found[1]) - relative:+.5f}",
            )
        )
    columns = ("grid", "block", "mean error", "published", "off", "mean relative", "published ", "off ")
    return Table(
        "N(0, 1), independent decoding", columns, tuple(rows), "the mean relative error has a heavy tail: 1 / abs(x)"
    )


def bits() -> Table:
    """Count the stored bits for each parameter."""
    rows, weight = [], torch.randn(SIZE, SIZE)
    for name in ("bitsandbytes.int8", "bitsandbytes.nf4", "bitsandbytes.nf4.double"):
        tensors = quantizers.load(name).tensors(held(name, weight, 64))
        scale = sum(t.numel() * t.element_size() * 8 for key, t in tensors.items() if key != "weight") / weight.numel()
        codes = tensors["weight"].numel() * tensors["weight"].element_size() * 8 / weight.numel()
        rows.append((name, codes, scale, codes + scale))
    return Table("bits per parameter, blocks of 64", ("quantizer", "codes", "scales", "all"), tuple(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    show(errors())
    show(bits())
