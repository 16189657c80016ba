"""An adapter is attached to the layers that it was asked for."""

from __future__ import annotations

from peftcheck.law import law
from peftcheck.measurement import NOTHING, Measurement, broken
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
            return broken(f"{besides[0]}:attach", "adapted besides", f"'{adapter.name}' also adapts {', '.join(besides)}")
    return NOTHING
