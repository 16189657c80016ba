"""Walk real merges into quantized layers and print the worst ratio of each law, quantizer and method.

    python suites/quantize/ratios.py --cases 40 [--variant lora ...] [--quantizer NAME ...] [--seed N]

`--cases` are drawn for each variant, quantizer and dtype. Failures are counted by fingerprint, with a token each.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections import Counter, defaultdict

import torch
from scene import show

from peftcheck import engine, generator, quantizers
from peftcheck.case import Sweep, encode
from peftcheck.implementation import Claim
from peftcheck.implementations.peft import Peft
from peftcheck.law import laws as all_laws
from peftcheck.outcome import SKIP
from peftcheck.record import Table

NUMBERS = (
    "quantize.merge_budget",
    "quantize.roundtrip_budget",
    "quantize.drift",
    "quantize.zero_delta",
    "quantize.forward",
)


def main() -> int:
    """Walk and print; exit code 1 where a law failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variant", action="append")
    parser.add_argument("--quantizer", action="append")
    parser.add_argument("--law", default="quantize.*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    peft, laws = Peft(), all_laws(options.law)
    worst, checked, failures, merges = defaultdict(float), Counter(), {}, 0
    for name, variant in peft.variants().items():
        for quantizer, claim in variant.quantizers.items():
            wanted = claim is Claim.YES and quantizers.available(quantizer)
            if (
                not wanted
                or (options.variant and name not in options.variant)
                or (options.quantizer and quantizer not in options.quantizer)
            ):
                continue
            for dtype in quantizers.DECLARED[quantizer].dtypes:
                sweep = Sweep("peft", name, "linear", dtype, quantizer)
                for index in range(options.cases):
                    case = generator.draw(variant, sweep, options.seed, index)
                    with contextlib.redirect_stderr(None):
                        outcomes = engine.check(peft, case, [law for law in laws if law.concerns(variant)])
                    for outcome in outcomes:
                        checked[outcome.law, outcome.status] += 1
                        merges += (
                            (case.cycles if outcome.law in NUMBERS[2:4] else 1)
                            if outcome.law in NUMBERS[:4] and outcome.status != SKIP
                            else 0
                        )
                        if outcome.failed:
                            failures.setdefault(outcome.fingerprint, []).append(
                                (quantizer, dtype, encode(case, outcome.law), outcome.message)
                            )
                        elif outcome.measurement is not None:
                            key = (name, quantizer, outcome.law)
                            worst[key] = max(worst[key], outcome.measurement.ratio)
    rows = []
    for name, quantizer in dict.fromkeys((n, q) for n, q, _ in worst):
        rows.append((name, quantizer, *(worst.get((name, quantizer, law), "") for law in NUMBERS)))
    columns = ("method", "quantizer", *(law.partition(".")[2] for law in NUMBERS))
    show(
        Table("worst ratio where the law holds", columns, tuple(rows), f"{merges} merges behind the first four columns")
    )
    for fingerprint, found in sorted(failures.items()):
        quantized, dtypes = sorted({q for q, *_ in found}), sorted({d for _, d, *_ in found})
        print(
            f"{len(found):5d} {fingerprint} [{', '.join(quantized)}; {', '.join(dtypes)}]\n"
            f"      {found[0][3]}\n      {found[0][2]}"
        )
    print(
        dict(
            Counter(
                {status: sum(n for (_, s), n in checked.items() if s == status) for status in {s for _, s in checked}}
            )
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
