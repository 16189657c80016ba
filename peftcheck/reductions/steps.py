"""Fewer and plainer steps of a sequence."""

from __future__ import annotations

from dataclasses import replace

from peftcheck.case import Case
from peftcheck.implementation import Variant
from peftcheck.programs import program, words
from peftcheck.reductions.candidate import Candidate


def fewer_steps(case: Case, variant: Variant) -> list[Candidate]:
    """Keep the first half of the steps, or the last, or leave one out; name fewer adapters in each."""
    steps = program(case)
    if len(steps) < 2 and case.setting("steps") is not None:
        return []
    names = [adapter.name for adapter in case.adapters]
    half = len(steps) // 2
    found = [(steps[:half], ""), (steps[half:], "")] if half else []
    found += [(steps[:i] + steps[i + 1 :], f"without {words(step, names)} it holds") for i, step in enumerate(steps)]
    for i, (kind, *arguments) in enumerate(steps):
        if arguments and isinstance(arguments[0], tuple) and len(arguments[0]) > 1:
            fewer = [(kind, arguments[0][:j] + arguments[0][j + 1 :], *arguments[1:]) for j in range(len(arguments[0]))]
            found += [((*steps[:i], step, *steps[i + 1 :]), "") for step in fewer]
        if arguments and arguments[-1] is True:
            found.append(((*steps[:i], (kind, *arguments[:-1], False), *steps[i + 1 :]), ""))
    rest = tuple(item for item in case.extra if item[0] != "steps")
    return [
        Candidate(replace(case, extra=tuple(sorted((*rest, ("steps", less))))), text) for less, text in found if less
    ]
