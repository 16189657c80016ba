"""Walk many fresh cases of the reference implementation over all laws or some, and print what came of each law.

    python suites/reference/soak.py --cases 20000 --seed 1

Not a test: the figures tell how close a correct implementation comes to each budget (worst ratio), and whether any law
has nothing to say (vacuous cells: law and sweep, none of whose cases has an effect). Exit code 1 on any violation or
error of the library, 3 where a cell is vacuous. `--implementation` walks another one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from fnmatch import fnmatchcase

from peftcheck import engine, generator, implementation
from peftcheck.case import Sweep, encode
from peftcheck.law import laws as all_laws
from peftcheck.outcome import PASS, SKIP
from peftcheck.rounding import DTYPES


def main() -> int:
    """Walk and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", default="peftcheck.implementations.reference:Reference")
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--law", action="append")
    parser.add_argument("--layer", action="append", help="globs; without, every layer and whole model")
    parser.add_argument("--variant", action="append")
    options = parser.parse_args()
    library, laws = implementation.load(options.implementation), all_laws(*options.law or ())
    variants = library.variants()
    sweeps = [
        Sweep(library.name, name, layer, dtype)
        for name, variant in variants.items()
        if options.variant is None or name in options.variant
        for layer in sorted(variant.layers)
        if options.layer is None or any(fnmatchcase(layer, pattern) for pattern in options.layer)
        for dtype in DTYPES
        if dtype in variant.dtypes
    ]
    structural = {law.name for law in laws if law.structural}
    checked, failed, worst, effects = Counter(), defaultdict(list), defaultdict(float), defaultdict(list)
    started = time.time()
    for index in range(options.cases):
        sweep, number = sweeps[index % len(sweeps)], index // len(sweeps)
        case = generator.draw(variants[sweep.variant], sweep, options.seed, number, exact=number % 3 == 0)
        for outcome in engine.check(library, case, laws):
            if outcome.status == SKIP:
                continue
            checked[outcome.law] += 1
            if outcome.failed:
                failed[outcome.law].append((outcome, case))
            elif outcome.measurement is not None:
                worst[outcome.law] = max(worst[outcome.law], outcome.measurement.ratio)
            if outcome.status == PASS and outcome.law not in structural and not outcome.exempt:
                effects[outcome.law, str(sweep)].append(outcome.effect)
    vacuous = Counter(law for (law, _), found in effects.items() if max(found) == 0)
    print(f"{options.cases} cases on {len(sweeps)} sweeps, seed {options.seed}, {time.time() - started:.0f} s")
    print(f"{'law':28} {'checks':>8} {'failed':>7} {'vacuous':>8} {'worst ratio':>12}")
    for law in laws:
        if checked[law.name]:
            row = (checked[law.name], len(failed[law.name]), vacuous[law.name], worst[law.name])
            print("{:28} {:>8} {:>7} {:>8} {:>12.4f}".format(law.name, *row))
    for law, found in failed.items():
        for outcome, case in found[:3]:
            print(f"{law}: {outcome.message} on {case.words()}\n  {encode(case, law)}")
    return 1 if any(failed.values()) else 3 if vacuous else 0


if __name__ == "__main__":
    sys.exit(main())
