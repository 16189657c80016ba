"""A standalone script for a failing case: torch and the library, explicit tensors, exit code 1 if the defect shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcheck import engine, models, quantizers
from peftcheck.case import Case, encode
from peftcheck.implementation import Attached, Implementation
from peftcheck.law import Law
from peftcheck.laws import quantize_safe
from peftcheck.laws.safe_merge import administer
from peftcheck.measurement import NOTHING
from peftcheck.outcome import Outcome
from peftcheck.repro import bodies, merging, model, quantized, refusing, sequencing, training
from peftcheck.repro.scene import Scene, named
from peftcheck.spelling import Speller, Spelling, text
from peftcheck.stage import Stage
from peftcheck.staging import set_up

MOST_LINES = 39
_CODED = ("quantize.rejects", "quantize.atomic")
_POISONED = ("safe_merge.rejects", "safe_merge.atomic", "safe_merge.all_or_nothing", "safe_merge.names")


def script(implementation: Implementation, case: Case, law: Law) -> str:
    """Return a script that shows the defect: standalone where the law has such a form, else a replay of the token."""
    return standalone(implementation, case, law) or _replay(implementation, case, law)


def standalone(implementation: Implementation, case: Case, law: Law) -> str | None:
    """Return a script of fewer than 40 lines that imports torch and the library only; None where there is no such form.

    It builds the model, attaches by the library's public API, writes every tensor, does what the law does, prints
    found, expected and difference, and exits 1 if the defect shows, 0 if not. Expected values that come from the
    closed form stand in it as literals. None: the case does not fail, the implementation spells nothing, the
    law or its symptom is not covered. A quantizer is imported too, where the base is quantized.
    """
    if not isinstance(implementation, Speller):
        return None
    if case.sweep.quantizer is not None and quantizers.DECLARED[case.sweep.quantizer].by_hand:
        return None
    (outcome,) = engine.check(implementation, case, [law])
    if not outcome.failed:
        return None
    with engine.pinned():
        lines = _lines(implementation, case, law, outcome)
    return None if lines is None else "\n".join(lines) + "\n"


def _lines(implementation: Implementation, case: Case, law: Law, outcome: Outcome) -> list[str] | None:
    say: Spelling = implementation.spelling(case)
    torch.manual_seed(case.values)
    if law.name == "refuse.attach":
        start = dict(models.build(case).named_parameters(remove_duplicate=False))
        return _assembled(implementation, case, law, say, start, [], (), refusing.attach(say.attach, outcome))
    try:
        stage = set_up(implementation, case)
    except Exception:
        refused = outcome.measurement is not None and quantized.crashed(outcome.measurement.symptom)
        if outcome.measurement is not None and not refused:
            raise  # it could be set up just now
        start = dict(models.build(case).named_parameters(remove_duplicate=False))
        act = _guarded(say.attach, outcome, refused or None)
        return _assembled(implementation, case, law, say, start, [], act, [])
    poisoned = administer(stage) if law.name in _POISONED else None
    if law.name in _CODED:
        poisoned = quantize_safe.administer(stage)
    found = outcome.measurement or NOTHING
    scene = Scene(stage, say, found, poisoned)
    adapters = [] if law.name in training.FRESH else _adapters(stage, say.root(stage.attached))
    if adapters is None:
        return None
    if outcome.measurement is None:
        act = (quantized if case.sweep.quantizer else bodies).steps(scene, law.name)
        body = None if act is None else _guarded(act, outcome)
    else:
        known = {**bodies.BODIES, **quantized.BODIES}
        body = known.get(law.name, lambda scene: None)(scene)
    if body is None:
        return None
    return _assembled(implementation, case, law, say, stage.pristine, adapters, list(say.attach), body)


def _guarded(act: Sequence[str], outcome: Outcome, kind: str | None = None) -> list[str]:
    """Return lines that exit 1 if the act ends in the same kind of error."""
    kind = kind or outcome.message.partition(":")[0]
    return [
        "try:",
        *model.indented(act),
        "except Exception as error:",
        '    print("found:", type(error).__name__, error)',
        '    print("expected: no error")',
        f"    raise SystemExit(int(type(error).__name__ == {text(kind)}))",
        'print("no error")',
    ]


def _adapters(stage: Stage, root: torch.nn.Module) -> list[tuple[str, Tensor]] | None:
    """Return every adapter tensor in force with its name under `root`; None where one that was written has none.

    A tensor that is as the library made it follows from the seed and the configuration, and needs no name. Also
    the base tensors that attaching has changed by design.
    """
    names: dict[int, str] = {}
    for name, tensor in named(root).items():
        names.setdefault(id(tensor), name)
    found: dict[str, Tensor] = {}
    attached: Attached = stage.attached
    for adapter in stage.names:
        for (_, role), tensor in attached.adapter_tensors(adapter).items():
            if id(tensor) not in names:
                if tensor.is_floating_point() and stage.formula.hints.get(role) != "keep":
                    return None
                continue
            found[names[id(tensor)]] = tensor.detach().clone()
    for key, tensor in attached.base_tensors().items() if stage.case.sweep.quantizer is None else ():
        pristine = stage.pristine.get(key)
        if pristine is not None and not torch.equal(pristine, tensor) and id(tensor) in names:
            found[names[id(tensor)]] = tensor.detach().clone()
    return list(found.items())


def _assembled(
    implementation: Implementation,
    case: Case,
    law: Law,
    say: Spelling,
    base: dict[str, Tensor],
    adapters: Sequence[tuple[str, Tensor]],
    attach: Sequence[str],
    body: Sequence[str],
) -> list[str] | None:
    """Return the whole script, with blank lines and a tensor per line if there is room."""
    own = {key: value for key, value in base.items() if not _borrowed(case, key) and _matters(case, key, body)}
    before = merging.BEFORE if any("described(" in line for line in body) else None
    defined: list[str] = []
    for name, lines in say.definitions.items():
        if any(f"{name}(" in line for line in (*defined, *body)):
            defined += lines
    for wide in (False, True):
        gap = [] if wide else [""]
        lines = [
            f"# {implementation.name} {implementation.version}, torch {torch.__version__}; {law.name}: {law.formula}",
            f"# {' '.join(case.words().split())}",
            "import torch",
            "from torch import nn",
            *model.imports(case),
            *quantized.imports(case),
            *say.imports,
            *gap,
            *model.definitions(case),
            *quantized.definitions(case),
            *model.FILL,
            *(merging.SHAPE if before else ()),
            *defined,
            *gap,
            f"torch.manual_seed({case.values})",
            *model.build(case),
            *model.table("model", own, wide),
            *quantized.prepare(case),
            *([before] if before else ()),
            *attach,
            *(model.table("model", dict(adapters), wide) if adapters else ()),
            *body,
        ]
        if len(lines) <= MOST_LINES:
            return lines
    return None


def _borrowed(case: Case, key: str) -> bool:
    """Return whether the tensor is the weight of a layer that shares another's."""
    return any(spec.tied and key == f"{spec.name}.weight" for spec in case.layers)


def _matters(case: Case, key: str, body: Sequence[str]) -> bool:
    """Return whether the script has to write a tensor: of a whole model, those of the layers it adapts or looks at."""
    layer = key.rpartition(".")[0]
    targeted = {case.layers[target].name for adapter in case.adapters for target in adapter.targets}
    within = any(f"{layer}.".startswith(f"{name}.") for name in targeted)  # a part holds layers
    return not case.whole or within or any(text(layer) in line for line in body)


def _replay(implementation: Implementation, case: Case, law: Law) -> str:
    return "\n".join(
        [
            f"# {law.name}: {law.formula}",
            f"# {' '.join(case.words().split())}",
            f"# {implementation.name} {implementation.version}; exits 1 if the law does not hold",
            "from peftcheck.cli import main",
            "",
            f'main(["replay", "{encode(case, law.name)}"])',
            "",
        ]
    )


def issue(implementation: Implementation, case: Case, law: Law, outcome: Outcome) -> str:
    """Return the text of a bug report in Markdown: what was found, what is due, and the script that shows it."""
    fence = "~~~~"
    return "\n".join(
        [
            f"{law.name} does not hold: {_inline(outcome.message)}",
            "",
            f"- law: {_inline(law.formula)}",
            f"- case: {_inline(case.words())}",
            f"- {implementation.name} {implementation.version}, torch {torch.__version__}",
            f"- replay: `peftcheck replay {encode(case, law.name)}`",
            "",
            "The script exits 1 where the defect shows:",
            "",
            f"{fence}python",
            script(implementation, case, law).rstrip("\n").replace(fence, "~ ~ ~"),
            fence,
            "",
        ]
    )


def _inline(text: str) -> str:
    """Return text as Markdown code, whatever is in it."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


__all__ = ["Speller", "Spelling", "issue", "script", "sequencing", "standalone"]
