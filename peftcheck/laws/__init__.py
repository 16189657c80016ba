"""The laws, one module per group; importing this package registers them all."""

from __future__ import annotations

from peftcheck.laws import (
    attach,
    combine,
    combine_state,
    combine_truncation,
    forward,
    forward_paths,
    merge,
    merge_paths,
    merge_state,
    quantize,
    quantize_refuse,
    quantize_safe,
    quantize_state,
    refuse,
    safe_merge,
    train,
    train_modes,
    state,
    state_delete,
    state_tied,
)

__all__ = [
    "attach",
    "combine",
    "combine_state",
    "combine_truncation",
    "forward",
    "forward_paths",
    "merge",
    "merge_paths",
    "merge_state",
    "quantize",
    "quantize_refuse",
    "quantize_safe",
    "quantize_state",
    "refuse",
    "safe_merge",
    "train",
    "train_modes",
    "state",
    "state_delete",
    "state_tied",
]
