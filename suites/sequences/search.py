"""How long sequences take to find each fault that only they can find, and how many steps a second they play.

    python suites/sequences/search.py --seeds 20

For each fault and seed, cases are drawn and their programs played until the law `state.sequence` catches the fault;
the steps played until then are counted. Prints the median, the least and the most over the seeds, and the rate (CPU time;
building, attaching and the plain merge that each case is asked first are in it).

Measured with 20 seeds on a busy two-core machine: `sequence.merge-after-delete` 138 steps (20 to 408),
`sequence.merge-after-disable` 209 (10 to 1,655), `sequence.train-moves-others` 296 (54 to 1,638); 254 steps a second.
"""

from __future__ import annotations

import argparse
import statistics
import time

from peftcheck import engine, generator
from peftcheck.case import Sweep
from peftcheck.faults import FAULTS, Faulty
from peftcheck.implementations.reference import Reference
from peftcheck.law import laws
from peftcheck.programs import program

MOST = 20_000  # steps, after which a fault counts as not found


def main() -> None:
    """Search, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    reference, (law,) = Reference(), laws("state.sequence")
    variants = reference.variants()
    played, started = 0, time.process_time()
    for fault in (one for one in FAULTS if one.laws == (law.name,)):
        library = Faulty(reference, fault)
        names = fault.variants or tuple(variants)
        dtypes = fault.dtypes or ("float32",)
        found = []
        for seed in range(options.seeds):
            steps = 0
            for index in range(MOST):
                name = names[index % len(names)]
                sweep = Sweep("reference", name, "linear", dtypes[index % len(dtypes)])
                case = generator.draw(variants[name], sweep, seed, index, exact=index % 2 == 0)
                steps += len(program(case))
                (outcome,) = engine.check(library, case, [law])
                if outcome.failed or steps > MOST:
                    break
            found.append(steps)
            played += steps
        print(f"{fault.name:32} median {statistics.median(found):6.0f} steps, {min(found)} to {max(found)}", flush=True)
    seconds = time.process_time() - started
    print(f"{played} steps in {seconds:.0f} s of one core: {played / seconds:.0f} steps a second")


if __name__ == "__main__":
    main()
