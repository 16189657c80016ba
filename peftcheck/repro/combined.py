"""What an adapter adds to a layer, and what is asked of the library, as source text."""

from __future__ import annotations

from collections.abc import Sequence

from peftcheck import combination as combining
from peftcheck.case import CONVOLUTIONS, EMBEDDINGS, LayerSpec
from peftcheck.combination import INTO, Combination
from peftcheck.repro.model import number
from peftcheck.repro.scene import Scene, named
from peftcheck.spelling import text

_LOW_RANK = frozenset({"lora", "dora", "lora.velora", "lora.monteclora", "lora.kasa", "lora.bdlora"})
FOUND = f"found = delta({text(INTO)})"


def request(scene: Scene, asked: Combination, into: str = INTO, sources: Sequence[str] | None = None) -> list[str]:
    """Return the lines that combine; what is random starts from the seed of the request."""
    names = [scene.stage.names[index] for index in asked.members] if sources is None else list(sources)
    seed = [f"torch.manual_seed({asked.seed})"] if asked.kind.prunes == "random" else []
    return [*seed, scene.say.combine(names, asked.weights, asked.name, into, asked.options)]


def first_merged(scene: Scene) -> list[str]:
    """Return the line that merges the adapter which the case wants merged meanwhile."""
    merged = scene.stage.case.setting("merged")
    return [] if merged is None else [scene.say.merge((scene.stage.names[merged],), False)]


def keys(scene: Scene, layer: str) -> dict[str, str]:
    """Return, by role, an expression for the name of an adapter's tensor on a layer, where `name` is the adapter's.

    Of the adapters that the case has on the layer; what the library calls their tensors it calls those of others.
    """
    stage = scene.stage
    names = {id(tensor): name for name, tensor in reversed(named(scene.say.root(stage.attached)).items())}
    adapter = stage.names[stage.adapters_on(layer)[0]]
    found = {}
    for (site, role), tensor in stage.attached.adapter_tensors(adapter).items():
        head, dot, tail = (names.get(id(tensor), "") + ".").rpartition(f".{adapter}.")
        if site == layer and dot:
            pattern = f"{_braced(head)}.{{name}}{_braced(f'.{tail}'.rstrip('.'))}"
            found[role] = "f" + text(pattern)
    return found


def _braced(plain: str) -> str:
    return plain.replace("{", "{{").replace("}", "}}")


def tensor(key: str) -> str:
    """Return an expression for the tensor of that name, in float64."""
    return f"tensors(model)[{key}].data.double()"


def added(scene: Scene, layer: str, changed: str) -> list[str] | None:
    """Return lines that define `delta(name)`: what an adapter adds to a tensor of the layer, in float64.

    None where the method has no such form here. What it refers to as `start` is the base tensor as it was.
    """
    own, spec, formula = keys(scene, layer), scene.stage.spec(layer), scene.stage.variant.formula
    head = f"def delta(name):  # what an adapter adds to the {changed} of {layer.encode('unicode_escape').decode()}"
    if formula == "ia3" and "scale" in own:
        gate = tensor(own["scale"])
        shape = () if changed == "bias" else _along(spec, scene.stage.sites(layer)[0].adapter.option("feedforward"))
        if shape is None:
            return None
        return [head, f"    return start * ({gate}.reshape({shape or (-1,)}) - 1)"]
    if spec.kind == "mha" or not {"A", "B"} <= own.keys() or formula not in _LOW_RANK:
        return None
    gain = scene.say.gain(layer, "name")
    if changed == "bias":
        return [head, f"    return {gain} * {tensor(own['B.bias'])}"] if "B.bias" in own else None
    lines = [head, f"    a, b = {tensor(own['A'])}, {tensor(own['B'])}"]
    if formula == "lora.bdlora":  # packed blocks: as many as the width goes into the whole
        lines.append(f"    a = torch.block_diag(*a.chunk({spec.n_in} // a.shape[1]))")
        lines.append("    b = torch.block_diag(*b.chunk(len(a) // b.shape[1]))")
    product = "b @ a" if formula != "lora.kasa" else f"(b * {tensor(own['diag'])}) @ a"
    if spec.kind in CONVOLUTIONS:
        groups = spec.groups
        halves = [
            f"{t}.flatten(1)" if groups == 1 else f"{t}.reshape({groups}, len({t}) // {groups}, -1)" for t in "ba"
        ]
        product = f"({halves[0]} @ {halves[1]}).reshape(len(b), *a.shape[1:])"
    elif spec.kind == "conv1d-transformers" or spec.kind in EMBEDDINGS:
        product = f"({product}).T"
    if formula != "dora":
        return [*lines, f"    return {gain} * {product}"]
    if spec.groups > 1 or "magnitude" not in own:
        return None
    over = tuple(axis for axis, size in enumerate(_along(spec, False)) if size == 1)
    return [
        *lines,
        f"    moved = start + {gain} * {product}",
        f"    unit = moved / torch.linalg.vector_norm(moved, dim={over}, keepdim=True)",
        f"    return {tensor(own['magnitude'])}.reshape({_along(spec, False)}) * unit - start",
    ]


def _along(spec: LayerSpec, inputs: bool) -> tuple[int, ...] | None:
    """Return the shape in which a vector over outputs (or inputs) multiplies the stored weight; None in groups."""
    turned = spec.kind == "conv1d-transformers" or spec.kind in EMBEDDINGS
    if inputs and spec.groups > 1:
        return None
    shape = [1] * (2 + len(spec.kernel))
    shape[int(turned != bool(inputs))] = -1
    return tuple(shape)


def weighted(scene: Scene, asked: Combination, layer: str) -> str:
    """Return an expression for the weighted sum of what the sources add to a layer."""
    own = scene.stage.adapters_on(layer)
    pairs = [(index, weight) for index, weight in zip(asked.members, asked.weights, strict=True) if index in own]
    return (
        "sum(["
        + ", ".join(f"{number(weight)} * delta({text(scene.stage.names[index])})" for index, weight in pairs)
        + "])"
    )


def start(scene: Scene, layer: str, changed: str) -> list[str]:
    """Return the line that keeps the base tensor as it was, where what is added depends on it."""
    return (
        []
        if scene.stage.formula.delta is not None
        else [f"start = {scene.say.base(layer, changed)}.data.double().clone()"]
    )


def asked_of(scene: Scene) -> Combination | None:
    """Return what the case asks for."""
    return combining.requested(scene.stage.case)


def by_norm(room: float) -> list[str]:
    """Return lines that compare `found` and `expected` in Frobenius' norm."""
    return [
        "difference = float(torch.linalg.vector_norm(found - expected)) if found.shape == expected.shape else torch.inf",
        'print("found:", found.tolist(), "expected:", expected.tolist())',
        f'print("norm of the difference:", difference, "allowed:", {room!r})',
        f"raise SystemExit(int(not difference <= {room!r}))",
    ]


def normwise(scene: Scene, asked: Combination) -> bool:
    """Return whether the law compares by norm: what came from an SVD."""
    return asked.kind.rank == "chosen" and scene.stage.formula.delta is not None


def judged(
    scene: Scene, act: list[str], expected: list[str], compare: list[str], found: str = FOUND
) -> list[str] | None:
    """Return lines that do `act` and compare what the combined adapter adds; None where the method has no form for it."""
    delta = added(scene, scene.site, scene.tensor)
    if delta is None:
        return None
    head = start(scene, scene.site, scene.tensor)
    return [*delta, *head, *first_merged(scene), *act, found, *expected, *compare]
