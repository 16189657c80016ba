"""How fast the engine is, and where the time goes."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from peftcheck import engine, generator, suite
from peftcheck import implementation as port
from peftcheck.law import laws
from peftcheck.oracle import FORMULAS
from peftcheck.outcome import SKIP

_HERE = Path(__file__).parent
_PARTS = ("library", "oracle and budgets", "laws", "restore", "generate and build", "engine")


def show(target: str, seconds: float, filters: dict[str, tuple[str, ...]]) -> None:
    """Walk sweeps for a while, unprofiled for the rate, then profiled for the shares; print both."""
    implementation = port.load(target)
    everything = laws()
    chosen = suite.cells(
        implementation, everything, suite.validated(suite.Filters(**filters), implementation, everything)
    )
    sweeps = [
        s for s in dict.fromkeys(c.sweep for c in chosen) if s.layer in implementation.variants()[s.variant].layers
    ]
    checks, cases, spent = _walk(implementation, sweeps, everything, seconds / 2)
    profiler = cProfile.Profile()
    profiler.enable()
    _walk(implementation, sweeps, everything, seconds / 2)
    profiler.disable()
    shares = _shares(pstats.Stats(profiler), implementation.folders)
    console = Console()
    console.print(
        f"{checks / spent:.0f} law checks a second on one core ({checks} checks, {cases} cases, {spent:.1f} s)"
    )
    table = Table("part", "share of the time")
    for part in _PARTS:
        table.add_row(part, f"{shares[part]:.0%}")
    console.print(table)


def _walk(implementation, sweeps, everything, seconds: float) -> tuple[int, int, float]:
    started, checks, index = time.perf_counter(), 0, 0
    while True:
        for sweep in sweeps:
            if time.perf_counter() - started > seconds:
                return checks, index, time.perf_counter() - started
            variant = implementation.variants()[sweep.variant]
            case = generator.draw(variant, sweep, 1, index, FORMULAS[variant.formula].dyadic and index % 2 == 0)
            checks += sum(outcome.status != SKIP for outcome in engine.check(implementation, case, everything))
            index += 1


def _shares(stats: pstats.Stats, folders: tuple[Path, ...]) -> Counter:
    """Attribute the own time of each function to a part; torch and Python built-ins to whoever called them."""
    table = stats.stats
    shares: Counter = Counter()
    for function, (_, _, own, _, callers) in table.items():
        part = _part(function[0], folders)
        if part:
            shares[part] += own
            continue
        weights = {caller: times[2] for caller, times in callers.items()}
        total = sum(weights.values()) or 1.0
        for caller, weight in weights.items():
            shares[_through(caller, table, folders)] += own * weight / total
    total = sum(shares.values()) or 1.0
    return Counter({part: share / total for part, share in shares.items()})


def _through(function: tuple, table: dict, folders: tuple[Path, ...], depth: int = 6) -> str:
    """Return the part on whose behalf a foreign function runs: that of its main caller, a few levels up."""
    part = _part(function[0], folders)
    if part or depth == 0:
        return part or "engine"
    callers = table.get(function, (0, 0, 0, 0, {}))[4]
    if not callers:
        return "engine"
    main = max(callers, key=lambda caller: callers[caller][3])
    return _through(main, table, folders, depth - 1)


def _part(filename: str, folders: tuple[Path, ...]) -> str | None:
    path = Path(filename)
    if any(path.is_relative_to(folder) for folder in folders) and not path.is_relative_to(_HERE):
        return "library"
    if not path.is_relative_to(_HERE):
        return None
    name = path.relative_to(_HERE).parts[0]
    if name in ("oracle", "budgets", "rounding.py"):
        return "oracle and budgets"
    if name in ("laws", "measurement.py", "stage.py", "architecture.py"):
        return "laws"
    if name == "memento.py":
        return "restore"
    if name in ("generator.py", "models.py", "values.py", "case.py"):
        return "generate and build"
    if name == "implementations":
        return "library"
    return "engine"
