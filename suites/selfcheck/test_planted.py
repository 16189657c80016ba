"""A second defect in the cells of a listed one stays visible: the bias defect planted under the epsilon entry."""

from __future__ import annotations

import pytest

from peftcheck import generator, ledger
from peftcheck.case import Sweep
from peftcheck.engine import check
from peftcheck.faults import FAULTS, Faulty
from peftcheck.implementations.peft import Peft
from peftcheck.law import laws

PLANTED = next(fault for fault in FAULTS if fault.name == "unmerge.bias-multiplied")


@pytest.mark.parametrize("layer", ["conv2d", "conv3d"])
def test_bias_multiplied_under_the_epsilon_entry_is_red(layer):
    sound, faulty = Peft(), Faulty(Peft(), PLANTED)
    (law,) = laws("merge.roundtrip")
    court = ledger.Court(ledger.load(sound.ledger), sound, laws())
    variant = sound.variants()["ia3"]
    listed = planted = 0
    for index in range(30):
        case = generator.draw(variant, Sweep("peft", "ia3", layer, "float64"), 7, index)
        (before,), (after,) = check(sound, case, [law]), check(faulty, case, [law])
        if not before.failed or not any(spec.bias for spec in case.layers):
            continue
        assert court.absorbs(before, case) == "ia3-epsilon"
        listed += 1
        if after.fingerprint != before.fingerprint:
            assert after.fingerprint == "merge.roundtrip|ia3|bias|numeric"
            assert court.absorbs(after, case) is None
            planted += 1
    assert listed and planted
