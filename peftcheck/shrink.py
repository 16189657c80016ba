"""Make a failing case small: a greedy walk over its fields that keeps the fingerprint.

Values are functions of (seed, role, coordinates), so a smaller shape keeps the values it still has: each step
changes one thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from peftcheck import reductions
from peftcheck.case import Case, encode
from peftcheck.errors import HarnessError
from peftcheck.implementation import Implementation, Variant
from peftcheck.law import Law
from peftcheck.outcome import PASS, Outcome
from peftcheck.reductions.candidate import Candidate

Check = Callable[[Implementation, Case, Sequence[Law]], Sequence[Outcome]]
SEEDS = (0, 1, 2, 3)
# Failures that no value in a tensor makes or breaks: other seeds would only cost checks.
_VALUELESS = ("shape", "dtype", "strides")


@dataclass(frozen=True)
class Shrunk:
    """A shrunk case: its outcome, what the walk showed at the border, and its cost.

    `elements` counts the elements of the weights that adapters target, `before` those of the first case.
    `steps` are clauses such as 'kernel 1x1 holds; 2x2 violates' or 'without bias it holds'.
    """

    case: Case
    outcome: Outcome
    steps: tuple[str, ...]
    checks: int
    elements: int
    before: int

    @property
    def ratio(self) -> float | None:
        """The ratio of the shrunk case, None where it crashes."""
        return self.outcome.measurement.ratio if self.outcome.measurement else None


def elements(case: Case) -> int:
    """Return how many elements the targeted weights have."""
    targeted = {target for adapter in case.adapters for target in adapter.targets}
    return sum(math.prod(case.layers[target].weight_shape) for target in targeted)


def shrink(
    implementation: Implementation, case: Case, law: Law, fingerprint: str, check: Check, limit: int = 200
) -> Shrunk:
    """Return a small case that fails the law with the same fingerprint; deterministic, at most `limit` checks.

    Raises ValueError if the case itself does not.
    """
    walk = _Walk(implementation, implementation.variants()[case.sweep.variant], law, fingerprint, check, limit)
    first = walk.probe(case)
    if first is None or first.fingerprint != fingerprint:
        raise ValueError(f"nothing to shrink: {law.name} does not fail with '{fingerprint}' on this case")
    best = walk.descend(case)
    return Shrunk(best, walk.seen[encode(best, "")], walk.steps(best), walk.checks, elements(best), elements(case))


def over_dtypes(implementation: Implementation, case: Case, law: Law, check: Check) -> dict[str, float | None]:
    """Return the law's ratio on the same values in each dtype of the variant; None where it crashes or says nothing.

    An adapter in the base's dtype follows it; one in fp32 on a half base stays so, and follows elsewhere.
    """
    ratios: dict[str, float | None] = {}
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        if dtype not in implementation.variants()[case.sweep.variant].dtypes:
            continue
        apart = case.adapter_dtype != case.sweep.dtype and dtype in ("bfloat16", "float16")
        other = replace(case, sweep=replace(case.sweep, dtype=dtype), adapter_dtype="float32" if apart else dtype)
        (outcome,) = check(implementation, other, [law])
        ratios[dtype] = outcome.measurement.ratio if outcome.measurement else None
    return ratios


class _Walk:
    """The state of one shrinking: what was tried, and what came of it."""

    def __init__(
        self,
        implementation: Implementation,
        variant: Variant,
        law: Law,
        fingerprint: str,
        check: Check,
        limit: int,
    ) -> None:
        self.implementation = implementation
        self.variant = variant
        self.law = law
        self.fingerprint = fingerprint
        self.check = check
        self.limit = limit
        self.checks = 0
        self.seen: dict[str, Outcome | None] = {}
        self.visited: set[str] = set()

    def probe(self, case: Case) -> Outcome | None:
        """Return the outcome on a case, None where the case cannot be (or the limit is reached)."""
        key = encode(case, "")
        if key in self.seen:
            return self.seen[key]
        if self.checks >= self.limit:
            return None
        self.checks += 1
        try:
            (outcome,) = self.check(self.implementation, case, [self.law])
        except HarnessError:
            outcome = None  # torch refuses such a layer, or the harness such a case: no reproduction
        self.seen[key] = outcome
        return outcome

    def fitted(self, case: Case) -> Case:
        """Return the case with layers and options that are valid for the variant."""
        exact, variant = case.profile == "dyadic", self.variant
        layers = case.layers if case.whole else tuple(variant.admit(spec) for spec in case.layers)
        adapters = tuple(variant.fit(adapter, layers, exact) for adapter in case.adapters)
        return replace(case, layers=layers, adapters=variant.fit_all(adapters, layers))

    def shows(self, case: Case) -> bool:
        """Return whether a case that was not the best before shows the same failure."""
        if encode(case, "") in self.visited:
            return False
        outcome = self.probe(case)
        return outcome is not None and outcome.fingerprint == self.fingerprint

    def descend(self, case: Case) -> Case:
        """Walk until no candidate fails alike: with the values at hand, then with four other seeds."""
        best, seeds_help = (
            case,
            not self.fingerprint.startswith("crash|") and not self.fingerprint.endswith(_VALUELESS),
        )
        self.visited.add(encode(best, ""))
        while True:
            best = self._pass(best)
            smaller = self._reseeded(best) if seeds_help else None
            if smaller is None:
                break
            best = smaller
            self.visited.add(encode(best, ""))
        tidy = next((c for c in (replace(best, values=v) for v in SEEDS if v < best.values) if self.shows(c)), best)
        self.visited.add(encode(tidy, ""))
        return tidy

    def _pass(self, best: Case) -> Case:
        """Take every reduction as far as it goes, again and again until none goes further."""
        changed = True
        while changed and self.checks < self.limit:
            changed = False
            for reduction in reductions.of(best, self.law.name):
                while (smaller := self._first(best, reduction(best, self.variant))) is not None:
                    best, changed = smaller, True
                    self.visited.add(encode(best, ""))
        return best

    def _first(self, best: Case, candidates: Sequence[Candidate]) -> Case | None:
        fitted = (self.fitted(candidate.case) for candidate in candidates)
        return next((case for case in fitted if case != best and self.shows(case)), None)

    def _reseeded(self, best: Case) -> Case | None:
        """Return the first candidate that fails alike under another seed."""
        for reduction in reductions.of(best, self.law.name):
            for candidate in reduction(best, self.variant):
                for seed in SEEDS:
                    if candidate.shrinks and self.shows(self.fitted(replace(candidate.case, values=seed))):
                        return self.fitted(replace(candidate.case, values=seed))
        return None

    def steps(self, best: Case) -> tuple[str, ...]:
        """Return what holds one step below the best case, in words; only what was seen to hold."""
        found: list[str] = []
        for reduction in reductions.of(best, self.law.name):
            for candidate in reduction(best, self.variant):
                case = self.fitted(candidate.case)
                if case == best or not candidate.words:
                    continue
                tried = [self.seen.get(encode(replace(case, values=v), "")) for v in (best.values, *SEEDS)]
                tried[0] = self.probe(case)
                outcomes = [outcome for outcome in tried if outcome is not None]
                if outcomes and all(outcome.status == PASS for outcome in outcomes):
                    found.append(candidate.words)
        return tuple(dict.fromkeys(found))
