"""What scripts do for what a combination leaves alone, what it leaves behind, and what can be done with it."""

from __future__ import annotations

from peftcheck import combination as combining
from peftcheck.combination import INTO
from peftcheck.laws import combine_refuses, combine_state
from peftcheck.repro import combined as said
from peftcheck.repro.model import literal
from peftcheck.repro.refusing import clones
from peftcheck.repro.scene import Scene, compared, named
from peftcheck.rounding import judged
from peftcheck.spelling import text


def merge(scene: Scene) -> list[str] | None:
    """Combine, merge the result, and compare with the base and its delta."""
    stage, asked = scene.stage, said.asked_of(scene)
    if scene.say.activate is None:
        return None
    form = combine_state.merged_form(stage, combining.made(stage, asked), scene.site)[scene.tensor]
    act = [f"start = {scene.say.base(scene.site, scene.tensor)}.data.double().clone()", *said.request(scene, asked)]
    act += [scene.say.activate((INTO,)), scene.say.merge((INTO,), stage.case.safe)]
    expected = f"expected = start + delta({text(INTO)})"
    return said.judged(
        scene,
        act,
        [expected],
        compared(None, judged(form, machine=stage.machine.base.store)),
        f"found = {scene.current()}",
    )


def activated(scene: Scene) -> list[str] | None:
    """Scale every source by its weight, merge all of them, and compare with the closed form."""
    stage = scene.stage
    if scene.say.activate is None or scene.say.rescale is None:
        return None
    order, forms = combine_state.activation(stage, said.asked_of(scene))
    form, names = forms[scene.site][scene.tensor], [stage.names[index] for index, _ in order]
    return [
        *(scene.say.rescale(stage.names[index], weight) for index, weight in order),
        scene.say.activate(names),
        scene.say.merge(names, stage.case.safe),
        f"found = {scene.current()}",
        "# expected: the closed form, computed in fp64 outside the library",
        *compared(literal(form.value), judged(form, machine=stage.machine.base.store)),
    ]


def sources_untouched(scene: Scene) -> list[str] | None:
    """Combine, and look at tensors and outputs of the adapters that were there before."""
    stage, root = scene.stage, named(scene.say.root(scene.stage.attached))
    owned = [t for adapter in stage.names for t in stage.attached.adapter_tensors(adapter).values()]
    watched = [name for name, t in root.items() if any(t is own for own in owned)]
    plain = scene.measured.role.endswith(":output")
    before = "own = lambda: {n: (t.requires_grad, t.tolist()) for n, t in tensors(model).items() if n in watched}"
    runs = ' | {f"output {i}": y.tolist() for i, y in enumerate(run())}' if plain else ""
    act = [*said.first_merged(scene), *said.request(scene, said.asked_of(scene))]
    if scene.measured.symptom == "crash":
        act = [
            *act,
            "try:",
            "    run()",
            "except Exception as error:",
            '    raise SystemExit(f"found: {error!r}, expected: outputs")',
        ]
    return [
        *([scene.run()] if plain else ()),
        f"watched = {watched}",
        before,
        f"before = own(){runs}",
        *act,
        f"after = own(){runs}",
        "changed = [name for name in before if before[name] != after.get(name)]",
        'print("found:", {name: after.get(name) for name in changed}, "expected:", {name: before[name] for name in changed})',
        "raise SystemExit(int(bool(changed)))",
    ]


def base_untouched(scene: Scene) -> list[str] | None:
    """Combine, and look at the base, and at what is merged into it."""
    marks = ", ".join(f"{text(name)}: list({scene.say.merged(name)})" for name in scene.stage.targeted)
    return [
        clones(scene),
        f"marks = lambda: {{{marks}}}",
        *said.first_merged(scene),
        "before, merged = bits(), marks()",
        *said.request(scene, said.asked_of(scene)),
        "changed = [name for name in before if not torch.equal(before[name], bits()[name])]",
        'print("found:", {name: bits()[name].tolist() for name in changed}, "merged:", marks())',
        'print("expected:", {name: before[name].tolist() for name in changed}, "merged:", merged)',
        "raise SystemExit(int(bool(changed) or any(marks()[name] != own for name, own in merged.items())))",
    ]


def rank(scene: Scene) -> list[str] | None:
    """Combine, and look at layers, factors and the declared rank."""
    stage, asked = scene.stage, said.asked_of(scene)
    wanted = combining.layers(stage, asked)
    act = [*said.first_merged(scene), *said.request(scene, asked), f"name = {text(INTO)}"]
    if scene.measured.symptom == "layers":
        held = ", ".join(f"{text(layer)}: {next(iter(said.keys(scene, layer).values()))}" for layer in stage.targeted)
        return [
            *act,
            f"found = [layer for layer, key in {{{held}}}.items() if key in tensors(model)]",
            *_equal(repr(list(wanted))),
        ]
    layer = scene.site if scene.site in wanted else wanted[0]
    own, made, spec = said.keys(scene, layer), combining.made(stage, asked), stage.spec(layer)
    if not {"A", "B"} <= own.keys():
        return None
    due = combine_state.fitting(stage, asked, layer, made.adapters[layer].rank)
    shapes = [stage.sites(layer)[0].tensors[role].value.shape for role in "AB"]
    expected = [due, (due, *shapes[0][1:]), (shapes[1][0], due // spec.groups, *shapes[1][2:])]
    tensors = [f"tuple(tensors(model)[{own[role]}].shape)" for role in "AB"]
    return [
        *act,
        f"found = [{scene.say.rank(layer, 'name')}, {', '.join(tensors)}]  # declared rank, shapes of A and B",
        *_equal(repr(expected)),
    ]


def _equal(expected: str) -> list[str]:
    return [
        f"expected = {expected}",
        'print("found:", found, "expected:", expected)',
        "raise SystemExit(int(found != expected))",
    ]


def reloaded(scene: Scene) -> list[str]:
    """Return lines that combine, save, and load under another name."""
    return [
        "import pathlib",
        "import tempfile",
        *said.first_merged(scene),
        *said.request(scene, said.asked_of(scene)),
        "folder = pathlib.Path(tempfile.mkdtemp())",
        scene.say.save("folder", (INTO,)),
        scene.say.load(f"folder / {text(INTO)}", "reloaded"),
    ]


def reload(scene: Scene) -> list[str] | None:
    """Combine, save, load under another name, and compare."""
    if scene.say.save is None or scene.say.load is None:
        return None
    keys = list(said.keys(scene, scene.site).values())
    return [
        f"own = lambda name: [tensors(model)[key].tolist() for key in ({', '.join(keys)},)]",
        *reloaded(scene),
        f'found, expected = own("reloaded"), own({text(INTO)})',
        'print("found:", found, "expected:", expected)',
        "raise SystemExit(int(found != expected))",
    ]


def refuses(scene: Scene) -> list[str] | None:
    """Ask for what cannot be had, and look at what is left of the attempt."""
    stage, asked, symptom = scene.stage, said.asked_of(scene), scene.measured.symptom
    request = scene.measured.role.partition(":")[2]
    call = combine_refuses.impossible(stage, asked, request)
    if call is None or scene.say.holds is None:
        return None
    into, crash = call[3], scene.measured.note.partition(" ")[0].rstrip(":") if symptom == "crash" else ""
    return [
        clones(scene),
        f"before, known = bits(), {scene.say.holds(into)}",
        "try:",
        f"    {scene.say.combine(*call)}",
        "except Exception as error:",
        '    print("found:", type(error).__name__, error)',
        f"    wrong = type(error).__name__ == {text(crash)}",
        "else:",
        '    print("found: accepted")',
        f"    wrong = {request not in ('driver', 'no delta')}",
        f"    known = {scene.say.holds(into)}",
        f"left = {scene.say.holds(into)} and not known",
        "changed = [name for name in before if not torch.equal(before[name], bits()[name])]",
        f'print("left behind:", left, "changed:", changed, "expected: a clear refusal, and nothing of {into}")',
        "raise SystemExit(int(wrong or left or bool(changed)))",
    ]
