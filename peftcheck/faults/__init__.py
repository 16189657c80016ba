"""Deliberate defects, to prove that the laws catch them: who tests the tests.

Every fault sits at the port, between the harness and any implementation, so that the catalogue serves the reference
implementation and a real library alike. A fault that survives, or a law that catches none, is a gap in the harness.
"""

from __future__ import annotations

from peftcheck.faults import (
    combining,
    keeping,
    merging,
    outputs,
    quantizing,
    refusing,
    safe_merging,
    sequencing,
    stating,
    structure,
    training,
)
from peftcheck.faults.fault import Fault, Faulty, Port, replacing
from peftcheck.faults.matrix import FaultResult, idle, kill_matrix, records

FAULTS: tuple[Fault, ...] = tuple(
    fault
    for module in (
        outputs,
        merging,
        keeping,
        safe_merging,
        refusing,
        combining,
        quantizing,
        sequencing,
        stating,
        structure,
        training,
    )
    for fault in module.FAULTS
)

__all__ = ["FAULTS", "Fault", "FaultResult", "Faulty", "Port", "idle", "kill_matrix", "records", "replacing"]
