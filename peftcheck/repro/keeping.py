"""What scripts do for the laws of state: save, delete, weigh, and compare."""

from __future__ import annotations

import torch

from peftcheck import checkpoint
from peftcheck.implementation import stored
from peftcheck.repro.model import indented, literal
from peftcheck.repro.scene import Scene, named
from peftcheck.spelling import text

_FOLDER = "folder = pathlib.Path(tempfile.mkdtemp())"
_IMPORTS = "import pathlib, tempfile; from safetensors.torch import load_file"


def _saved(scene: Scene, name: str) -> list[str]:
    """Return lines after which `read()` gives the tensors that are written for one adapter of all."""
    return [
        _IMPORTS,
        "def read():",
        f"    {_FOLDER}",
        *indented([scene.say.save("folder", scene.stage.names)]),
        f"    own = folder / {text(name)} if (folder / {text(name)}).is_dir() else folder",
        '    return {key: t for path in own.glob("*.safetensors") for key, t in load_file(path).items()}',
    ]


def size(scene: Scene) -> list[str] | None:
    """Save, and weigh the values of the adapter that weighs too much."""
    stage = scene.stage
    folder, due = checkpoint.saved(stage), {name: checkpoint.declared(stage, name) for name in stage.names}
    if scene.say.save is None or len(checkpoint.folders(folder, stage.names[0], stage.names)) > 1:
        return None  # what lies in other folders too is no one file to read
    name = max(due, key=lambda one: checkpoint.sizes(stored(folder, one)).values / max(due[one], 1))
    return [
        *_saved(scene, name),
        "found = sum(tensor.nbytes for tensor in read().values())",
        f"expected = {due[name]}  # bytes of what is trained, and of what is declared besides",
        'print("found:", found, "expected: at most", expected)',
        "raise SystemExit(int(found > expected))",
    ]


def save_merged(scene: Scene) -> list[str] | None:
    """Save, merge, save again, and compare the files."""
    if scene.say.save is None:
        return None
    return [
        *_saved(scene, scene.stage.names[0]),
        "expected = read()",
        *scene.merges(),
        "found = read()",
        "same = lambda key: key in found and torch.equal(found[key], expected[key])",
        "for key in expected:",
        '    print(key, "found:", found.get(key), "expected:", expected[key])',
        "raise SystemExit(int(not all(map(same, expected))))",
    ]


def reload(scene: Scene) -> list[str] | None:
    """Save, and look for each trained tensor in the file; None where all of them are in it."""
    if scene.say.save is None:
        return None
    stage, root = scene.stage, named(scene.say.root(scene.stage.attached))
    names = {id(tensor): name for name, tensor in reversed(root.items())}
    folder, roles = checkpoint.saved(stage), checkpoint.trained(stage)
    for adapter in stage.names:
        held = checkpoint.tensors(stored(folder, adapter)).values()
        own = [
            t for (_, role), t in stage.attached.adapter_tensors(adapter).items() if role in roles and id(t) in names
        ]
        lost = [names[id(t)] for t in own if not any(torch.equal(t.detach(), value) for value in held)]
        if lost:
            return [
                *_saved(scene, adapter),
                "tensors, saved = dict(model.named_parameters(remove_duplicate=False)), read()",
                f"lost = [name for name in {lost} if not any(torch.equal(tensors[name], t) for t in saved.values())]",
                'print("found:", sorted(saved), "expected, and in no file:", lost)',
                "raise SystemExit(int(bool(lost)))",
            ]
    return None


def delete(scene: Scene) -> list[str] | None:
    """Delete the adapter that the case names, active or not as in the law, and run the model.

    What the library wraps around it runs too.
    """
    symptom = scene.measured.symptom
    if scene.say.delete is None or symptom not in ("crash after deleting an adapter", "crash without adapters"):
        return None
    stage = scene.stage
    victim = stage.names[stage.case.poison.adapter % len(stage.names)]
    others = [name for name in stage.names if name != victim]
    if others and not stage.case.joint and scene.say.activate is None:
        return None
    if stage.case.whole:
        runs = [f"model({', '.join(map(literal, stage.arguments))})"]
    else:
        calls = ", ".join(scene.runs(spec.name) for spec in stage.case.layers)
        runs = [f"nn.ModuleDict.forward = lambda self, _: [{calls}]", "model(None)"]
    return [
        *([scene.say.activate(others)] if others and not stage.case.joint else []),
        scene.say.delete(victim),
        "try:",
        *indented(runs),
        "except Exception as error:",
        '    print("found:", type(error).__name__, error)',
        '    print("expected: the outputs of what is left")',
        "    raise SystemExit(1)",
    ]
