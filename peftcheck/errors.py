"""The exceptions that decide an exit code."""

from __future__ import annotations


class UsageError(Exception):
    """Say in one line what the caller must do differently; exit code 2."""


class HarnessError(Exception):
    """Say that the harness itself cannot vouch for a result; exit code 3."""
