"""What the witnesses of the ledger said in one run: heard once, and told to every worker through a folder.

Hearing a witness means building and checking a case; with several hundred of them, and as many workers as there are
cores, hearing each again in every process would cost more than many a search.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hearing:
    """What an issue's witnesses say: 'known', 'fixed', 'error', or 'inactive', and why.

    'inactive': not for this version of the library or this processor, or what its witnesses need is not installed.

    `shown`: the fingerprints that they showed.
    """

    verdict: str
    message: str
    shown: frozenset[str] = frozenset()


class Hearings:
    """The hearings of a run by issue, kept in memory and, given a folder, shared with the run's other processes.

    A hearing is a function of the library and the ledger alone, so two workers that reach it at once write the same.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._own: dict[str, Hearing] = {}

    def get(self, issue: str) -> Hearing | None:
        """Return what was heard of an issue, here or by another process; None where nothing was yet."""
        if issue not in self._own and self._folder is not None:
            try:
                data = json.loads(self._path(issue).read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            self._own[issue] = Hearing(data["verdict"], data["message"], frozenset(data["shown"]))
        return self._own.get(issue)

    def put(self, issue: str, hearing: Hearing) -> Hearing:
        """Keep a hearing, and return it."""
        self._own[issue] = hearing
        if self._folder is not None:
            data = {"verdict": hearing.verdict, "message": hearing.message, "shown": sorted(hearing.shown)}
            path = self._path(issue)
            half = path.with_suffix(f".{os.getpid()}")
            half.write_text(json.dumps(data), encoding="utf-8")
            half.replace(path)  # whoever reads finds all of it or nothing
        return hearing

    def _path(self, issue: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(issue.encode()).hexdigest()[:24]}.heard"
