"""Programs: sequences of operations as plain data, drawn from a case's seed, and in words."""

from __future__ import annotations

import random
from collections.abc import Sequence

from peftcheck.case import Case

Step = tuple
"""An operation by name and its arguments: adapters as indices into the case's, switches, factors."""

_WEIGHTS = {
    "forward": 4,
    "activate": 3,
    "merge": 6,
    "unmerge": 3,
    "disable": 1,
    "enable": 1,
    "rescale": 2,
    "delete": 2,
    "add": 2,
    "save": 1,
    "load": 1,
    "train": 1,
}
KINDS = (*_WEIGHTS, "unload", "export")
FACTORS = (0.5, 2.0, 4.0, 1.0)
LENGTH = 10


def program(case: Case) -> tuple[Step, ...]:
    """Return the case's own steps, or those that follow from its seed: `LENGTH` of them and perhaps an export."""
    own = case.setting("steps")
    if own is not None:
        return own
    rng = random.Random(f"steps|{case.values}|{case.index}")
    steps = [
        draw(rng, rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0], len(case.adapters)) for _ in range(LENGTH)
    ]
    if (last := rng.random()) < 0.4:
        steps.append(("export", last < 0.1) if last < 0.2 else ("unload",))
    return tuple(steps)


def draw(rng: random.Random, kind: str, adapters: int) -> Step:
    """Return a step of a kind with drawn arguments."""
    if kind in ("activate", "merge"):
        some = tuple(rng.sample(range(adapters), rng.randint(1, adapters)))
        if kind == "activate":
            return (kind, some)
        return (kind, some if rng.random() < 0.75 else (), rng.random() < 0.4)
    if kind == "forward":
        return (kind, True) if rng.random() < 0.3 else (kind,)
    if kind == "rescale":
        return (kind, rng.randrange(adapters), rng.choice(FACTORS))
    if kind in ("delete", "add", "save", "load"):
        return (kind, rng.randrange(adapters))
    return (kind,)


def words(step: Step, names: Sequence[str]) -> str:
    """Say a step as a call: merge('a', 'b', safe); merge() is of what is active."""
    kind, *arguments = step
    shown = []
    for argument in arguments:
        if isinstance(argument, tuple):
            shown += [repr(names[index % len(names)]) for index in argument]
        elif isinstance(argument, bool):
            shown += ["in training" if kind == "forward" else "safe"] if argument else []
        elif isinstance(argument, int):
            shown.append(repr(names[argument % len(names)]))
        else:
            shown.append(f"{argument:g}")
    return f"{kind}({', '.join(shown)})"
