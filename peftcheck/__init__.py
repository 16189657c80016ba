"""A conformance suite for libraries of parameter-efficient fine-tuning adapters."""

from __future__ import annotations

from peftcheck.plugin import parametrize

__version__ = "0.1.0"
__all__ = ["__version__", "parametrize"]
