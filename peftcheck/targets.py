"""How users name the layers that an adapter is for: by the ends of their names, by a pattern, by block, or all of them.

The layers are what a case determines; the spelling is only taken where it means these layers and no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftcheck.case import AdapterSpec, Case, LayerSpec
from peftcheck.transformer_models import BLUEPRINTS

SPELLINGS = ("ends", "ends", "pattern", "all-linear", "blocks", "names")
LINEAR = frozenset({"linear", "conv1d-transformers"})


@dataclass(frozen=True)
class Targets:
    """A spelling of layers: `modules` are ends of dotted names, or one expression that must match whole names, or
    'all-linear' (every linear layer but a head that is known as one: see `spared`).

    `blocks`, where there are any: only the layers in these entries of the list that is called `container`. `excluded`:
    names of layers that are meant not to be.
    """

    modules: tuple[str, ...] | str
    blocks: tuple[int, ...] = ()
    container: str | None = None
    excluded: tuple[str, ...] = ()


def named(case: Case, adapter: AdapterSpec) -> tuple[str, ...]:
    """Return the names of the layers that an adapter of the case targets."""
    return tuple(case.layers[target].name for target in adapter.targets)


def spelled(case: Case, adapter: AdapterSpec) -> Targets:
    """Return an adapter's targets as the case's spelling has them; as plain names where it would mean other layers."""
    names = named(case, adapter)
    wish = case.setting("spelling") if case.whole else None
    for targets in _wished(case, names, wish):
        if meant(case, targets) == frozenset(names):
            return targets
    return Targets(names)


def _wished(case: Case, names: Sequence[str], wish: str | None) -> Iterator[Targets]:
    if wish == "all-linear":
        yield Targets("all-linear")
    if wish == "names":  # all that end alike, but for those that are named
        ends = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
        alike = meant(case, Targets(ends))
        yield Targets(ends, excluded=tuple(sorted(alike - frozenset(names))))
    container = BLUEPRINTS[case.sweep.layer].blocks if wish == "blocks" else None
    for parts in (1, 2, 3) if wish in ("ends", "pattern", "blocks") else ():
        ends = tuple(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))
        if wish == "ends":
            yield Targets(ends)
        elif wish == "pattern":
            yield Targets(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, ends))})")
        else:
            blocks = tuple(sorted({block for name in names if (block := _block(name, container)) is not None}))
            yield Targets(ends, blocks, container)


def _block(name: str, container: str | None) -> int | None:
    """Return the entry of the list of blocks that a layer is in, None where it is in none."""
    found = re.search(rf"(?:^|\.){re.escape(container or '')}\.(\d+)\.", name)
    return int(found.group(1)) if container and found else None


def meant(case: Case, targets: Targets) -> frozenset[str]:
    """Return the names of the case's layers that a spelling means."""
    return frozenset(spec.name for spec in case.layers if _means(case, targets, spec))


def spared(case: Case) -> str | None:
    """Return the head that 'all-linear' leaves out: a language model's, or one that is trained as a whole."""
    blueprint = BLUEPRINTS[case.sweep.layer]
    return blueprint.head if blueprint.task == "CAUSAL_LM" or case.setting("save_head") else None


def _means(case: Case, targets: Targets, spec: LayerSpec) -> bool:
    if spec.name in targets.excluded:
        return False
    if targets.modules == "all-linear":
        return spec.kind in LINEAR and spec.name != spared(case)
    if isinstance(targets.modules, str):
        return re.fullmatch(targets.modules, spec.name) is not None
    if not any(spec.name == end or spec.name.endswith(f".{end}") for end in targets.modules):
        return False
    return not targets.blocks or _block(spec.name, targets.container) in targets.blocks
