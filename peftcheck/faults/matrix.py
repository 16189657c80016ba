"""The kill matrix: which law catches which fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from peftcheck import engine, generator, quantizers
from peftcheck.case import SUBJECTS, Case, Sweep, encode
from peftcheck.errors import HarnessError
from peftcheck.faults.fault import Fault, Faulty
from peftcheck.generator_combine import combination_case
from peftcheck.implementation import Claim, Implementation
from peftcheck.law import Law
from peftcheck.laws.refuse import attach_refused
from peftcheck.outcome import ERROR, PASS, VIOLATION, Outcome
from peftcheck.record import FaultRecord
from peftcheck.rounding import DTYPES

_SOURCES = {path.name for path in Path(__file__).parent.glob("*.py")}
_WALK = 400  # cases drawn on a sweep, not built, in search of those that suit a fault


@dataclass(frozen=True)
class FaultResult:
    """What became of a fault.

    `cases`: on how many it was tried; none where the implementation has nothing that suits it. `kills`: on how many
    of them each law failed with the fault and held without. `masked`: laws that must catch it and never held without
    it, so that they could not (the library itself has the defect). `token` replays the first kill (without the
    fault the law holds there).
    """

    fault: Fault
    cases: int
    kills: tuple[tuple[str, int], ...]
    masked: tuple[str, ...] = ()
    token: str | None = None

    @property
    def laws(self) -> tuple[str, ...]:
        """The names of the laws that caught it."""
        return tuple(name for name, _ in self.kills)

    @property
    def tried(self) -> bool:
        """Whether there was a case to try it on."""
        return self.cases > 0

    @property
    def survived(self) -> bool:
        """Whether it was tried and no law caught it though one could have."""
        return self.tried and not self.kills and not self.masked


def kill_matrix(
    implementation: Implementation,
    faults: Sequence[Fault],
    laws: Sequence[Law],
    cases: int = 8,
    seed: int = 0,
) -> tuple[FaultResult, ...]:
    """Try every fault on up to `cases` cases that suit it, and return which of the laws caught it.

    A law catches a fault if on the same case it fails with the fault and holds without. Raises HarnessError where a
    fault's own source crashes and is not meant to.
    """
    sound: dict[str, dict[str, str]] = {}
    return tuple(_try(implementation, fault, laws, cases, seed, sound) for fault in faults)


def idle(results: Sequence[FaultResult], laws: Sequence[Law]) -> tuple[str, ...]:
    """Return the laws that caught no fault: they prove nothing until one is found that they catch.

    Laws that had no chance are left out: masked, or none of whose faults suits the implementation.
    """
    chance = {name for result in results if result.tried for name in result.fault.laws}
    hopeless = {name for result in results for name in result.fault.laws} - chance
    hopeless |= {name for result in results for name in result.masked}
    caught = {name for result in results for name in result.laws}
    return tuple(law.name for law in laws if law.name not in caught | hopeless)


def records(results: Sequence[FaultResult]) -> tuple[FaultRecord, ...]:
    """Return the results as a record has them; faults that nothing suited are left out."""
    return tuple(
        FaultRecord(
            name=result.fault.name,
            description=result.fault.description,
            models=result.fault.models,
            laws_killing=result.laws,
            killed=not result.survived,
        )
        for result in results
        if result.tried
    )


def _try(implementation, fault: Fault, laws: Sequence[Law], count: int, seed: int, sound: dict) -> FaultResult:
    faulty = Faulty(implementation, fault)
    kills: dict[str, int] = {}
    held: set[str] = set()
    failing: set[str] = set()
    token, tried = None, 0
    for case in suitable(implementation, fault, count, seed):
        tried += 1
        key = encode(case, "")
        if key not in sound:
            sound[key] = {outcome.law: outcome.status for outcome in _check(implementation, case, laws)}
        held |= {law for law, status in sound[key].items() if status == PASS}
        failing |= {law for law, status in sound[key].items() if status in (VIOLATION, ERROR)}
        for outcome in _check(faulty, case, laws):
            if outcome.failed and sound[key].get(outcome.law) == PASS:
                _own_crash(fault, outcome)
                kills[outcome.law] = kills.get(outcome.law, 0) + 1
                token = token or encode(case, outcome.law)
    masked = tuple(sorted((failing - held) & set(fault.laws)))
    return FaultResult(fault, tried, tuple(sorted(kills.items())), masked, token)


def _check(implementation: Implementation, case: Case, laws: Sequence[Law]) -> list[Outcome]:
    """Check the laws on a case; on a layer that the variant does not accept: that it is refused."""
    variant, kind = implementation.variants()[case.sweep.variant], case.setting("kind")
    if case.sweep.layer in variant.layers or case.sweep.quantizer is not None:
        promise = variant.combinations.get(kind)
        chosen = [law for law in laws if (law.of_kind(kind, promise) if kind else not law.kinds)]
        return engine.check(implementation, case, chosen)
    with engine.pinned():
        found = attach_refused(implementation, case)
    status = PASS if found.holds else VIOLATION
    return [Outcome(law.name, status, found) for law in laws if law.name == "refuse.attach"]


def _own_crash(fault: Fault, outcome: Outcome) -> None:
    """Raise where a crash comes from the fault's own source by mistake: such a kill would prove nothing."""
    place = (outcome.fingerprint or "").rpartition(" in ")[2].partition(":")[0]
    if outcome.status == ERROR and place in _SOURCES and not fault.crashes and not _is_refusal(outcome):
        raise HarnessError(f"fault {fault.name} itself crashes: {outcome.message}")


def _is_refusal(outcome: Outcome) -> bool:
    return outcome.message.startswith("ValueError")


def suitable(implementation: Implementation, fault: Fault, count: int, seed: int = 0) -> Iterator[Case]:
    """Yield up to `count` cases that suit a fault, one sweep after the other in turn."""
    walks = [_walk(implementation, fault, sweep, seed) for sweep in _sweeps(implementation, fault)]
    while walks and count > 0:
        for walk in list(walks):
            case = next(walk, None)
            if case is None:
                walks.remove(walk)
                continue
            yield case
            count -= 1
            if count == 0:
                return


def _sweeps(implementation: Implementation, fault: Fault) -> list[Sweep]:
    """Return the sweeps on which a fault means something, ordered so that the first few differ in everything."""
    variants = implementation.variants()
    if fault.quantizers:
        return [
            Sweep(implementation.name, name, "linear", dtype, quantizer)
            for name, quantizer in product(variants, fault.quantizers)
            if (not fault.variants or name in fault.variants)
            and quantizers.available(quantizer)
            and quantizer in variants[name].quantizers
            and (variants[name].quantizers[quantizer] is Claim.YES) is not fault.unsupported
            for dtype in quantizers.DECLARED[quantizer].dtypes
            if not fault.dtypes or dtype in fault.dtypes
        ]
    chosen = [name for name in variants if not fault.variants or name in fault.variants]
    found = [
        Sweep(implementation.name, name, layer, dtype)
        for name, layer, dtype in product(chosen, SUBJECTS, DTYPES)
        if (layer in variants[name].layers) is not fault.unsupported
        and (not fault.layers or layer in fault.layers)
        and (not fault.dtypes or dtype in fault.dtypes)
        and dtype in variants[name].dtypes
    ]
    # a fixed stride that is coprime to the number of sweeps visits all of them, neighbours far apart
    stride = next(s for s in range(max(1, len(found) * 5 // 13), 2 * len(found) + 2) if _coprime(s, max(1, len(found))))
    return [found[index * stride % len(found)] for index in range(len(found))]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def _walk(implementation: Implementation, fault: Fault, sweep: Sweep, seed: int) -> Iterator[Case]:
    variant = implementation.variants()[sweep.variant]
    kinds = [kind for kind in fault.kinds if kind in variant.combinations]
    if fault.kinds and not kinds:
        return
    for index in range(_WALK):
        exact = index % 2 == 0 if fault.exact is None else fault.exact
        if kinds:
            case = combination_case(variant, sweep, kinds[index // 2 % len(kinds)], seed, index, exact)
        else:
            case = generator.draw(variant, sweep, seed, index, exact)
        if fault.exact is True and case.profile != "dyadic":
            return
        if fault.suits(case):
            yield case
