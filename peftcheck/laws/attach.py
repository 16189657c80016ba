"""An adapter is attached to the layers that it was asked for."""

from __future__ import annotations

from dataclasses import replace

from peftcheck import refusal
from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.measurement import NOTHING, Measurement, broken, identical, worst
from peftcheck.stage import Stage


@law(
    "attach.targets",
    "the adapted layers are those that the targets mean, as users spell them: ends of names, a pattern, blocks, all",
    (),
    "a block whose number begins another's; a name that is the end of another layer's",
    structural=True,
    on="models",
)
def targets(stage: Stage) -> Measurement | None:
    """Compare the layers that each adapter has with those that it was asked for."""
    for adapter in stage.case.adapters:
        wanted = {stage.case.layers[target].name for target in adapter.targets}
        found = set(stage.attached.sites(adapter.name))
        if missed := sorted(wanted - found):
            return broken(f"{missed[0]}:attach", "missed", f"'{adapter.name}' does not adapt {', '.join(missed)}")
        if besides := sorted(found - wanted):
            return broken(
                f"{besides[0]}:attach", "adapted besides", f"'{adapter.name}' also adapts {', '.join(besides)}"
            )
    return NOTHING


def dotted(stage: Stage) -> str:
    """Return a name that begins with the first adapter's and holds a dot, as a module of torch must not."""
    return f"{stage.names[0]}.b"


@law(
    "attach.names",
    "an adapter whose name holds a dot is added where it was asked for, or refused clearly with nothing changed",
    (Op.ADD,),
    "torch's KeyError, after the layer had entered the rank of an adapter that it never got",
    structural=True,
    concerns=lambda variant: variant.most_adapters > 1,
    sweeps=lambda sweep: sweep.dtype == "float32",
    on="methods",
)
def names(stage: Stage) -> Measurement | None:
    """Add an adapter like the first under such a name, and look at base, adapters and bookkeeping."""
    name = dotted(stage)
    try:
        stage.attached.add(replace(stage.case.adapters[0], name=name))
    except Exception as error:
        if not refusal.is_library(error, stage.implementation):
            raise
        if not refusal.is_refusal(error, stage.implementation):
            place = refusal.where(error, stage.implementation)
            return broken(
                ":name", f"crash: {place}", f"'{name}' cannot name an adapter, and adding it crashes: {error}"
            )
        wanted: set[str] = set()
    else:
        wanted = {stage.case.layers[target].name for target in stage.case.adapters[0].targets}
    if set(stage.attached.sites(name)) != wanted:
        return broken(":name", "half added", f"'{name}' is on {stage.attached.sites(name)}, due is {sorted(wanted)}")
    tensors, found = stage.attached.base_tensors(), []
    found += [
        identical(f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}", tensors[key], t)
        for key, t in stage.start.items()
    ]
    for other in stage.names:
        now = stage.attached.adapter_tensors(other)
        for (site, role), tensor in stage.start_adapters[other].items():
            found.append(identical(f"{site}:{role} of the adapter", now[site, role], tensor))
    return worst(found)
