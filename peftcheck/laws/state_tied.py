"""Weights that two layers share: they stay shared, and the layer without adapter stays what it was until a merge."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from peftcheck import checkpoint, refusal
from peftcheck.case import Case
from peftcheck.implementation import Inverts, Op
from peftcheck.law import law
from peftcheck.laws.merge import merge_all
from peftcheck.measurement import NOTHING, Measurement, broken, compare, identical, worst
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import judged, leaf
from peftcheck.stage import Stage
from peftcheck.staging import set_up

Pairs = Sequence[tuple[str, str]]  # an adapted layer, and the one that shares its weight
TIED = "tied"  # the name of the layer that is added where a case shares no weight


def tied_case(case: Case) -> Case:
    """Return the case with a layer that shares its weight with one that the first adapter targets."""
    targets = {target for adapter in case.adapters for target in adapter.targets}
    names = {case.layers[target].name for target in targets}
    if any(spec.tied in names for spec in case.layers):
        return case
    partner = replace(case.layers[case.adapters[0].targets[0]], name=TIED)
    return replace(case, layers=(*case.layers, replace(partner, tied=case.layers[case.adapters[0].targets[0]].name)))


@law(
    "state.tied",
    "a weight that two layers share stays shared by attach, save, merge, unmerge, export; the other layer's output is due",
    (Op.FORWARD,),
    "merging into a tied embedding left the output layer with the old weight (huggingface/peft#2972)",
    structural=True,
    logic=True,
    sweeps=lambda sweep: sweep.layer != "mha",  # whose weight no other layer shares
)
def tied(stage: Stage) -> Measurement | None:
    """Share a weight of an adapted layer with one that has no adapter; follow both through an adapter's life.

    Attaching and saving leave the other layer's output bit-equal to the base's. A merge either changes both layers or
    is refused; then the other computes with the merged weight, within the running error of its forward pass. Budget
    of all else: 0.
    """
    if not stage.outputs_count:
        return None
    one = stage if tied_case(stage.case) == stage.case else set_up(stage.implementation, tied_case(stage.case))
    pairs = [(spec.tied, spec.name) for spec in one.case.layers if spec.tied in one.targeted]
    found = [_shared(one, pairs, "attaching"), _plain(one, pairs, "attaching")]
    if one.can(Op.SAVE):
        with tempfile.TemporaryDirectory(prefix="peftcheck-") as folder:
            one.attached.save(Path(folder), one.names)
        found += [_shared(one, pairs, "saving"), _plain(one, pairs, "saving")]
    if one.can(Op.MERGE) and one.finite and worst(found).holds:
        found += _merged(one, pairs)
    return worst(found)


def _merged(stage: Stage, pairs: Pairs) -> list[Measurement]:
    """Merge, unmerge, export: each keeps the pairs together."""
    refused = _refused(stage, lambda: merge_all(stage))
    if refused is not None:
        return refused
    found = [_shared(stage, pairs, "merging"), *(_computes(stage, *pair) for pair in pairs)]
    if stage.can(Op.UNMERGE) and stage.variant.inverts is not Inverts.NEVER:
        stage.attached.unmerge()
        found.append(_shared(stage, pairs, "unmerging"))
        if stage.can(Op.EXPORT) and worst(found).holds:
            exported: list[nn.Module] = []

            def export() -> None:
                exported.append(stage.attached.merge_and_unload(safe=stage.case.safe, adapters=stage.names))

            # what a round trip left of a base near overflow may rightly be refused
            found += _refused(stage, export) or [_exported(exported[0], pairs)]
    return found


def _refused(stage: Stage, act: Callable[[], None]) -> list[Measurement] | None:
    """Act; return whether a refusal left the base as it was, None where nothing was refused."""
    before = {key: tensor.detach().clone() for key, tensor in stage.attached.base_tensors().items()}
    try:
        act()
    except Exception as error:
        if not refusal.is_refusal(error, stage.implementation):
            raise
        now = stage.attached.base_tensors()
        return [identical(key, now[key], tensor, "written by a refused merge") for key, tensor in before.items()]
    return None


def _shared(stage: Stage, pairs: Pairs, after: str) -> Measurement:
    """Return whether both layers of each pair hold one weight."""
    tensors = stage.attached.base_tensors()
    for target, partner in pairs:
        if tensors[f"{target}.weight"].data_ptr() != tensors[f"{partner}.weight"].data_ptr():
            return broken(
                f"{partner}:weight",
                f"no longer shared after {after}",
                f"{target} and {partner} hold two weights after {after}",
            )
    return NOTHING


def _plain(stage: Stage, pairs: Pairs, after: str) -> Measurement:
    """Return whether the layers without adapter give the base's outputs, bit for bit."""
    run = checkpoint.tolerant(stage, lambda: [stage.call(partner, stage.inputs[partner]) for _, partner in pairs])
    if run is None:
        return NOTHING  # the plain layer of the library's own framework cannot run: nothing to compare
    return worst(
        identical(f"{partner}:output", y, stage.pristine_outputs[partner], f"changed by {after}")
        for (_, partner), y in zip(pairs, run, strict=True)
    )


def _computes(stage: Stage, target: str, partner: str) -> Measurement:
    """Return whether the layer without adapter computes with the weight that was merged into, right or wrong."""
    spec, x = stage.spec(partner), stage.inputs[partner]
    weight, before = stage.attached.base_tensors()[f"{target}.weight"], stage.base(partner)["weight"].value
    if weight.shape != before.shape:
        return broken(f"{target}:weight", "shape", f"{tuple(weight.shape)} after merging, was {tuple(before.shape)}")
    merged = leaf(weight, stage.machine.exact)
    due = layer_output(
        stage.machine.base, spec, {**stage.base(partner), "weight": merged}, stage.activation(partner, x)
    )
    if not stage.sound(due, merged):
        return NOTHING
    return compare(
        f"{partner}:output", stage.call(partner, x), due.value, judged(due, machine=stage.machine.base.store)
    )


def _exported(model: nn.Module, pairs: Pairs) -> Measurement:
    """Return whether the pairs of an exported model hold one parameter each."""
    for target, partner in pairs:
        if model.get_submodule(target).weight.data_ptr() != model.get_submodule(partner).weight.data_ptr():
            return broken(
                f"{partner}:weight",
                "no longer shared after exporting",
                f"{target} and {partner} are exported with two weights",
            )
    return NOTHING
