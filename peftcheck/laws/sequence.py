"""What happens between a merge and an unmerge: operations in an order that nobody tests."""

from __future__ import annotations

from collections.abc import Sequence

from peftcheck.case import Case
from peftcheck.implementation import Inverts, Op, Variant
from peftcheck.law import law
from peftcheck.measurement import NOTHING, Measurement, worst
from peftcheck.operations import play, steps
from peftcheck.programs import Step, program
from peftcheck.sequence import Play
from peftcheck.stage import Stage

LENGTHENING = frozenset({"merge", "train"})
"""Operations after which a layer with a `max_norm` may find its own rows too long, and rightly shortens them."""


Programs = list[list[Step]]


def _every(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.adapters)))


def sound(stage: Stage) -> bool:
    """Return whether one plain merge and unmerge holds here: where it does not, other laws say so.

    Then sequences are judged by what must not change, and not by closed forms. Raises what the library raises.
    """
    if "operations" not in stage.plain:
        plain = [("forward",), ("merge", _every(stage.case), False), ("forward",), ("unmerge",), ("forward",)]
        stage.plain["operations"] = _played(stage, [plain], True).holds
    return stage.plain["operations"]


def _played(stage: Stage, programs: Sequence[Sequence[Step]], numeric: bool) -> Measurement:
    """Play programs one after the other, each of which leaves things as it found them; after a failure from the start."""
    found: list[Measurement] = []
    waiting = list(programs)
    while waiting:
        with Play(stage, numeric) as one:
            while waiting and all(measured.holds for measured in found[-1:]):
                found.append(steps(one, waiting.pop(0)))
        stage.put_back()
        if waiting:
            found.append(NOTHING)
    return worst(found)


def _several_played(stage: Stage, name: str) -> Measurement | None:
    if len(stage.names) == 1:
        return None
    return _played(stage, programs_of(name, stage.case), sound(stage))


def programs_of(name: str, case: Case) -> Programs:
    """Return the programs that a law of sequences plays on a case, one after the other."""
    if name == "state.sequence":
        return [list(program(case))]
    every, last = _every(case), len(case.adapters) - 1
    merge, unmerge, forward = ("merge", every, case.safe), ("unmerge",), ("forward",)
    if name == "merge.guarded":
        return [
            [merge, merge, unmerge],
            [unmerge],
            [merge, ("activate", (last,)), unmerge, ("activate", every)],
            [merge, ("rescale", 0, 2.0), unmerge, ("rescale", 0, 1.0)],
            [merge, ("disable",), forward, ("enable",), unmerge],
            [merge, ("delete", last), unmerge, ("add", last), ("activate", every)],
            [("delete", last), merge, ("add", last), unmerge, ("activate", every), forward],
        ]
    if name == "merge.subset":
        return [
            [("merge", (last,), case.safe), merge, unmerge],
            [("activate", (0,)), ("merge", (last,), case.safe), unmerge, ("activate", every)],
            [("merge", (0,), case.safe), forward, unmerge, forward],
        ]
    backwards = tuple(reversed(every))
    one_by_one = [[("merge", (index,), case.safe) for index in some] for some in (every, backwards)]
    return [[("merge", backwards, case.safe), unmerge], [*one_by_one[0], unmerge], [*one_by_one[1], unmerge]]


def _inverts(variant: Variant) -> bool:
    return variant.inverts is not Inverts.NEVER


def _shared(variant: Variant, case: Case) -> bool:
    return len(case.adapters) > 1


def _several(variant: Variant) -> bool:
    return _inverts(variant) and variant.most_adapters > 1


@law(
    "merge.guarded",
    "merged twice, unmerged twice, activated, rescaled, deleted or added to while merged: refused, or unmerge still restores",
    (Op.FORWARD, Op.MERGE, Op.UNMERGE),
    "set_scale on a merged LoRA, after which unmerge subtracts another delta than merge had added",
    concerns=_inverts,
    logic=True,
)
def guarded(stage: Stage) -> Measurement | None:
    """Do between merge and unmerge what nobody should, one thing at a time."""
    if stage.shortens:
        return None  # some of this leads to rows that a forward pass may rightly shorten
    return _played(stage, programs_of("merge.guarded", stage.case), sound(stage))


@law(
    "merge.subset",
    "with some of several adapters merged, weights, bookkeeping and outputs are those of what is merged and what is active",
    (Op.FORWARD, Op.MERGE, Op.UNMERGE),
    "a merged layer that no longer runs the active adapters which are not merged",
    concerns=_several,
    cases=_shared,
    logic=True,
)
def subset(stage: Stage) -> Measurement | None:
    """Merge the first of several adapters, then the others on top, then the last alone."""
    return _several_played(stage, "merge.subset")


@law(
    "merge.order",
    "several adapters merged in any order, in one call or one by one, give the closed form of that order, and come off again",
    (Op.FORWARD, Op.MERGE, Op.UNMERGE),
    "an unmerge that undoes several merges first in, first out, or only the last of them",
    concerns=_several,
    cases=_shared,
    logic=True,
)
def order(stage: Stage) -> Measurement | None:
    """Merge backwards in one call, then one by one in both orders."""
    return _several_played(stage, "merge.order")


@law(
    "state.sequence",
    "after each step of a random sequence of operations weights, adapters, bookkeeping and outputs are what they must be",
    (Op.FORWARD,),
    "one adapter removed while another was merged, rescaled while merged, trained, saved, reloaded, exported",
    on="both",
    logic=True,
)
def sequence(stage: Stage) -> Measurement | None:
    """Play the case's program, against an expectation that is kept outside the library.

    Outputs of layers into which some of the active adapters are merged are left to merge.subset.
    """
    own = program(stage.case)
    if stage.shortens and {step[0] for step in own} & LENGTHENING:
        return None
    return play(stage, own, sound(stage), partial=False)
