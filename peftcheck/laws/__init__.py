"""The laws, one module per group; importing this package registers them all."""

from __future__ import annotations

from peftcheck.laws import forward, merge, merge_state, refuse, safe_merge

__all__ = ["forward", "merge", "merge_state", "refuse", "safe_merge"]
