"""The ledger as a file: read it strictly, print an entry to paste. Nothing in here ever writes one."""

from __future__ import annotations

import datetime
import glob
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from peftcheck import law as registry
from peftcheck import processor
from peftcheck import where as region
from peftcheck.budgets import DOCUMENTED
from peftcheck.case import SUBJECTS, Case, decode, encode
from peftcheck.errors import UsageError
from peftcheck.issue import Issue, Ledger, Witness
from peftcheck.outcome import ERROR, Outcome
from peftcheck.rounding import DTYPES
from peftcheck.values import PROFILES
from peftcheck.where import Where

KINDS = ("bug", "documented", "upstream")
SEVERITIES = ("silent numbers", "corrupted state", "crash", "contract")
_REQUIRED = (
    "id", "law", "fingerprint", "where", "versions", "kind", "severity", "reason", "opened", "witness",
)  # fmt: skip
_KEYS = (*_REQUIRED, "url", "bound", "needs")


def load(path: Path, laws: Iterable[str] | None = None) -> Ledger:
    """Read a ledger (TOML, `[[issue]]` tables; of a folder, all its .toml files) and refuse what it cannot stand for.

    `laws` are the known names, those of the registry by default. Raises UsageError in one line that names file,
    issue and field.
    """
    names = tuple(one.name for one in registry.laws()) if laws is None else tuple(laws)
    files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path}: a ledger's folder holds .toml files, and there is none")
    issues = tuple(issue for file in files for issue in _issues(file, names))
    seen: set[str] = set()
    for issue in issues:
        if issue.id in seen:
            raise UsageError(f"{path}: issue '{issue.id}': id: there are two of them")
        seen.add(issue.id)
    return Ledger(path, issues)


def _issues(path: Path, names: Sequence[str]) -> tuple[Issue, ...]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot read the ledger: {str(error).splitlines()[0]}") from error
    tables = data.pop("issue", [])
    if data or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        other = f", not '{next(iter(data))}'" if data else ""
        raise UsageError(f"{path}: a ledger holds [[issue]] tables only{other}")
    return tuple(_Reader(path, number, table).issue(names) for number, table in enumerate(tables, 1))


@dataclass(frozen=True)
class _Reader:
    """One `[[issue]]` table on its way to an Issue, with what an error message needs."""

    path: Path
    number: int
    table: Mapping[str, Any]

    def wrong(self, field: str, what: str) -> UsageError:
        name = self.table.get("id")
        label = f"issue '{name}'" if isinstance(name, str) and name else f"issue {self.number}"
        return UsageError(f"{self.path}: {label}: {field}: {what}")

    def issue(self, known: Sequence[str]) -> Issue:
        for key in self.table:
            if key not in _KEYS:
                raise self.wrong(key, f"unknown field: choose from {', '.join(_KEYS)}")
        for key in _REQUIRED:
            if key not in self.table:
                raise self.wrong(key, "missing")
        made = Issue(
            self.text("id"),
            self.laws(known),
            self.texts("fingerprint"),
            self.where(),
            self.versions(),
            self.choice("kind", KINDS),
            self.choice("severity", SEVERITIES),
            self.text("reason"),
            self.opened(),
            self.witnesses(known),
            self.url(),
            self.bound(),
            self.needs(),
        )
        self.consistent(made)
        return made

    def text(self, field: str) -> str:
        value = self.table[field]
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, "must be text")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        value = self.table[field]
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) and item.strip() for item in items):
            raise self.wrong(field, "must be text or a list of texts")
        return tuple(items)

    def choice(self, field: str, allowed: Sequence[str]) -> str:
        value = self.text(field)
        if value not in allowed:
            raise self.wrong(field, f"'{value}' is none of {', '.join(allowed)}")
        return value

    def laws(self, known: Sequence[str]) -> tuple[str, ...]:
        patterns = self.texts("law")
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise self.wrong("law", f"unknown law '{pattern}': see peftcheck list laws")
        return patterns

    def where(self) -> Where:
        value = self.table["where"]
        if not isinstance(value, dict):
            raise self.wrong("where", 'must be a table, such as { variant = "lora", layer = "conv2d" }')
        try:
            found = region.parse(value)
        except region.UnknownField as error:
            raise self.wrong("where", str(error)) from error
        for field, names in (
            ("layer", SUBJECTS),
            ("dtype", DTYPES),
            ("adapter_dtype", DTYPES),
            ("profile", PROFILES),
        ):
            for wanted in found.alternatives(field):
                if not any(region.matches(name, wanted) for name in names):
                    raise self.wrong(f"where.{field}", f"stale: '{wanted}' matches none of {', '.join(names)}")
        return found

    def versions(self) -> str:
        value = self.table["versions"]
        try:
            return str(SpecifierSet(value))
        except (InvalidSpecifier, TypeError, AttributeError) as error:
            raise self.wrong("versions", f"{value!r} is no PEP 440 specifier, such as '>=0.6,<0.22'") from error

    def opened(self) -> datetime.date:
        value = self.table["opened"]
        try:
            value = datetime.date.fromisoformat(value) if isinstance(value, str) else value
        except ValueError:
            value = None
        if isinstance(value, datetime.datetime) or not isinstance(value, datetime.date):
            raise self.wrong("opened", f"{self.table['opened']!r} is no date, such as 2025-01-31")
        return value

    def url(self) -> str | None:
        if "url" not in self.table:
            return None
        value = self.text("url")
        if not re.fullmatch(r"https?://[^\s<>\"]+", value):
            raise self.wrong("url", f"'{value}' is no http(s) address")
        return value

    def bound(self) -> str | None:
        return self.choice("bound", tuple(DOCUMENTED)) if "bound" in self.table else None

    def needs(self) -> tuple[str, ...]:
        found = self.texts("needs") if "needs" in self.table else ()
        for name in found:
            if name not in processor.FEATURES:
                raise self.wrong("needs", f"'{name}' is none of {', '.join(processor.FEATURES)}")
        return found

    def witnesses(self, known: Sequence[str]) -> tuple[Witness, ...]:
        found = []
        for token in self.texts("witness"):
            try:
                case, law = decode(token)
            except UsageError as error:
                raise self.wrong("witness", str(error)) from error
            if law not in known:
                raise self.wrong("witness", f"its law '{law}' is unknown: see peftcheck list laws")
            found.append(Witness(token.strip(), case, law))
        return tuple(found)

    def consistent(self, issue: Issue) -> None:
        """Raise UsageError where the fields of an issue contradict each other."""
        for number, witness in enumerate(issue.witnesses, 1):
            which = "witness" if len(issue.witnesses) == 1 else f"witness {number}"
            if not issue.where.covers(witness.case):
                raise self.wrong("witness", f"{which} lies outside 'where': {witness.case.words()}")
            if not issue.names(witness.law):
                raise self.wrong("witness", f"{which} is of law '{witness.law}', which 'law' does not name")
            if not any(witness.may_show(pattern) for pattern in issue.fingerprint):
                shows = f"{witness.law} on {witness.case.sweep.variant}"
                raise self.wrong("witness", f"{which} cannot show the fingerprint: it is of {shows}")
        for pattern in issue.fingerprint:
            if not 3 <= len(pattern.split("|")) <= 4:
                forms = "law|variant|role|symptom nor crash|variant|place nor law|variant|bound"
                raise self.wrong("fingerprint", f"'{pattern}' is neither {forms}")
            if not any(witness.may_show(pattern) for witness in issue.witnesses):
                raise self.wrong("fingerprint", f"no witness can show '{pattern}'")
            if issue.bound is not None and issue.bound not in pattern.split("|")[2].split(","):
                raise self.wrong("bound", f"'{pattern}' is not explained by '{issue.bound}'")


def entry_text(case: Case, law: str, outcome: Outcome, version: str, opened: datetime.date | None = None) -> str:
    """Return a ledger entry to paste for a failure; it names what is known and leaves the reason to people.

    `version` is the library's; `opened` today where it is not given. Raises UsageError for what did not fail.
    """
    if not outcome.failed or outcome.fingerprint is None:
        raise UsageError(f"{law} does not fail on this case: there is nothing to list")
    documented = outcome.status != ERROR and outcome.fingerprint.count("|") == 2
    lines = {
        "id": _slug(outcome.fingerprint),
        "law": "*" if outcome.status == ERROR else law,  # whatever a crash stops, it stops every law that comes by
        "fingerprint": glob.escape(outcome.fingerprint),
        "where": {"variant": glob.escape(case.sweep.variant), "layer": case.sweep.layer},
        "versions": f"=={version}",
        "kind": "documented" if documented else "bug",
        "severity": _severity(outcome),
        "reason": " ".join(outcome.message.split()) or "say what is wrong, and where in the library",
        "opened": opened or datetime.date.today(),
        "witness": encode(case, law),
    }
    if documented and (bound := outcome.fingerprint.split("|")[2]) in DOCUMENTED:
        lines["bound"] = bound
    return "\n".join(["[[issue]]", *(f"{key} = {_toml(value)}" for key, value in lines.items())]) + "\n"


def _slug(fingerprint: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", fingerprint.lower()).strip("-")


def _severity(outcome: Outcome) -> str:
    if outcome.status == ERROR:
        return "crash"
    symptom = outcome.measurement.symptom if outcome.measurement else ""
    if symptom in ("numeric", "non-finite"):
        return "silent numbers"
    broken_state = (
        "changed",
        "written",
        "marked",
        "half merged",
        "lost",
        "shape",
        "dtype",
        "strides",
        "sharing",
    )
    return "corrupted state" if symptom.startswith(broken_state) else "contract"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, datetime.date):
        return value.isoformat()
    # TOML's basic strings are JSON's, but that DEL must be escaped and surrogate pairs must not be
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
