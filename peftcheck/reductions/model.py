"""The ways in which a case on a whole model can be made smaller: fewer targets, fewer blocks, plain names."""

from __future__ import annotations

from dataclasses import replace

from peftcheck import transformer_models
from peftcheck.case import Case
from peftcheck.implementation import Variant
from peftcheck.reductions.candidate import Candidate


def fewer_blocks(case: Case, variant: Variant) -> list[Candidate]:
    """Leave out the last blocks of the model, and the targets in them."""
    chosen = transformer_models.settings(case)
    found = []
    for blocks in (n for n in (1, 2) if n < chosen["blocks"]):
        layers = transformer_models.layers(case.sweep.layer, {**chosen, "blocks": blocks})
        places = {spec.name: index for index, spec in enumerate(layers)}
        adapters = []
        for adapter in case.adapters:
            named = (case.layers[target].name for target in adapter.targets)
            targets = tuple(sorted(places[name] for name in named if name in places))
            adapters += [replace(adapter, targets=targets)] if targets else []
        extra = tuple(sorted({**dict(case.extra), "blocks": blocks}.items()))
        if adapters:
            made = replace(case, layers=layers, adapters=tuple(adapters), extra=extra)
            found.append(Candidate(made, f"{blocks} blocks hold; {chosen['blocks']} violate"))
    return found


def plain_model(case: Case, variant: Variant) -> list[Candidate]:
    """Name the targets in full, and let the head be."""
    found = []
    if case.setting("spelling") not in (None, "names"):
        extra = tuple(sorted({**dict(case.extra), "spelling": "names"}.items()))
        found.append(
            Candidate(replace(case, extra=extra), f"named in full it holds; {case.setting('spelling')} violates")
        )
    if case.setting("save_head"):
        extra = tuple(sorted({**dict(case.extra), "save_head": False}.items()))
        found.append(Candidate(replace(case, extra=extra), "without a head that is trained as a whole it holds"))
    return found
