"""The ledger of known issues and what it decides: a witness says whether an issue is still there, never the search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peftcheck import engine, quantizers
from peftcheck import where as region
from peftcheck.case import SUBJECTS, Case, Sweep
from peftcheck.errors import UsageError
from peftcheck.hearings import Hearing, Hearings
from peftcheck.implementation import Implementation
from peftcheck.issue import EMPTY, Issue, Ledger, Witness, active, fits
from peftcheck.law import Law
from peftcheck.ledger_file import entry_text, load
from peftcheck.outcome import ERROR, PASS, SKIP, VIOLATION, Outcome

KNOWN, FIXED, INACTIVE = "known", "fixed", "inactive"
Check = Callable[[Implementation, Case, Sequence[Law]], Sequence[Outcome]]


@dataclass(frozen=True)
class Ruling:
    """What the ledger makes of a cell: its status, the issues that had a say, and the failures not on the list."""

    status: str
    issues: tuple[str, ...] = ()
    new: tuple[tuple[Outcome, Case], ...] = ()
    message: str = ""


class Court:
    """The verdicts on a ledger's issues, each reached when first asked for and then kept.

    Raises UsageError where an issue is stale (active for the library's version, yet none of the variants and
    layers that the library has match it; a filter of the run plays no part), and where the ledger cannot judge
    the version. What `check` raises on a witness goes through.
    """

    def __init__(
        self,
        ledger: Ledger,
        implementation: Implementation,
        laws: Iterable[Law],
        check: Check = engine.check,
        hearings: Hearings | None = None,
    ) -> None:
        self._implementation = implementation
        self._laws = {law.name: law for law in laws}
        self._check = check
        self._issues = {issue.id: issue for issue in ledger.issues}
        self._hearings = hearings or Hearings()
        self.active = active(ledger, implementation.version)
        for issue in self.active:
            _refuse_stale(ledger, issue, implementation)

    def entries(self) -> tuple[Issue, ...]:
        """Return every issue of the ledger, those for other versions too."""
        return tuple(self._issues.values())

    def verdict(self, name: str) -> str:
        """Return the verdict on the issue `name`: 'known', 'fixed', 'error' or 'inactive'."""
        return self.hearing(name).verdict

    def hearing(self, name: str) -> Hearing:
        """Return what the witnesses of the issue `name` say: an error outweighs a fixed one, that a known one."""
        issue = self._issues[name]
        if issue not in self.active:
            condition = " with ".join((issue.versions, ", ".join(issue.needs))) if issue.needs else issue.versions
            return Hearing(INACTIVE, f"'{issue.id}' is listed for {condition}: here the law must hold")
        return self._hearings.get(name) or self._hearings.put(name, self._heard(issue))

    def _heard(self, issue: Issue) -> Hearing:
        witnesses = [witness for witness in issue.witnesses if _installed(witness)]
        if not witnesses:
            return Hearing(INACTIVE, f"'{issue.id}': no quantizer of its witnesses is installed")
        found = [self._hear(issue, witness) for witness in witnesses]
        worst = next((one for verdict in (ERROR, FIXED) for one in found if one.verdict == verdict), found[0])
        return Hearing(worst.verdict, worst.message, frozenset().union(*(one.shown for one in found)))

    def _hear(self, issue: Issue, witness: Witness) -> Hearing:
        law = self._laws.get(witness.law)
        if law is None:
            raise UsageError(f"issue '{issue.id}': its witness needs the law '{witness.law}'")
        (outcome,) = self._check(self._implementation, witness.case, [law])
        if outcome.status == PASS:
            return Hearing(FIXED, f"'{issue.id}' is listed, but its witness holds: remove the entry. {witness.token}")
        if outcome.status == SKIP:
            text = f"{witness.law} says nothing about the witness of '{issue.id}': choose another"
            return Hearing(ERROR, f"{text}. {witness.token}")
        if not any(fits(outcome.fingerprint or "", pattern) for pattern in issue.fingerprint):
            text = f"the witness of '{issue.id}' fails otherwise: {outcome.fingerprint}: {outcome.message}"
            return Hearing(ERROR, f"{text}. {witness.token}")
        return Hearing(KNOWN, f"'{issue.id}': {issue.reason}", frozenset({outcome.fingerprint or ""}))

    def absorbs(self, outcome: Outcome, case: Case) -> str | None:
        """Return the id of the first known issue that a failure is an instance of, or None where it is new."""
        return next((issue.id for issue in self.active if self.instance(issue, outcome, case)), None)

    def instance(self, issue: Issue, outcome: Outcome, case: Case) -> bool:
        """Return whether a failure is this known issue: in its place, with a fingerprint that a witness showed.

        Of several fingerprint globs only those count that one of the witnesses bears out.
        """
        if not (outcome.failed and outcome.fingerprint and issue.names(outcome.law) and issue.where.covers(case)):
            return False
        patterns = [pattern for pattern in issue.fingerprint if fits(outcome.fingerprint, pattern)]
        if not patterns:
            return False
        hearing = self.hearing(issue.id)
        return hearing.verdict == KNOWN and any(fits(shown, p) for shown in hearing.shown for p in patterns)

    def witnessed(self, law: str, sweep: Sweep) -> tuple[Issue, ...]:
        """Return the issues with a witness in this cell: what they are shows there, whatever a search finds."""
        return tuple(
            issue
            for issue in self.active
            if any(w.law == law and _place(w.case.sweep) == _place(sweep) for w in issue.witnesses)
        )

    def fixed_in(self, law: str, sweep: Sweep) -> tuple[str, ...]:
        """Return the ids of the issues witnessed in this cell that are listed though they are fixed."""
        return tuple(i.id for i in self.witnessed(law, sweep) if self.verdict(i.id) == FIXED)

    def rule(self, law: str, sweep: Sweep, failures: Iterable[tuple[Outcome, Case]]) -> Ruling:
        """Return the status of a cell ('pass', 'known', 'fixed', 'violation', 'error') from the failures found in it.

        A failure that no issue absorbs decides; then an issue whose witness lies in this cell and shows it no
        longer; then the known ones.
        """
        new, names = [], []
        for outcome, case in failures:
            name = self.absorbs(outcome, case)
            if name is None:
                new.append((outcome, case))
            elif name not in names:
                names.append(name)
        heard = {issue.id: self.hearing(issue.id) for issue in self.witnessed(law, sweep)}
        names += [name for name, one in heard.items() if one.verdict == KNOWN and name not in names]
        wrong = {name: one for name, one in heard.items() if one.verdict != KNOWN}
        complaints = [one.message for one in wrong.values()]
        if new:
            status = VIOLATION if any(outcome.status == VIOLATION for outcome, _ in new) else ERROR
            return Ruling(status, tuple(names), tuple(new), "; ".join([new[0][0].message, *complaints]))
        if wrong:
            status = ERROR if any(one.verdict == ERROR for one in wrong.values()) else FIXED
            return Ruling(status, (*names, *wrong), (), "; ".join(complaints))
        reasons = (self._issues[name].reason for name in names)
        return Ruling(KNOWN if names else PASS, tuple(names), (), "; ".join(reasons))


def _installed(witness: Witness) -> bool:
    """Return whether the witness can be heard here: the others speak for an issue where a quantizer is missing."""
    name = witness.case.sweep.quantizer
    return name is None or (name in quantizers.DECLARED and quantizers.available(name))


def _place(sweep: Sweep) -> tuple[str, str, str, str | None]:
    return sweep.variant, sweep.layer, sweep.dtype, sweep.quantizer


def _refuse_stale(ledger: Ledger, issue: Issue, implementation: Implementation) -> None:
    """Raise UsageError where an issue speaks of a variant or layer that the implementation does not have."""

    def stale(field: str, wanted: Any) -> UsageError:
        what = f"{field}: stale: nothing in {implementation.name} matches '{wanted}'"
        return UsageError(f"{ledger.path}: issue '{issue.id}': {what}")

    variants = implementation.variants()
    for wanted in issue.where.alternatives("variant"):
        if not any(region.matches(name, wanted) for name in variants):
            raise stale("where.variant", wanted)
    asked = issue.where.alternatives("variant") or ("*",)
    concerned = [variant for name, variant in variants.items() if any(region.matches(name, one) for one in asked)]
    # what a variant does not accept it must refuse: only there may an issue speak of other layers
    refusing = all(pattern.startswith("refuse.") for pattern in issue.law)
    layers = set(SUBJECTS) if refusing else {layer for variant in concerned for layer in variant.layers}
    for wanted in issue.where.alternatives("layer"):
        if not any(region.matches(layer, wanted) for layer in layers):
            raise stale("where.layer", wanted)
    for witness in issue.witnesses:
        sweep = witness.case.sweep
        if sweep.variant not in variants:
            raise stale("witness", sweep.variant)
        if not refusing and sweep.layer not in variants[sweep.variant].layers:
            raise stale("witness", f"{sweep.variant} on {sweep.layer}")


__all__ = ["EMPTY", "Court", "Hearing", "Issue", "Ledger", "Ruling", "active", "entry_text", "fits", "load"]
