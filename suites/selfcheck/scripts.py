"""Run a standalone script as its reader would, in this interpreter."""

from __future__ import annotations

import contextlib
import io

from peftcheck import engine


def execute(text: str) -> tuple[int, str]:
    """Run a script in this interpreter; return its exit code and what it printed."""
    out = io.StringIO()
    with engine.pinned(), contextlib.redirect_stdout(out):
        try:
            exec(compile(text, "script", "exec"), {"__name__": "__main__"})
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue()
    return 0, out.getvalue()
