"""The adapted model computes what the paper says."""

from __future__ import annotations

from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.measurement import NOTHING, Measurement, broken, compare, worst
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


@law(
    "forward.targets",
    "each adapter sits on the layers that it was asked for, and on no others",
    (Op.FORWARD,),
    "PEFT's LoRA on parameters wraps another adapter's factors where a module bears that adapter's name",
    structural=True,
    logic=True,
    on="methods",
)
def targets(stage: Stage) -> Measurement | None:
    """Compare the layers that hold an adapter's tensors with those that it targets."""
    found = [NOTHING]
    for index, adapter in enumerate(stage.case.adapters):
        asked = {name for name in stage.targeted if index in stage.adapters_on(name)}
        got = set(stage.attached.sites(adapter.name))
        found += [
            broken(f"{name}:adapter", "missing", f"'{adapter.name}' is not on '{name}'") for name in sorted(asked - got)
        ]
        found += [
            broken(f"{name}:adapter", "unasked", f"'{adapter.name}' was not asked onto '{name}'")
            for name in sorted(got - asked)
        ]
    return worst(found)
