"""Whose error it is, and whether it is a clear refusal."""

from __future__ import annotations

import ast
import traceback
from functools import lru_cache
from pathlib import Path

from peftcheck.implementation import Implementation

_CRASHES = (
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    UnboundLocalError,
    NameError,
    ImportError,
    RecursionError,
)


def innermost(error: BaseException, folders: tuple[Path, ...]) -> traceback.FrameSummary | None:
    """Return the innermost frame of the error that lies in the library's own source, or None."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if any(Path(f.filename).is_relative_to(folder) for folder in folders)]
    return inside[-1] if inside else None


def is_library(error: BaseException, implementation: Implementation) -> bool:
    """Return whether the error passed through the library's source (else it is the harness's own)."""
    return innermost(error, implementation.folders) is not None


def is_refusal(error: BaseException, implementation: Implementation) -> bool:
    """Return whether the error is a clear refusal.

    It is raised by a `raise` statement in the library's own file, is not of a kind that stands for a crash, and
    says something.
    """
    if isinstance(error, _CRASHES) or not isinstance(error, Exception) or not str(error).strip():
        return False
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not any(Path(frames[-1].filename).is_relative_to(f) for f in implementation.folders):
        return False
    return (frames[-1].lineno or 0) in _raising_lines(frames[-1].filename)


@lru_cache(maxsize=256)
def _raising_lines(path: str) -> frozenset[int]:
    """Return the lines of a source file that belong to `raise` statements, which may span several."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Raise))
    return frozenset(line for node in found for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))


def where(error: BaseException, implementation: Implementation) -> str:
    """Return type and innermost library frame of an error, as a fingerprint names them: no line numbers."""
    frame = innermost(error, implementation.folders)
    place = f"{Path(frame.filename).name}:{frame.name}" if frame else "outside the library"
    return f"{type(error).__name__} in {place}"
