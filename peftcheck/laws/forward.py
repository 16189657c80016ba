"""The adapted model computes what the paper says."""

from __future__ import annotations

from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.measurement import Measurement, compare, worst
from peftcheck.rounding import judged
from peftcheck.stage import Stage


@law(
    "forward.oracle",
    "abs(adapted(x) - closed form(x)) <= running error bound",
    (Op.FORWARD,),
    "the (IA)^3 gate on the wrong side of a feed-forward layer; a dilation that the adapter's convolution drops",
    on="both",
)
def oracle(stage: Stage) -> Measurement | None:
    """Compare each adapted layer's output with the closed form on the input that the layer received."""
    if not stage.outputs_count:
        return None
    found = []
    for name, seen in stage.records().items():
        form = stage.output(name, seen.x)
        if not stage.sound(form):
            continue
        found.append(compare(f"{name}:output", seen.y, form.value, judged(form, machine=stage.machine.base.store)))
    return worst(found) if found else None
