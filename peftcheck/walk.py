"""The walk of a sweep over its cases, all its laws together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

from peftcheck import engine, generator, quantized_cost, quantizers, transformer_models
from peftcheck.case import MODELS, Case, Sweep, encode
from peftcheck.errors import HarnessError
from peftcheck.generator_combine import combination_case
from peftcheck.implementation import Claim, Implementation, Variant
from peftcheck.law import Law
from peftcheck.measurement import Measurement
from peftcheck.oracle import FORMULAS
from peftcheck.outcome import ERROR, SKIP, Outcome
from peftcheck.record import QuantizedRecord
from peftcheck.selection import Profile
from peftcheck.suite import Cell, CellResult, Failure

_PROBES = 40  # cases drawn, not built, to learn what the library claims on a sweep
_NOT_RUN = CellResult(Cell("", Sweep("", "", "", "")), "absent")


class Walk:
    """One walk of a sweep over its cases, all its laws together.

    Each law takes the first cases that say something about it, so that its verdict does not depend on which
    other laws are selected. `costs`: of a merge into quantized weights, measure besides what it costs.
    """

    def __init__(
        self,
        implementation: Implementation,
        sweep: Sweep,
        laws: Mapping[str, Law],
        profile: Profile,
        seed: int,
        watch: engine.Watch = engine.unwatched,
        crashed: frozenset[tuple[str, str]] = frozenset(),
        kind: str | None = None,
        costs: bool = False,
    ) -> None:
        self.implementation = implementation
        self.sweep = sweep
        self.laws = laws
        self.profile = profile
        self.seed = seed
        self.watch = watch
        self.crashed = crashed
        self.kind = kind
        self.costs = costs
        self.variant = implementation.variants()[sweep.variant]
        self._drawn: list[Case] = []

    def run(self) -> dict[str, CellResult]:
        """Return the result of every law, by name."""
        missing = self.variant.package and not find_spec(self.variant.package)
        message = f"not installed: {self.variant.package}" if missing else ""
        if self.sweep.quantizer is not None and not message:
            message = quantizers.absence(self.sweep.quantizer)
        if message:
            return {name: CellResult(Cell(name, self.sweep), "absent", message=message) for name in self.laws}
        if self.sweep.layer in MODELS and (message := transformer_models.missing(self.sweep.layer)):
            return {name: CellResult(Cell(name, self.sweep), "absent", message=message) for name in self.laws}
        if self.sweep.quantizer is not None:
            quantizers.load(self.sweep.quantizer)  # what a library does when it is imported is no part of a case
        if self.sweep.layer not in self.variant.layers or "quantize.refuses" in self.laws:
            return {name: self._refusal(name) for name in self.laws}
        results: dict[str, CellResult] = {}
        open_laws: dict[str, _Tally] = {}
        for name, law in self.laws.items():
            cell = Cell(name, self.sweep, self.kind)
            idle = self._idle(law)
            if idle is None:
                open_laws[name] = _Tally(law, cell, *self.profile.cases(cell, law))
            else:
                results[name] = CellResult(cell, *idle)
        self._visit(open_laws)
        results |= {name: tally.result() for name, tally in open_laws.items()}
        name = "quantize.merge_budget"
        if self.costs and results.get(name, _NOT_RUN).state == "ran":
            results[name] = replace(results[name], quantized=self._cost())
        return results

    def _cost(self) -> QuantizedRecord | None:
        """Return what a merge costs here in float32, for the report."""
        with self.watch(self._draw(0, False), "cost"), engine.pinned():
            return quantized_cost.measure(self.implementation, replace(self.sweep, dtype="float32"))

    def _draw(self, index: int, exact: bool) -> Case:
        if self.kind is None:
            return generator.draw(self.variant, self.sweep, self.seed, index, exact)
        return combination_case(self.variant, self.sweep, self.kind, self.seed, index, exact)

    def _claims(self) -> Iterator[Case]:
        """Yield cases that show what the library claims here: each is drawn when a law is still in doubt."""
        for index in range(_PROBES):
            if index == len(self._drawn):
                self._drawn.append(self._draw(index, index % 2 == 0))
            yield self._drawn[index]

    def _idle(self, law: Law) -> tuple | None:
        """Return state and message of a law that nothing on this sweep can be asked, else None."""
        if law.name.startswith("refuse."):
            if not any(_claims_of(self.variant, case, law) for case in self._claims()):
                return ("absent", 0, None, None, 0.0, None, None, (), "nothing is declared unsupported here")
            return None
        if not law.concerns(self.variant):
            return ("absent", 0, None, None, 0.0, None, None, (), "the law says nothing about this method")
        found = set()
        for case in self._claims():
            found.add(_weakest(self.variant, case, law))
            if Claim.YES in found:
                return None
        if Claim.REFUSES in found:
            return ("unsupported", 0, None, None, 0.0, None, None, (), "declared; refuse.merge checks that it refuses")
        return ("absent", 0, None, None, 0.0, None, None, (), "the library has no such operation")

    def _visit(self, tallies: Mapping[str, _Tally]) -> None:
        dyadic = (
            FORMULAS[self.variant.formula].dyadic and self.sweep.quantizer is None and self.sweep.layer not in MODELS
        )
        first: tuple[Case, Law, Outcome] | None = None
        for index in range(self.profile.tries):
            exact = dyadic and index % 2 == 0
            wanted = [tally for tally in tallies.values() if tally.wants(exact, dyadic)]
            if not wanted:
                if all(not t.wants(e, dyadic) for t in tallies.values() for e in (True, False)):
                    break
                continue
            case = self._draw(index, exact)
            wanted = [t for t in wanted if self._may_say(case, t.law)]
            if not wanted:
                continue
            started = time.perf_counter()
            for tally, outcome in zip(wanted, self._check(case, [t.law for t in wanted]), strict=True):
                tally.add(case, exact, outcome, (time.perf_counter() - started) / len(wanted))
                if first is None and outcome.measurement is not None:
                    first = (case, tally.law, outcome)
        if first is not None:
            self._canary(*first)

    def _may_say(self, case: Case, law: Law) -> bool:
        """Return whether building the case can tell anything of the law: attaching costs more than asking.

        A law on refused merges waits for a case that has one, any other for one on which all that it needs is claimed;
        one on combinations for members and options that it needs.
        """
        if law.group == "refuse":
            return _claims_of(self.variant, case, law)
        return law.cases(self.variant, case) and _weakest(self.variant, case, law) is Claim.YES

    def _check(self, case: Case, laws: Sequence[Law]) -> list[Outcome]:
        token = encode(case, "")
        dead = {law for where, law in self.crashed if where == token}
        lost = [law for law in laws if "attach" in dead or law.name in dead]
        alive = [law for law in laws if law not in lost]
        found = {o.law: o for o in engine.check(self.implementation, case, alive, self.watch)} if alive else {}
        for law in lost:
            message = "the interpreter died or hung here; the case was not run again"
            found[law.name] = Outcome(
                law.name, ERROR, None, 0.0, False, f"crash|{self.sweep.variant}|interpreter", message
            )
        return [found[law.name] for law in laws]

    def _canary(self, case: Case, law: Law, before: Outcome) -> None:
        """Run the first law again at the end of the sweep: anything but the same bits means that state leaked."""
        (after,) = engine.check(self.implementation, case, [law], self.watch)
        if repr(after.measurement) != repr(before.measurement):
            raise HarnessError(
                f"canary: {law.name} on {self.sweep} measured {before.measurement}, then {after.measurement}"
            )

    def _refusal(self, name: str) -> CellResult:
        """Return the result of attaching to a layer that the variant does not accept, or must not merge into."""
        cell = Cell(name, self.sweep)
        if self.sweep.layer in self.variant.unasked:
            return CellResult(
                cell, "absent", message="the library accepts this layer; no closed form here covers it yet"
            )
        case = generator.draw(self.variant, self.sweep, self.seed, 0, False)
        started = time.perf_counter()
        (outcome,) = self._check(case, [self.laws[name]])
        seconds, token, m = time.perf_counter() - started, encode(case, name), outcome.measurement
        ratio = m.ratio if m else None
        if not outcome.failed:
            return CellResult(cell, "unsupported", 1, ratio, None, seconds, token, case.words())
        failure = Failure(
            outcome.fingerprint or "", outcome.status, token, case.words(), outcome.message, ratio, case, outcome
        )
        return CellResult(cell, "ran", 1, ratio, None, seconds, token, case.words(), (failure,))


def _weakest(variant: Variant, case: Case, law: Law) -> Claim:
    found = {variant.claim(op, case.layers[t], a) for op in law.needs for a in case.adapters for t in a.targets}
    return next((claim for claim in (Claim.ABSENT, Claim.REFUSES) if claim in found), Claim.YES)


def _claims_of(variant: Variant, case: Case, law: Law) -> bool:
    """Return whether the case has anything for a refuse law: one layer, on which the operation is refused."""
    claims = {variant.claim(law.refuses, case.layers[t], a) for a in case.adapters for t in a.targets}
    return len({t for a in case.adapters for t in a.targets}) == 1 and Claim.REFUSES in claims


class _Tally:
    """What a law has met so far on a sweep."""

    def __init__(self, law: Law, cell: Cell, due_exact: int, due_native: int) -> None:
        self.law, self.cell = law, cell
        self.due_exact, self.due_native = due_exact, due_native
        self.exact = self.native = 0
        self.seconds, self.effect, self.moving = 0.0, 0.0, False
        self.worst: tuple[float, Case, Measurement] | None = None
        self.failures: dict[str, Failure] = {}

    def wants(self, exact: bool, dyadic: bool) -> bool:
        if exact:
            return dyadic and self.exact < self.due_exact
        return self.native < self.due_native or (not self.moving and not self.law.structural)

    def add(self, case: Case, exact: bool, outcome: Outcome, seconds: float) -> None:
        self.seconds += seconds
        if outcome.status == SKIP:
            return
        self.exact, self.native = self.exact + exact, self.native + (not exact)
        self.effect = max(self.effect, outcome.effect)
        self.moving |= outcome.effect > 0 or outcome.status == ERROR
        m = outcome.measurement
        if m is not None and (self.worst is None or _beyond(m.ratio, self.worst[0])):
            self.worst = (m.ratio, case, m)
        if outcome.failed and outcome.fingerprint not in self.failures:
            token = encode(case, self.law.name)
            self.failures[outcome.fingerprint] = Failure(
                outcome.fingerprint,
                outcome.status,
                token,
                case.words(),
                outcome.message,
                m.ratio if m else None,
                case,
                outcome,
            )

    def result(self) -> CellResult:
        count = self.exact + self.native
        if count == 0:
            return CellResult(self.cell, "vacuous", message="no case of this sweep says anything about the law")
        if not self.moving and not self.law.structural:
            return CellResult(self.cell, "vacuous", count, message="no case has an effect on the weights")
        ratio, case = (self.worst[0], self.worst[1]) if self.worst else (None, None)
        return CellResult(
            self.cell,
            "ran",
            count,
            ratio,
            self.effect,
            self.seconds,
            encode(case, self.law.name) if case else None,
            case.words() if case else None,
            tuple(self.failures.values()),
        )


def _beyond(ratio: float, than: float) -> bool:
    return ratio != ratio or ratio > than
