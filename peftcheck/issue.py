"""What a ledger holds: known issues, where they show, and the witnesses that prove them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from peftcheck import processor
from peftcheck.case import Case
from peftcheck.errors import UsageError
from peftcheck.where import Where


@dataclass(frozen=True)
class Witness:
    """A case and a law on which the issue shows, and the token that they came from."""

    token: str
    case: Case
    law: str

    def may_show(self, pattern: str) -> bool:
        """Return whether a failure of the witness can have such a fingerprint, by law and variant."""
        parts = pattern.split("|")
        if len(parts) < 3:
            return False
        lawful = fnmatchcase(self.law, parts[0]) or (len(parts) == 3 and fnmatchcase("crash", parts[0]))
        return lawful and fnmatchcase(self.case.sweep.variant, parts[1])


@dataclass(frozen=True)
class Issue:
    """A known issue: one root cause, however many cells it turns red.

    `law` and `fingerprint` are globs (a fingerprint's part by part: '*' never crosses a bar); `versions` a PEP
    440 specifier of the library's versions; `bound` names the documented bound (`budgets.DOCUMENTED`) that
    explains an announced inexactness; `needs` the features of the processor (`processor.FEATURES`) without
    which the library computes otherwise, and the law must hold.
    """

    id: str
    law: tuple[str, ...]
    fingerprint: tuple[str, ...]
    where: Where
    versions: str
    kind: str
    severity: str
    reason: str
    opened: datetime.date
    witnesses: tuple[Witness, ...]
    url: str | None = None
    bound: str | None = None
    needs: tuple[str, ...] = ()

    @property
    def witness(self) -> tuple[str, ...]:
        """The tokens of the witnesses."""
        return tuple(witness.token for witness in self.witnesses)

    def names(self, law: str) -> bool:
        """Return whether the law is one of the issue's."""
        return any(fnmatchcase(law, pattern) for pattern in self.law)


@dataclass(frozen=True)
class Ledger:
    """The issues of one implementation, in the order of the file."""

    path: Path | None = None
    issues: tuple[Issue, ...] = ()


EMPTY = Ledger()


def fits(fingerprint: str, pattern: str) -> bool:
    """Return whether a fingerprint matches a pattern, part by part between the bars."""
    parts, patterns = fingerprint.split("|"), pattern.split("|")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def active(ledger: Ledger, version: str, features: frozenset[str] | None = None) -> tuple[Issue, ...]:
    """Return the issues whose versions include this one and whose needs are met; for others the law must hold.

    `features` are the processor's, of this one by default. Raises UsageError where the version is none that PEP 440
    orders.
    """
    if not ledger.issues:
        return ()
    try:
        installed = Version(version)
    except InvalidVersion as error:
        raise UsageError(
            f"the ledger cannot judge version '{version}' of the library: PEP 440 orders no such"
        ) from error
    own = processor.features() if features is None else features
    return tuple(
        issue
        for issue in ledger.issues
        if own.issuperset(issue.needs) and SpecifierSet(issue.versions).contains(installed, prereleases=True)
    )
