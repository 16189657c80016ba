"""What scripts do for the laws of safe merges and of refusals."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftcheck.laws.attach import dotted
from peftcheck.laws.safe_merge import Poisoned
from peftcheck.outcome import Outcome
from peftcheck.repro import merging
from peftcheck.repro.model import indented, literal
from peftcheck.repro.scene import Scene, compared
from peftcheck.rounding import judged
from peftcheck.spelling import text

_WRITTEN = "bits = lambda: {%s}"


def clones(scene: Scene) -> str:
    """Return the line that makes `bits`: a clone of every base tensor, by name."""
    keys = [(spec.name, key) for spec in scene.stage.case.layers for key in scene.stage.base(spec.name)]
    items = (f"{text(f'{name}.{key}')}: {scene.say.base(name, key)}.detach().clone()" for name, key in keys)
    return _WRITTEN % ", ".join(items)


def _attempt(statement: str, refused: Sequence[str], accepted: Sequence[str]) -> list[str]:
    return [
        "try:",
        f"    {statement}",
        "except ValueError as error:",
        *indented(refused),
        "else:",
        *indented(accepted),
    ]


def rejects(scene: Scene) -> list[str] | None:
    """Merge a poisoned adapter safely."""
    poisoned = scene.poisoned
    if poisoned is None:
        return None
    own = (scene.stage.names[poisoned.adapter],)
    if scene.measured.symptom.startswith("accepted"):
        return _accepted(scene, poisoned, own)
    statement = scene.say.merge(own, True)
    if scene.measured.symptom == "refused":
        refused = [
            'print("found: refused:", error)',
            'print("expected: accepted, the merge is finite")',
            "raise SystemExit(1)",
        ]
        return _attempt(statement, refused, ['print("accepted")'])
    form = poisoned.forms[scene.site][scene.tensor]
    allowed = judged(form, machine=scene.stage.machine.base.store)
    return [statement, f"found = {scene.current()}", *compared(literal(form.value), allowed)]


def _accepted(scene: Scene, poisoned: Poisoned, adapters: Sequence[str]) -> list[str]:
    """Return the lines for a merge that had to be refused and was not, which breaks every law on refusals."""
    tensor = next(iter(poisoned.forms[poisoned.site]))
    held = f"{scene.say.base(poisoned.site, tensor)}.tolist()"
    accepted = [
        f'print("found: accepted, merged", {held})',
        'print("expected: a refusal")',
        "raise SystemExit(1)",
    ]
    return _attempt(scene.say.merge(adapters, True), ['print("refused:", error)'], accepted)


def _half_done(scene: Scene, adapters: Sequence[str], sites: Sequence[str]) -> list[str]:
    marked = ", ".join(f"{text(name)}: {scene.say.merged(name)}" for name in sites)
    kept = " or ".join(f"name.startswith({text(name + '.')})" for name in sites)
    return [
        clones(scene),
        "before = bits()",
        "try:",
        f"    {scene.say.merge(adapters, True)}",
        '    raise SystemExit(print("accepted"))',
        "except ValueError as error:",
        '    print("refused:", error)',
        f"changed = [name for name in before if ({kept}) and not torch.equal(before[name], bits()[name])]",
        f"marked = {{name: list(own) for name, own in {{{marked}}}.items() if own}}",
        'print("found: written", {name: bits()[name].tolist() for name in changed}, "marked as merged", marked)',
        'print("expected: nothing written,", {name: before[name].tolist() for name in changed}, "nothing marked")',
        "raise SystemExit(int(bool(changed or marked)))",
    ]


def atomic(scene: Scene) -> list[str] | None:
    """Let a merge be refused, and look at the refusing layer."""
    if scene.poisoned is None:
        return None
    own = (scene.stage.names[scene.poisoned.adapter],)
    if scene.measured.symptom.startswith("accepted"):
        return _accepted(scene, scene.poisoned, own)
    return _half_done(scene, own, (scene.poisoned.site,))


def all_or_nothing(scene: Scene) -> list[str] | None:
    """Let a merge be refused, and look at the whole model."""
    if scene.poisoned is None:
        return None
    if scene.measured.symptom.startswith("accepted"):
        return _accepted(scene, scene.poisoned, scene.stage.names)
    return _half_done(scene, scene.stage.names, scene.stage.targeted)


def names(scene: Scene) -> list[str] | None:
    """Let a merge be refused, and read the message."""
    if scene.poisoned is None:
        return None
    name = scene.stage.names[scene.poisoned.adapter]
    if scene.measured.symptom.startswith("accepted"):
        return _accepted(scene, scene.poisoned, (name,))
    judge = [
        f'print("found:", error, "expected: the name {name}")',
        f"raise SystemExit(int({text(name)} not in str(error)))",
    ]
    return _attempt(scene.say.merge((name,), True), judge, ['print("accepted")'])


def attach(act: Sequence[str], outcome: Outcome) -> list[str]:
    """Attach where the library does not, and look at what it leaves of the user's model."""
    symptom = outcome.measurement.symptom if outcome.measurement else ""
    crash = symptom.removeprefix("crash: ").partition(" ")[0] if symptom.startswith("crash: ") else ""
    return [
        "given, start = model, {name: p.detach().clone() for name, p in model.named_parameters()}",
        "try:",
        *indented(act),
        "except Exception as error:",
        '    print("found:", type(error).__name__, error)',
        f"    wrong = type(error).__name__ == {text(crash)}",
        "else:",
        '    print("found: attached")',
        "    wrong = True",
        "after = described(given)",
        "changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]",
        "changed += [name for name, p in given.named_parameters() if name in start and not torch.equal(p, start[name])]",
        'print("changed:", changed, "expected: a clear refusal, and nothing changed")',
        "raise SystemExit(int(wrong or bool(changed)))",
    ]


def dotted_name(scene: Scene) -> list[str] | None:
    """Add an adapter whose name holds a dot."""
    symptom = scene.measured.symptom
    if scene.say.add is None or not symptom.startswith("crash: "):
        return None
    first, crash = scene.stage.names[0], symptom.removeprefix("crash: ").partition(" ")[0]
    return [
        "try:",
        "    " + scene.say.add(first).replace(text(first), text(dotted(scene.stage)), 1),
        "except Exception as error:",
        '    print("found:", type(error).__name__, error, "expected: a clear refusal")',
        f"    raise SystemExit(int(type(error).__name__ == {text(crash)}))",
        'print("added")',
    ]


def unload_after_refusal(scene: Scene) -> list[str] | None:
    """Let a merge be refused, unload, and compare the model with the base."""
    refused = [
        "try:",
        f"    {scene.say.merge(scene.stage.names[:1], True)}",
        "except Exception as error:",
        '    print("refused:", error)',
    ]
    exported = merging.unload(scene)
    return None if exported is None else [*refused, *exported]


def agrees(scene: Scene) -> list[str]:
    """Merge and unmerge unsafely, put the tensor back, and do it safely."""
    stage = scene.stage
    allowed = torch.stack(
        [2 * stage.merged(scene.site)[scene.tensor].bound, 2 * stage.roundtrip(scene.site)[scene.tensor]]
    )
    lines = [f"start, results = {scene.current()}, []", "for safe in (False, True):"]
    each = [
        f"{scene.say.base(scene.site, scene.tensor)}.data.copy_(start)",
        scene.say.merge(stage.names, False).replace("False", "safe"),
        f"results.append({scene.current()})",
        scene.say.unmerge,
        f"results.append({scene.current()})",
    ]
    halves = "expected, found = torch.stack(results[:2]), torch.stack(results[2:])"
    return [*lines, *indented(each), halves, *compared(None, allowed)]


def refused_merge(scene: Scene) -> list[str]:
    """Merge where the library does not."""
    name = scene.stage.names[:1]
    crash = scene.measured.symptom.removeprefix("crash: ").split(" ")[0]
    crashed = scene.measured.symptom.startswith("crash: ")
    wrong = f"type(error).__name__ == {text(crash)}" if crashed else "False"
    each = [
        "try:",
        "    " + scene.say.merge(name, False).replace("False", "safe"),
        '    print("found: accepted")',
        "    wrong = True",
        "except Exception as error:",
        '    print("found:", type(error).__name__, error)',
        f"    wrong = wrong or {wrong}",
        "wrong = wrong or any(not torch.equal(before[name], tensor) for name, tensor in bits().items())",
        f"wrong = wrong or bool({scene.say.merged(scene.stage.targeted[0])})",
    ]
    head = [clones(scene), "before, wrong = bits(), False", "for safe in (False, True):"]
    return [
        *head,
        *indented(each),
        'print("expected: a clear refusal, nothing written")',
        "raise SystemExit(int(wrong))",
    ]
