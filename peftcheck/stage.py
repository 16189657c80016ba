"""The stage that laws act on: a case built, attached and filled once, with what the oracle says of it.

Everything the laws compare with is kept here, outside the library: pristine clones of every base tensor, the
outputs of the pristine model, the closed forms. Laws never see each other's traces: the engine restores the
library's objects between them, and what is cached here is a function of the case alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from peftcheck import attention, budgets, values
from peftcheck.architecture import Architecture
from peftcheck.case import EMBEDDINGS, PARTS, Case, LayerSpec
from peftcheck.implementation import Attached, Claim, Implementation, Op, Variant, Watches
from peftcheck.oracle import Base, Formula, Machine, Site
from peftcheck.recording import Record, recorded
from peftcheck.rounding import Bounded, leaf


@dataclass
class Stage:
    """A case on stage. `pristine`: clones of the base's tensors before attaching; `start`: after it.

    `arguments` are what the model's forward takes, `inputs` what each layer is given in the pristine model.

    `put_back` restores the start, for laws that need it more than once; the engine sets it.
    """

    case: Case
    implementation: Implementation
    variant: Variant
    formula: Formula
    machine: Machine
    attached: Attached
    architecture: Architecture
    arguments: list[Tensor]
    inputs: dict[str, Tensor]
    pristine: dict[str, Tensor]
    pristine_outputs: dict[str, Tensor]
    start: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)  # the same as dense values, where the base is quantized
    start_adapters: dict[str, dict[tuple[str, str], Tensor]] = field(default_factory=dict)
    fresh: dict[str, dict[tuple[str, str], Tensor]] = field(default_factory=dict)  # as the library made them
    plain: dict[str, bool] = field(default_factory=dict)  # whether a path holds without any special mode
    _sites: dict[tuple[int, str], Site] = field(default_factory=dict)
    _stored: dict[str, Bounded] = field(default_factory=dict)
    _merged: dict[tuple, dict[str, Base]] = field(default_factory=dict)
    _trips: dict[tuple, list[tuple[dict[str, Tensor], Base]]] = field(default_factory=dict)  # by how many were made
    _records: dict[str, Record] | Exception | None = None
    _effect: float | None = None
    written: Any = None  # the folder into which `checkpoint.saved` had the adapters saved, for the laws that read it
    remembered: dict[Any, Any] = field(default_factory=dict)  # what laws have worked out of the case alone
    put_back: Callable[[], None] = lambda: None

    def forget(self) -> None:
        """Drop what was worked out of a start that is no longer the start."""
        for known in (self._sites, self._stored, self._merged, self._trips, self.remembered):
            known.clear()

    # what the case is

    def spec(self, name: str) -> LayerSpec:
        """Return the spec of the layer `name`."""
        return next(spec for spec in self.case.layers if spec.name == name)

    def adapters_on(self, name: str) -> tuple[int, ...]:
        """Return the indices of the adapters that target the layer, in order."""
        return tuple(
            index
            for index, adapter in enumerate(self.case.adapters)
            if name in [self.case.layers[target].name for target in adapter.targets]
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order; all of them are active at the start of a law."""
        return tuple(adapter.name for adapter in self.case.adapters)

    @property
    def targeted(self) -> tuple[str, ...]:
        """The names of the layers that at least one adapter targets."""
        return tuple(spec.name for spec in self.case.layers if self.adapters_on(spec.name))

    def claims(self, op: Op) -> Claim:
        """Return the weakest claim for `op` over all targeted layers and adapters of the case."""
        found = [
            self.variant.claim(op, self.case.layers[target], adapter)
            for adapter in self.case.adapters
            for target in adapter.targets
        ]
        return next((c for c in (Claim.ABSENT, Claim.REFUSES) if c in found), Claim.YES)

    def can(self, *ops: Op) -> bool:
        """Return whether every operation is claimed to work on every adapted layer of the case."""
        return all(self.claims(op) is Claim.YES for op in ops)

    # what the oracle says of it

    def base(self, name: str) -> Base:
        """Return the tensors of a layer as the base holds them at the start of a law."""
        prefix, nested = name + ".", self.spec(name).kind in ("mha", *PARTS)  # which hold layers
        return {
            key[len(prefix) :]: self._leaf(key, tensor)
            for key, tensor in (self.dense or self.start).items()
            if key.startswith(prefix) and (nested or "." not in key[len(prefix) :])
        }

    def _leaf(self, key: str, tensor: Tensor) -> Bounded:
        if key not in self._stored:
            self._stored[key] = leaf(tensor, self.machine.exact)
        return self._stored[key]

    def site(self, index: int, name: str) -> Site:
        """Return adapter `index` on layer `name`, as the closed forms want it."""
        key = (index, name)
        if key not in self._sites:
            adapter = self.case.adapters[index]
            self._sites[key] = self.site_of(index, name, self.start_adapters[adapter.name])
        return self._sites[key]

    def site_of(self, index: int, name: str, tensors: dict[tuple[str, str], Tensor]) -> Site:
        """Return the same for other tensors of the adapter (poisoned, trained)."""
        adapter = self.case.adapters[index].at(self.case.layers.index(self.spec(name)))
        adapter = self.formula.told(self.case, adapter) if self.formula.told else adapter
        own = {role: leaf(tensor, self.machine.exact) for (site, role), tensor in tensors.items() if site == name}
        heard = {role: leaf(self.inputs[layer], self.machine.exact) for role, layer in self.formula.hears.items()}
        return Site(self.spec(name), adapter, {**own, **heard})

    def sites(self, name: str, adapters: Sequence[int] | None = None) -> tuple[Site, ...]:
        """Return the sites on a layer, of all adapters or of those given, in order."""
        wanted = self.adapters_on(name) if adapters is None else [i for i in adapters if i in self.adapters_on(name)]
        return tuple(self.site(index, name) for index in wanted)

    def complete(self, name: str) -> bool:
        """Return whether each adapter on a quantized layer has all the tensors that any of them has there."""
        roles = [set(site.tensors) for site in self.sites(name)]
        return self.case.sweep.quantizer is None or all(own and own == roles[0].union(*roles) for own in roles)

    def merged(self, name: str, adapters: Sequence[int] | None = None) -> Base:
        """Return the tensors that merging changes, after the adapters are merged in order, with their bounds."""
        sites = self.sites(name, adapters)
        key = (name, tuple(site.adapter.name for site in sites))
        if key not in self._merged:
            self._merged[key] = self.merge_of(sites, self.base(name))
        return self._merged[key]

    def merge_of(self, sites: Sequence[Site], base: Base, on: Machine | None = None) -> Base:
        """Return the same for any sites and base, and for another machine."""
        on = on or self.machine
        if self.formula.merge_many is not None:
            return self.formula.merge_many(on, sites, base) if sites else {}
        changed: Base = {}
        for site in sites:
            changed = {**changed, **self.formula.merge(on, site, {**base, **changed})}
        return changed

    def roundtrip(self, name: str, adapters: Sequence[int] | None = None, cycles: int = 1) -> dict[str, Tensor]:
        """Return the budget of a layer's tensors after `cycles` round trips, each from where the last one ended.

        Where that may be counts: a method whose factors depend on the weight starts each trip from other factors.
        """
        sites = self.sites(name, adapters)
        trips = self._trips.setdefault((name, tuple(site.adapter.name for site in sites)), [({}, self.base(name))])
        while len(trips) <= cycles:
            total, base = trips[-1]
            for tensor, moved in budgets.roundtrip(self.machine, self.formula, sites, base).items():
                total = {**total, tensor: total[tensor] + moved if tensor in total else moved}
                base = {**base, tensor: base[tensor].widened(moved)} if bool((moved > 0).any()) else base
            trips.append((total, base))
        return dict(trips[cycles][0])

    def recovers(self, cycles: int) -> bool:
        """Return whether every merge of as many round trips stays clear of overflow, wherever they lead."""
        for name in self.targeted:
            base, moved = self.base(name), self.roundtrip(name, cycles=cycles - 1)
            moved_base = {**base, **{tensor: base[tensor].widened(far) for tensor, far in moved.items()}}
            if not self.sound(*self.merge_of(self.sites(name), moved_base).values()):
                return False
        return True

    def documented(self, name: str, adapters: Sequence[int] | None = None, cycles: int = 1) -> dict[str, Tensor]:
        """Return the sum of the bounds that the variant documents for its round trips, by tensor; else empty."""
        total: dict[str, Tensor] = {}
        for bound in self.variant.documented:
            sites = self.sites(name, adapters)
            extras = budgets.DOCUMENTED[bound](self.machine, self.formula, sites, self.base(name), cycles)
            for tensor, extra in extras.items():
                total[tensor] = total.get(tensor, 0.0) + extra
        return total

    def output(self, name: str, x: Tensor, adapters: Sequence[int] | None = None) -> Bounded:
        """Return the adapted layer's output on x by the closed form."""
        return self.formula.forward(self.machine, self.sites(name, adapters), self.base(name), self.activation(name, x))

    def activation(self, name: str, x: Tensor) -> Bounded:
        """Return an input as a leaf (ids of an embedding are not measured for a quantum)."""
        return leaf(x, self.machine.exact and self.spec(name).kind not in EMBEDDINGS)

    def sound(self, *forms: Bounded) -> bool:
        """Return whether the closed form stays clear of overflow, so that a comparison of numbers means anything."""
        largest = self.machine.base.store.largest / 2
        return all(bool((form.ceiling() <= largest).all()) for form in forms)

    @property
    def finite(self) -> bool:
        """Whether merging the adapters one by one stays clear of overflow everywhere (else a refusal is right)."""
        return all(
            self.sound(*self.merged(name, own[: count + 1]).values())
            for name in self.targeted
            for own in [self.adapters_on(name)]
            for count in range(len(own))
            if self.complete(name)
        ) and all(self._short(name) for name in self.targeted)

    @property
    def shortens(self) -> bool:
        """Whether an adapted layer shortens in place what it looks up and finds too long."""
        return any(self.spec(name).max_norm is not None for name in self.targeted)

    def _short(self, name: str) -> bool:
        """Return whether an embedding leaves every merged row as it is, whichever of the adapters are merged, in any order.

        One that is longer than the layer's `max_norm` it would shorten, in place: merging is then no way to apply the
        adapter.
        """
        limit = values.max_norm(self.case, self.spec(name))
        if limit is None:
            return True
        own = self.adapters_on(name)
        some = (merged for count in range(len(own)) for merged in permutations(own, count + 1))
        tables = [self.merged(name, merged)["weight"].ceiling() for merged in some]
        # and one that was merged and unmerged
        tables.append(self.base(name)["weight"].ceiling() + self.roundtrip(name).get("weight", 0.0))
        return all(float(torch.linalg.vector_norm(table, dim=-1).max()) < (1 - 2.0**-6) * limit for table in tables)

    @property
    def outputs_count(self) -> bool:
        """Whether outputs are judged: not where they would be subnormal."""
        return self.case.profile not in values.WEIGHTS_ONLY

    def effect(self) -> float:
        """Return how far the adapters move the weights: the largest norm(M - W) / norm(W) over the layers.

        By the oracle, never from the library's result. Where the library does not merge: how far they move the
        outputs, by the closed form.
        """
        if self._effect is None:
            pairs = self._moved_weights() if self.can(Op.MERGE) else self._moved_outputs()
            self._effect = max((_relative(change, size) for change, size in pairs), default=0.0)
        return self._effect

    def _moved_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name in self.targeted:
            base = self.base(name)
            if not self.complete(name):
                continue  # the library lost an adapter: a law of its own says so
            for tensor, form in self.merged(name).items():
                start = base[tensor].value if tensor in base else torch.zeros_like(form.value)
                yield form.value - start, start

    def _moved_outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name in self.targeted:
            plain = self.pristine_outputs[name].double()
            yield self.output(name, self.inputs[name]).value - plain, plain

    # what the library does

    def records(self) -> dict[str, Record]:
        """Return input and output of each adapted layer in one run of the adapted, unmerged model."""
        if isinstance(self._records, Exception):
            raise self._records
        if self._records is None:
            self._records = record(self)
        return self._records

    def saved(self) -> dict[str, Tensor]:
        """Return the tensors that adapters hold trained copies of, by the base's name: those of the last that does."""
        own = {key: t for name in self.names for key, t in self.start_adapters[name].items()}
        return {f"{site}.{role[6:]}": t for (site, role), t in own.items() if role.startswith("saved.")}

    def dispatched(self) -> bool:
        """Return whether the library adapts every layer that it was asked to adapt."""
        return all(
            set(self.attached.sites(adapter.name)) >= {self.case.layers[target].name for target in adapter.targets}
            for adapter in self.case.adapters
        )

    def run(self, other: Attached | None = None) -> dict[str, Record]:
        """Run the model as it stands now, or another of the same case; return input and output of the case's layers."""
        attached = other or self.attached
        if self.case.whole:
            layers = {spec.name: attached.layer(spec.name) for spec in self.case.layers}
            return _watched(attached, layers, lambda: attached.forward(self.arguments), {})
        with torch.no_grad():
            outputs = attached.forward(self.arguments)
        return {spec.name: Record(self.inputs[spec.name], y) for spec, y in zip(self.case.layers, outputs, strict=True)}

    def call(self, name: str, x: Tensor) -> Tensor:
        """Run the layer that stands at `name` now on a recorded input."""
        with torch.no_grad():
            return attention.run(self.spec(name), self.attached.layer(name), x)


def _relative(change: Tensor, size: Tensor) -> float:
    moved, scale = float(torch.linalg.vector_norm(change)), float(torch.linalg.vector_norm(size))
    return moved / scale if scale else moved


def record(stage: Stage) -> dict[str, Record]:
    """Run the model once and return input and output of each targeted layer."""
    layers = {name: stage.attached.layer(name) for name in stage.targeted}
    given = {} if stage.case.whole else stage.inputs
    return _watched(stage.attached, layers, lambda: stage.attached.forward(stage.arguments), given)


def _watched(
    attached: Attached,
    layers: Mapping[str, torch.nn.Module],
    run: Callable[[], object],
    given: Mapping[str, Tensor],
) -> dict[str, Record]:
    return attached.watched(layers, run) if isinstance(attached, Watches) else recorded(layers, run, given)
