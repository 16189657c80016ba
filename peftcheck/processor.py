"""What the processor can do, as far as a library computes otherwise for it: names that a ledger may ask for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

# name: (as torch tells it, as Linux tells it)
FEATURES = {"avx512": ("avx512_f", "avx512f"), "avx512_bf16": ("avx512_bf16", "avx512_bf16")}


@functools.cache
def features() -> frozenset[str]:
    """Return the names of `FEATURES` that this processor has: asked of torch where it tells, else of Linux."""
    told = getattr(torch.cpu, "get_capabilities", None)
    if told is not None:
        found = told()
        return frozenset(name for name, (key, _) in FEATURES.items() if found.get(key))
    return flagged(Path("/proc/cpuinfo"))


def flagged(path: Path) -> frozenset[str]:
    """Return the names of `FEATURES` among the flags of a file like Linux's cpuinfo; none where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(name for name, (_, flag) in FEATURES.items() if flag in flags)
