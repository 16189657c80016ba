"""What a script does for each law: act, compare, and exit 1 if the defect shows."""

from __future__ import annotations

from functools import partial

from peftcheck.implementation import Inverts
from peftcheck.laws.train_modes import mixed_rows
from peftcheck.repro import combining, keeping, merging, paths, refusing, sequencing, training
from peftcheck.repro.model import indented
from peftcheck.repro.scene import Body, Scene

BODIES: dict[str, Body] = {
    "forward.oracle": merging.outputs,
    "merge.forward": merging.forward,
    "merge.oracle": merging.oracle,
    "merge.delta": merging.delta,
    "merge.roundtrip": merging.roundtrip,
    "merge.drift": merging.drift,
    "merge.disable": merging.disable,
    "merge.export": merging.export,
    "merge.unload": merging.unload,
    "merge.isolated": merging.isolated,
    "merge.preserves": merging.preserves,
    "safe_merge.rejects": refusing.rejects,
    "safe_merge.atomic": refusing.atomic,
    "safe_merge.all_or_nothing": refusing.all_or_nothing,
    "safe_merge.names": refusing.names,
    "safe_merge.agrees": refusing.agrees,
    "refuse.merge": refusing.refused_merge,
    "state.save_load": keeping.reload,
    "state.reload_merge": keeping.reload,
    "state.save_merged": keeping.save_merged,
    "state.checkpoint_size": keeping.size,
    "state.delete": keeping.delete,
    "merge.in_train_mode": training.in_train_mode,
    "merge.under_autocast": training.under_autocast,
    "merge.channels_last": training.channels_last,
    "train.dropout": training.dropout,
    "merge.under_inference_mode": partial(paths.within, mode="inference_mode"),
    "merge.under_no_grad": partial(paths.within, mode="no_grad"),
    "merge.after_to_dtype": paths.after_to_dtype,
    "merge.after_deepcopy": partial(paths.copied, law="merge.after_deepcopy"),
    "merge.after_pickle": partial(paths.copied, law="merge.after_pickle"),
    "attach.names": refusing.dotted_name,
    "forward.checkpointed": training.checkpointed,
    "train.identity_at_init": training.identity_at_init,
    "train.live_gradients": training.live_gradients,
    "train.base_frozen": training.base_frozen,
    "train.mixed_batch": training.mixed_batch,
    "refuse.mixed_batch": training.refused_mixed,
    "refuse.unload": refusing.unload_after_refusal,
    **{name: partial(sequencing.body, law=name) for name in sequencing.LAWS},
    **combining.BODIES,
}


def steps(scene: Scene, law: str) -> list[str] | None:
    """Return the calls into the library that the law makes, for a crash that needs no comparison."""
    say, stage = scene.say, scene.stage
    runs = [scene.runs(name) for name in stage.targeted]
    if law in sequencing.LAWS:
        return sequencing.crash(scene, law)
    if law in combining.BODIES:
        return combining.crash(scene, law)
    if law == "forward.oracle":
        return runs
    if law in ("safe_merge.rejects", "safe_merge.atomic", "safe_merge.names", "safe_merge.all_or_nothing"):
        poisoned = scene.poisoned
        own = stage.names if poisoned is None or law.endswith("nothing") else (stage.names[poisoned.adapter],)
        return [say.merge(own, True)]
    if law == "merge.delta":
        reported = [say.delta(name, stage.names[0]) for name in stage.targeted if 0 in stage.adapters_on(name)]
        return [*reported, say.merge(stage.names[:1], stage.case.safe)]
    if law == "merge.disable":
        disabled = [f"with {say.disabled}:", *indented(runs)]
        return [*disabled, *scene.merges(), *disabled]
    if law == "merge.channels_last":
        formats = {"conv2d": "channels_last", "conv3d": "channels_last_3d"}
        return [f"model.to(memory_format=torch.{formats[stage.case.sweep.layer]})", *scene.merges()]
    special = {
        "merge.in_train_mode": ["model.train()", *scene.merges()],
        "merge.under_autocast": ['with torch.autocast("cpu", dtype=torch.bfloat16):', *indented(scene.merges())],
        "merge.under_inference_mode": ["with torch.inference_mode():", *indented(scene.merges())],
        "merge.under_no_grad": ["with torch.no_grad():", *indented(scene.merges())],
        "train.dropout": ["model.train()", *runs],
    }
    if law in special:
        return special[law]
    if law == "train.mixed_batch":
        return training.mixed(scene, mixed_rows(stage))
    if law == "forward.checkpointed":
        return training.checkpointed(scene)[:-3]
    back = [] if stage.variant.inverts is Inverts.NEVER else [say.unmerge]
    return {
        "merge.forward": [*runs, *scene.merges(), *runs],
        "merge.oracle": scene.merges(),
        "merge.roundtrip": [*scene.merges(), *back],
        "merge.drift": [*scene.merges(), *back] * stage.case.cycles,
        "merge.isolated": [*scene.merges(), *back],
        "merge.preserves": [*scene.merges(), *back],
        "merge.export": [say.export(stage.names, stage.case.safe)],
        "merge.unload": [say.unload],
        "safe_merge.agrees": [say.merge(stage.names, False), *back, say.merge(stage.names, True), *back],
    }.get(law)
