"""What came of one law on one case, and the identity of a failure."""

from __future__ import annotations

from dataclasses import dataclass

from peftcheck.measurement import Measurement

PASS, VIOLATION, ERROR, SKIP = "pass", "violation", "error", "skip"


@dataclass(frozen=True)
class Outcome:
    """A judged law on a case.

    `status`: 'pass', 'violation', 'error' (the library crashed or refused where support is claimed) or 'skip' (the
    case says nothing about the law). `effect`: how far the adapters move the weights. `exempt`: the case declares
    that they do not. `fingerprint` names the cause where the law does not hold.
    """

    law: str
    status: str
    measurement: Measurement | None = None
    effect: float = 0.0
    exempt: bool = False
    fingerprint: str | None = None
    message: str = ""

    @property
    def failed(self) -> bool:
        """Whether this is a violation or an error."""
        return self.status in (VIOLATION, ERROR)


def fingerprint(law: str, variant: str, measurement: Measurement) -> str:
    """Return the identity of a violation: law, variant, tensor role, symptom; never ratio, seed or layer name.

    A violation that a documented bound explains is named after the bound, whatever tensor shows it.
    """
    if measurement.ratio > 1 and measurement.beyond <= 1:
        return f"{law}|{variant}|{measurement.explained or 'documented'}"
    role = measurement.role.partition(":")[2] or measurement.role.rpartition(".")[2]
    return f"{law}|{variant}|{role}|{measurement.symptom}"


def crash_fingerprint(variant: str, place: str) -> str:
    """Return the identity of a crash: variant, type and innermost library frame; the same for every law it stops."""
    return f"crash|{variant}|{place}"
