"""Run laws on a case: the pure function under the plugin, the command line and the replay.

Nothing here knows pytest. A case is built and attached once; each law starts from the same state, put back by a
memento of the object graph or, where that cannot see everything, by attaching anew.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from peftcheck import refusal, values
from peftcheck.case import Case
from peftcheck.errors import HarnessError, UsageError
from peftcheck.implementation import Claim, Implementation, Op
from peftcheck.law import Law
from peftcheck.laws.quantize_refuse import merge_refused
from peftcheck.laws.refuse import attach_refused
from peftcheck.measurement import Measurement, worst
from peftcheck.memento import Memento, Unrestorable
from peftcheck.outcome import ERROR, PASS, SKIP, VIOLATION, Outcome, crash_fingerprint, fingerprint
from peftcheck.stage import Stage
from peftcheck.staging import set_up

Watch = Callable[[Case, str], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Pin what numerics depend on (threads, precision, determinism, dtype, random state); put all of it back."""
    threads, matmul, dtype = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype()
    deterministic = torch.get_deterministic_debug_mode()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
        torch.set_deterministic_debug_mode("warn")  # as `use_deterministic_algorithms`, which imports the compiler too
        torch.set_flush_denormal(False)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(matmul)
            torch.set_default_dtype(dtype)
            torch.set_deterministic_debug_mode(deterministic)


@contextlib.contextmanager
def unwatched(case: Case, law: str) -> Iterator[None]:
    """Watch nothing: for callers without a watchdog."""
    yield


def check(implementation: Implementation, case: Case, laws: Sequence[Law], watch: Watch = unwatched) -> list[Outcome]:
    """Return one outcome per law, in order.

    `watch(case, law)` surrounds everything that the library does, for watchdogs and journals. Raises HarnessError
    when the harness itself is at fault; whatever the library raises becomes an outcome.
    """
    variant = implementation.variants().get(case.sweep.variant)
    if variant is None:
        raise UsageError(f"{implementation.name} has no variant '{case.sweep.variant}': see peftcheck list variants")
    with pinned():
        if case.sweep.quantizer is not None and variant.quantizers.get(case.sweep.quantizer) is not Claim.YES:
            return [_refused(implementation, case, law, watch, "quantize.refuses", merge_refused) for law in laws]
        if case.sweep.layer not in variant.layers:
            return [_refused(implementation, case, law, watch) for law in laws]
        return Scene(implementation, case, watch).run(laws)


def _refused(
    implementation: Implementation, case: Case, law: Law, watch: Watch, speaks="refuse.attach", judge_it=attach_refused
) -> Outcome:
    """Judge a layer that the variant does not accept: the one law that speaks of it is `refuse.attach`.

    Of a quantized layer that it must not merge into, `quantize.refuses`.
    """
    if law.name != speaks:
        return Outcome(law.name, SKIP)
    try:
        with watch(case, "attach"):
            measurement = judge_it(implementation, case)
    except Exception as error:  # what the library raises was judged inside
        raise HarnessError(f"{type(error).__name__}: {error} on {case.words()}") from error
    if measurement.holds:
        return Outcome(law.name, PASS, measurement, exempt=True)
    name = fingerprint(law.name, case.sweep.variant, measurement)
    return Outcome(law.name, VIOLATION, measurement, 0.0, True, name, words(measurement))


class Scene:
    """One case on stage, with the means of putting it back."""

    def __init__(self, implementation: Implementation, case: Case, watch: Watch = unwatched) -> None:
        self.implementation = implementation
        self.case = case
        self.watch = watch
        self.stage: Stage | None = None
        self.memento: Memento | None = None
        self.failure: Exception | None = None

    def run(self, laws: Sequence[Law]) -> list[Outcome]:
        """Return one outcome per law, each from the same start."""
        with self.watch(self.case, "attach"):
            self.attach()
        if self.failure is not None:
            return [self.crashed(law.name, self.failure) for law in laws]
        return [self._one(law) for law in laws]

    def attach(self) -> Exception | None:
        """Build and attach the case, and return what the library raised, if it did."""
        torch.default_generator.manual_seed(self.case.values)
        try:
            self.stage = set_up(self.implementation, self.case)
        except Exception as error:
            self.library_only(error)
            self.failure = error
            return error
        try:
            self.memento = Memento(self.stage.attached.roots())
        except Unrestorable:
            self.memento = None
        self.stage.put_back = self._put_back
        return None

    def _put_back(self) -> None:
        """Restore the start; where no memento could be taken, attach anew."""
        stage = self.stage
        torch.default_generator.manual_seed(self.case.values)
        if self.memento is not None:
            self.memento.restore()
            return
        fresh = set_up(self.implementation, self.case)
        stage.attached, stage.start, stage.start_adapters = fresh.attached, fresh.start, fresh.start_adapters
        stage.dense, stage.fresh = fresh.dense, fresh.fresh

    def _one(self, law: Law) -> Outcome:
        stage = self.stage
        if not applies(law, stage):
            return Outcome(law.name, SKIP)
        try:
            with self.watch(self.case, law.name):
                measurement = law.measure(stage)
        except Exception as error:
            self.library_only(error)
            return self.crashed(law.name, error)
        finally:
            self._put_back()
        if measurement is None:
            return Outcome(law.name, SKIP)
        return judge(law, stage, measurement)

    def library_only(self, error: Exception) -> None:
        """Raise HarnessError for what is not the library's own error."""
        if isinstance(error, HarnessError):
            raise error
        if not refusal.is_library(error, self.implementation):
            raise HarnessError(f"{type(error).__name__}: {error} on {self.case.words()}") from error

    def crashed(self, law: str, error: Exception) -> Outcome:
        """Return the outcome of a law that an error of the library stopped."""
        place = refusal.where(error, self.implementation)
        return Outcome(
            law,
            ERROR,
            fingerprint=crash_fingerprint(self.case.sweep.variant, place),
            message=f"{type(error).__name__}: {error}",
        )


def applies(law: Law, stage: Stage) -> bool:
    """Return whether the library claims what the law needs, and merging stays clear of overflow.

    Laws of codes say nothing about plain tensors, and the other way round.
    """
    if (law.group == "quantize") != (stage.case.sweep.quantizer is not None) or not law.sweeps(stage.case.sweep):
        return False
    if not law.asks(stage.variant, stage.case.sweep.layer):
        return False
    if not all(stage.claims(op) is Claim.YES for op in law.needs):
        return False
    if stage.case.whole and not stage.dispatched():
        return law.name == "attach.targets"
    return not {Op.MERGE, Op.EXPORT} & set(law.needs) or stage.finite


def judge(law: Law, stage: Stage, measurement: Measurement) -> Outcome:
    """Turn a measurement into an outcome: `ratio <= 1` holds, so that NaN violates."""
    variant = stage.variant
    if math.isfinite(measurement.bound) and measurement.bound < 0:
        raise HarnessError(f"negative budget in {law.name}")
    if variant.documented:
        measurement = replace(measurement, explained=",".join(variant.documented))
    effect = stage.effect()
    exempt = stage.case.profile in values.NO_EFFECT
    if measurement.holds:
        return Outcome(law.name, PASS, measurement, effect, exempt)
    name = fingerprint(law.name, variant.name, measurement)
    return Outcome(law.name, VIOLATION, measurement, effect, exempt, name, words(measurement))


def words(m: Measurement) -> str:
    """Say in one line what was found where."""
    at = f"[{', '.join(map(str, m.element))}]" if m.element else ""
    ratio = f"ratio {m.ratio:.3g} (residual {m.residual:.3g}, bound {m.bound:.3g})"
    return f"{m.role}{at}: {m.symptom}, {ratio}; {m.note}"


__all__ = ["Scene", "check", "pinned", "unwatched", "worst"]
