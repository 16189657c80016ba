"""A state machine over a library's operations: Hypothesis chooses them, and shrinks what breaks to the shortest sequence.

    TestLife = peftcheck.machine.life("mylib.port:MyLibrary").TestCase

Every step is judged by the same expectation as the law `state.sequence`, and a failure prints a token that replays it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from peftcheck import engine, strategies
from peftcheck import implementation as port
from peftcheck.case import Case, encode
from peftcheck.engine import Scene, judge
from peftcheck.implementation import Implementation
from peftcheck.law import laws
from peftcheck.laws.sequence import sound
from peftcheck.operations import do
from peftcheck.outcome import Outcome
from peftcheck.programs import KINDS, Step
from peftcheck.sequence import Play

LAW = "state.sequence"
Absorbs = Callable[[Outcome, Case], object]
SETTINGS = settings(deadline=None, max_examples=100, stateful_step_count=20)


class Broken(AssertionError):
    """A step after which something is not as it must be: the steps so far, what was measured, and a token."""


def life(
    target: str | Implementation,
    variant: str | None = None,
    layer: str | None = None,
    dtype: str | None = None,
    absorbs: Absorbs = lambda outcome, case: None,
) -> type[RuleBasedStateMachine]:
    """Return a state machine class for a library; where variant, layer or dtype are given, for these alone.

    `absorbs(outcome, case)` returns something true for a failure that is known: the sequence then ends there.
    Raises UsageError for an unknown target, and where no sweep is left.
    """
    library = port.load(target) if isinstance(target, str) else target
    law = laws(LAW)[0]
    strategies.sweeps(library, variant, layer, dtype)  # says now, and not within a test, that there is none

    class Life(RuleBasedStateMachine):
        """One model with its adapters, from attaching to the end."""

        played: int = 0  # steps carried out by all machines of this class

        @initialize(case=strategies.cases(library, variant, layer, dtype))
        def attach(self, case: Case) -> None:
            self.exits = ExitStack()
            self.exits.enter_context(engine.pinned())
            self.scene = Scene(library, case)
            failure = self.scene.attach()
            assume(failure is None)  # refuse.attach and the laws on attached models speak of that
            self.play = self.exits.enter_context(Play(self.scene.stage, sound(self.scene.stage), partial=False))
            self.steps: list[Step] = []

        @rule(data=st.data(), kind=st.sampled_from(KINDS))
        def step(self, data, kind: str) -> None:
            if self.play.over:
                return
            step = data.draw(strategies.steps(kind, len(self.scene.case.adapters)))
            before = len(self.play.steps)
            try:
                outcome = judge(law, self.scene.stage, do(self.play, step))
            except Exception as error:
                self.scene.library_only(error)
                outcome = self.scene.crashed(LAW, error)
            if len(self.play.steps) > before or outcome.failed:
                self.steps.append(step)
                type(self).played += 1
            if outcome.failed:
                self.play.over = True
                case = replace(self.scene.case, extra=(*self.scene.case.extra, ("steps", tuple(self.steps))))
                if not absorbs(outcome, case):
                    told = "\n  ".join(self.play.steps)
                    raise Broken(f"{outcome.message}\n  {told}\nreproduce with: peftcheck replay {encode(case, LAW)}")

        @invariant()
        def holds(self) -> None:
            """Nothing more: every step has judged everything already."""

        def teardown(self) -> None:
            if hasattr(self, "exits"):
                self.exits.close()

    Life.TestCase.settings = SETTINGS
    return Life
