"""A step of shrinking: a case made simpler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftcheck.case import Case
from peftcheck.implementation import Variant


@dataclass(frozen=True)
class Candidate:
    """A simpler case, and what it says if the law holds on it ('' where that says nothing).

    `shrinks`: whether there is less of something, so that other values are worth a try.
    """

    case: Case
    words: str
    shrinks: bool = True


Reduction = Callable[[Case, Variant], Sequence[Candidate]]


def smaller(value: int, least: int = 1) -> tuple[int, ...]:
    """Return smaller whole numbers to try: the least, the next, half, one less."""
    return tuple(sorted({n for n in (least, least + 1, value // 2, value - 1) if least <= n < value}))
