"""A hang or a crash of the interpreter costs one case: the journal and the watchdog.

The journal of a sweep is a small file that names the case and the law that are running. Whoever walks the same
sweep again (a fresh worker after a crash) finds there what killed its predecessor and passes over it. A hang in
Python is interrupted by an alarm; a hang below Python ends the process, and the journal tells the rest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from peftcheck.case import Case, encode

CASE_SECONDS = 60
_GRACE = 15
_PATIENCE = 4


class Hung(Exception):
    """The library did not come back within the watchdog's time."""


class Watchdog:
    """The watch over one sweep, with its journal in `folder`."""

    def __init__(self, folder: Path, sweep: str, seconds: float = CASE_SECONDS) -> None:
        name = hashlib.sha256(sweep.encode()).hexdigest()[:24]
        self._running = folder / f"{name}.running"
        self._dead = folder / f"{name}.dead"
        self._seconds = seconds
        self._alarms = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
        self._case: Case | None = None
        self._token = ""
        self._armed = -math.inf
        self.crashed = self._bury()
        self._file = os.open(self._running, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def _bury(self) -> frozenset[tuple[str, str]]:
        """Return the (case, law) pairs that killed earlier walks of this sweep."""
        if self._running.exists():
            last = self._running.read_text(encoding="utf-8")
            if last:
                with self._dead.open("a", encoding="utf-8") as file:
                    file.write(last + "\n")
        if not self._dead.exists():
            return frozenset()
        lines = self._dead.read_text(encoding="utf-8").splitlines()
        return frozenset((token, law) for token, _, law in (line.partition(" ") for line in lines))

    @contextlib.contextmanager
    def watch(self, case: Case, law: str) -> Iterator[None]:
        """Note what runs, and end it if it takes too long."""
        if case is not self._case:
            self._case, self._token = case, encode(case, "")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{self._token} {law}".encode(), 0)
        now = time.monotonic()
        if self._alarms:
            previous = signal.signal(signal.SIGALRM, self._patient(now, time.process_time()))
            signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds)
        if now - self._armed > 1:  # arming starts a thread: not for every law
            faulthandler.dump_traceback_later(_PATIENCE * self._seconds + _GRACE, exit=True, file=_silent())
            self._armed = now
        try:
            yield
        finally:
            if self._alarms:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, previous)
            os.ftruncate(self._file, 0)

    def _patient(self, wall: float, cpu: float) -> Callable[[int, object], None]:
        """Return a handler that tells a hang from a process that others keep from running.

        A library that has not come back is given up where it has had half of the time on a core, or, since one that waits
        uses none, after `_PATIENCE` times as long.
        """

        def ring(signum: int, frame: object) -> None:
            passed, used = time.monotonic() - wall, time.process_time() - cpu
            if used >= passed / 2 or passed >= (_PATIENCE - 0.5) * self._seconds:
                interrupt(signum, frame)

        return ring

    def close(self) -> None:
        """End the watch: the sweep came through."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self._file)
        self._running.unlink(missing_ok=True)


def interrupt(signum: int, frame: object) -> None:
    """Raise Hung in the main thread: a handler for SIGALRM."""
    raise Hung("no answer within the time that the watchdog allows")


_SINK: list[object] = []


def _silent():
    if not _SINK:
        _SINK.append(Path(os.devnull).open("w"))  # noqa: SIM115 - faulthandler keeps the descriptor
    return _SINK[0]
