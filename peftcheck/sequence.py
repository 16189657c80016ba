"""Sequences of operations on an attached model, and the dozen lines that say what must be true after each.

The expectation is kept outside the library: per layer the stack of what is merged and the weights at each level of
it, the active adapters, their scales, whether they are disabled. What the library's bookkeeping calls merged must be
merged, what it calls unmerged must be the base again, and whatever an operation has no business with must be
bit-equal to what stood there before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from peftcheck import budgets, refusal, standing
from peftcheck.architecture import layout
from peftcheck.case import AdapterSpec
from peftcheck.implementation import Inverts, Op
from peftcheck.measurement import Measurement, broken, compare, worst
from peftcheck.oracle import Base, Family, Site
from peftcheck.programs import Step
from peftcheck.rounding import Bounded, judged, leaf
from peftcheck.sequence_outputs import IGNORED, compared_outputs
from peftcheck.stage import Record, Stage

NEEDS: dict[str, tuple[Op, ...]] = {
    "forward": (Op.FORWARD,),
    "activate": (),
    "merge": (Op.MERGE, Op.UNMERGE),
    "unmerge": (Op.MERGE, Op.UNMERGE),
    "disable": (Op.DISABLED,),
    "enable": (Op.DISABLED,),
    "rescale": (Op.RESCALE,),
    "delete": (Op.DELETE,),
    "add": (Op.DELETE, Op.ADD),
    "save": (Op.SAVE, Op.LOAD, Op.DELETE),
    "load": (Op.SAVE, Op.LOAD, Op.DELETE, Op.ADD),
    "train": (Op.FORWARD,),
    "unload": (Op.UNLOAD,),
    "export": (Op.EXPORT,),
}


# What is done while something is merged, the likelier cause of what is seen later last.
_ODD = ("merge", "activate", "save", "disable", "add", "load", "delete", "rescale", "export", "unload")


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    """Return whether two lists hold the same objects; what was worked out of them holds them, so that none is another's."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _rank(oddity: str) -> int:
    return _ODD.index(oddity.partition(" ")[0]) if oddity.partition(" ")[0] in _ODD else -1


@dataclass
class Stack:
    """What is merged into a layer: the sites in order, and the layer's tensors before, between and after them."""

    levels: list[Base]
    sites: list[Site] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the merged adapters, in order."""
        return tuple(site.adapter.name for site in self.sites)

    @property
    def top(self) -> Base:
        """The layer's tensors as they must be now."""
        return self.levels[-1]


class Play:
    """One sequence on a stage. `numeric`: compare with closed forms too, not only with what stood there before.
    `partial`: judge outputs also where some of the active adapters are merged and others are not.

    A context manager: leaving it enables what was disabled and removes what was saved.
    """

    def __init__(self, stage: Stage, numeric: bool = True, partial: bool = True) -> None:
        self.stage = stage
        self.numeric = numeric
        self.partial = partial
        self.specs: tuple[AdapterSpec, ...] = stage.case.adapters
        self.present = list(stage.names)
        self.active: tuple[str, ...] | None = stage.names
        self.factors = dict.fromkeys(stage.names, 1.0)
        self.stacks = {name: Stack([stage.base(name)]) for name in stage.targeted}
        self.off: ExitStack | None = None
        self.before_off: dict[str, tuple[str, ...]] = {}
        self.saved: dict[str, tuple[Path, dict[tuple[str, str], Tensor]]] = {}
        self.steps: list[str] = []
        self.done: list[Step] = []  # the same as data
        self.refused: set[int] = set()  # which of them the library refused, as it may
        self.due: dict[str, tuple[Tensor, Tensor]] = {}  # by role: what was last compared with, and its budget
        self.runs: dict[str, Record] = {}  # what each layer was given last, and what it gave
        self.oddity = ""  # what was last done while something was merged, until an unmerge has shown it harmless
        self.over = False
        # what was worked out last, by adapter and layer or by layer: good while what it was worked out of is the same
        self._sites: dict[tuple[str, str], tuple[standing.Tensors, float, Site]] = {}
        self._above: dict[int, tuple[list, list[Base]]] = {}
        self._back: dict[int, tuple[list, dict[str, Tensor]]] = {}
        self.exits = ExitStack()
        self.held: dict[str, Tensor] = {}
        self.marks = standing.marks(stage.attached)
        self.astray = standing.astray(stage.attached, stage.case.train)
        self.adapters: dict[str, standing.Tensors] = {}
        self.layouts: dict[str, dict[tuple[str, str], tuple[int, ...]]] = {}
        self.trained: dict[str, frozenset[tuple[str, str]]] | None = None
        self.hold()
        self.flags()

    def __enter__(self) -> Play:
        return self

    def __exit__(self, *error) -> None:
        if self.off is not None:
            self.off.close()
        self.exits.close()

    # what is

    @cached_property
    def folder(self) -> Path:
        """A folder to save to, gone when the play is."""
        return Path(self.exits.enter_context(tempfile.TemporaryDirectory()))

    @cached_property
    def finite(self) -> bool:
        """Whether merging the case's adapters stays clear of overflow everywhere."""
        return self.stage.finite

    @property
    def merged(self) -> bool:
        """Whether anything is merged anywhere."""
        return any(stack.sites for stack in self.stacks.values())

    def name(self, index: int) -> str:
        return self.specs[index % len(self.specs)].name

    def site(self, adapter: str, name: str) -> Site | None:
        """Return an adapter on a layer as it is now, scaled as it was last rescaled; None where it is not there."""
        index = self.stage.names.index(adapter)
        if adapter not in self.present or index not in self.stage.adapters_on(name):
            return None
        tensors, factor = self.adapters[adapter], self.factors[adapter]
        known = self._sites.get((adapter, name))
        if known is None or known[0] is not tensors or known[1] != factor:
            site = self.stage.site_of(index, name, tensors)
            known = (tensors, factor, replace(site, adapter=replace(site.adapter, alpha=site.adapter.alpha * factor)))
            self._sites[adapter, name] = known
        return known[2]

    def above(self, stack: Stack, sites: Sequence[Site]) -> list[Base]:
        """Return the levels that come on top of a stack when sites are merged in order."""
        key = [stack.levels[0], stack.top, *stack.sites, *sites]
        known = self._above.get(id(stack))
        if known is not None and _same(known[0], key):
            return list(known[1])
        form, m, levels = self.stage.formula, self.stage.machine, list(stack.levels)
        for count in range(1, len(sites) + 1):
            if form.merge_many is not None:
                changed = form.merge_many(m, [*stack.sites, *sites[:count]], levels[0])
            else:
                changed = form.merge(m, sites[count - 1], levels[-1])
            levels.append({**levels[-1], **changed})
        self._above[id(stack)] = (key, levels[len(stack.levels) :])
        return list(levels[len(stack.levels) :])

    def flags(self) -> None:
        """Take what is trained now for what must be trained after the next step; not while adapters are disabled."""
        self.trained = standing.trained(self.stage.attached, self.adapters) if self.off is None else None

    def hold(self, touched: Collection[str] | None = None) -> None:
        """Take what stands now for what must still stand after the next step; of the base what was touched, or all."""
        for key, tensor in self.stage.attached.base_tensors().items():
            if touched is None or key in touched:
                self.held[key] = tensor.detach().clone()
        for name in self.present:
            if name not in self.adapters:
                own = self.stage.attached.adapter_tensors(name)
                # what is not there at the start is a cache, which comes and goes with merges
                lasting = self.stage.start_adapters[name]
                self.adapters[name] = {key: tensor.detach().clone() for key, tensor in own.items() if key in lasting}
                self.layouts[name] = {key: layout(tensor) for key, tensor in own.items() if key in lasting}

    def ran_in_training(self) -> None:
        """Take for granted what a forward in training may move: statistics that are kept in buffers."""
        for key, tensor in self.stage.attached.base_tensors().items():
            if not isinstance(tensor, nn.Parameter):
                self.held[key] = tensor.detach().clone()
        for name in self.present:
            own = self.stage.attached.adapter_tensors(name)
            running = {
                key: t.detach().clone()
                for key, t in own.items()
                if key in self.adapters[name] and not isinstance(t, nn.Parameter)
            }
            self.adapters[name] = {**self.adapters[name], **running}

    # judging

    def can(self, kind: str) -> bool:
        """Return whether the library claims what a step of this kind needs."""
        stage = self.stage
        if not stage.can(*NEEDS.get(kind, ())):
            return False
        if kind in ("merge", "unmerge", "export"):
            return self.finite and stage.variant.inverts is not Inverts.NEVER
        return not (kind in ("add", "load") and stage.variant.rewrites_base)

    def named(self, found: Measurement, kind: str) -> Measurement:
        """Return what does not hold, named after its likeliest cause, with the steps that led there."""
        cause = "" if found.symptom == IGNORED else f" after {self.oddity or kind}"
        return replace(found, symptom=found.symptom + cause, note=f"{found.note} ({', '.join(self.steps)})")

    def attempt(self, call: Callable[[], object], what: str, may_refuse: bool) -> bool:
        """Return whether the library did as it was told; False where it refused what it may refuse."""
        try:
            call()
        except Exception as error:
            if may_refuse and refusal.is_refusal(error, self.stage.implementation):
                self.refused.add(len(self.done) - 1)
                return False
            raise
        if may_refuse and _rank(what) >= _rank(self.oddity):
            self.oddity = what
        return True

    def settle(self, *choices: dict[str, tuple[str, ...]]) -> Measurement:
        """Compare bookkeeping and every tensor with what must be, layer by layer, and take them for granted then.

        `choices`: what may be merged where, by what the operation was and what it may do on its way.
        """
        said = self.stage.attached.merged()
        tensors = self.stage.attached.base_tensors()
        found: list[Measurement] = []
        touched: set[str] = set()
        for name, stack in self.stacks.items():
            now = said.get(name, ())
            if self.stage.formula.family is Family.MIXED:  # methods keep books of their own, without a common order
                now = next((choice[name] for choice in choices if sorted(choice[name]) == sorted(now)), now)
            if now not in [choice[name] for choice in choices]:
                due = choices[0][name]
                return broken(
                    f"{name}:module", "bookkeeping", f"the library says {now} is merged into {name}, due is {due}"
                )
            if now == stack.names:
                continue
            forms, room = self.moved(name, stack, now)
            for tensor, budget in room.items():
                touched |= self.sharing(f"{name}.{tensor}")
                if self.numeric:
                    found.append(
                        self.compared(f"{name}:{tensor}", tensors[f"{name}.{tensor}"], forms[tensor].value, budget)
                    )
        found += standing.bystanders(tensors, touched, self.marks, self.held, self.numeric)
        found += standing.adapters(
            self.stage.attached, self.adapters, self.layouts, self.trained if self.off is None else None
        )
        found.append(standing.modes(self.stage.attached, self.stage.case.train, self.astray))
        self.hold(touched)
        for name in {key.rpartition(".")[0] for key in touched} & self.stacks.keys():
            self._anchor(name)
        return worst(found)

    def sharing(self, key: str) -> set[str]:
        """Return the tensors that share storage with one, itself included."""
        name, _, tensor = key.rpartition(".")
        tied = {
            f"{spec.name}.weight"
            for spec in self.stage.case.layers
            if tensor == "weight" and name in (spec.tied, spec.name)
        }
        return {key} | tied

    def moved(self, name: str, stack: Stack, now: tuple[str, ...]) -> tuple[Base, dict[str, Tensor]]:
        """Move a stack to what is merged now; return the tensors that change and how far each may be off."""
        m, kept = self.stage.machine, len(stack.sites)
        if now[:kept] == stack.names:
            sites = [site for adapter in now[kept:] if (site := self.site(adapter, name)) is not None]
            levels = self.above(stack, sites)
            room = {
                t: judged(form, machine=m.base.store) for t, form in levels[-1].items() if form is not stack.top.get(t)
            }
            stack.levels += levels
            stack.sites += sites
            return stack.top, room
        kept = len(now)
        bottom, room = stack.levels[kept], self.way_back(stack.levels[kept], stack.sites[kept:])
        del stack.levels[kept + 1 :], stack.sites[kept:]
        return bottom, room

    def way_back(self, bottom: Base, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return how far merging sites onto these tensors and unmerging them may move each of them."""
        key, known = [bottom, *sites], self._back.get(id(bottom))
        if known is not None and _same(known[0], key):
            return known[1]
        stage, m = self.stage, self.stage.machine
        room = budgets.roundtrip(m, stage.formula, sites, bottom)
        for bound in stage.variant.documented:
            for tensor, extra in budgets.DOCUMENTED[bound](m, stage.formula, sites, bottom, 1).items():
                room[tensor] = room.get(tensor, 0.0) + extra
        if stage.variant.inverts is Inverts.EXACT:
            room = {tensor: torch.zeros_like(budget) for tensor, budget in room.items()}
        self._back[id(bottom)] = (key, room)
        return room

    def _anchor(self, name: str) -> None:
        """Take the tensors that stand there for the top of a layer's stack: errors do not add up over the steps."""
        stack = self.stacks[name]
        stack.levels[-1] = {tensor: self._leaf(f"{name}.{tensor}") for tensor in stack.top}

    def _leaf(self, key: str) -> Bounded:
        return leaf(self.held[key], self.stage.machine.exact)

    def compared(self, role: str, found: Tensor, expected: Tensor, budget: Tensor) -> Measurement:
        """Compare, and keep what was due for whoever writes it into a program."""
        self.due[role] = (expected, budget)
        return compare(role, found, expected, budget)

    def outputs(self, seen: Mapping[str, Record]) -> Measurement:
        """Compare the output of every layer in a run of the model with what it must give now."""
        return compared_outputs(self, seen)

    def copies(self) -> dict[str, Tensor]:
        """Return the tensors of which an active adapter holds a trained copy in force, by the base's name."""
        active = (self.adapters[name] for name in self.active or () if self.off is None)
        return {
            f"{site}.{role[6:]}": t for own in active for (site, role), t in own.items() if role.startswith("saved.")
        }

    def now(self) -> dict[str, tuple[str, ...]]:
        """Return what is merged where, by the expectation."""
        return {name: stack.names for name, stack in self.stacks.items()}

    def nothing(self) -> dict[str, tuple[str, ...]]:
        """Return the state in which nothing is merged anywhere."""
        return {name: () for name in self.stacks}
