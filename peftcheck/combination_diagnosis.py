"""What went wrong with a combination, and what its user can do: measured on the library, after a violation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck import combination as combining
from peftcheck import refusal
from peftcheck.combination import Change, Combination, Combined
from peftcheck.implementation import Promise
from peftcheck.measurement import Measurement, Repair, compare
from peftcheck.oracle.combination import cross_share
from peftcheck.stage import Stage


def explained(
    stage: Stage, asked: Combination, made: Combined, layer: str, found: Change, violation: Measurement
) -> Measurement:
    """Return a violated comparison with sum w_i D_i, its symptom named after the cause, its note saying what to do."""
    if violation.symptom != "numeric":
        return violation
    due = {name: form.value for name, form in combining.total(stage, asked, layer, plain=True).items()}
    name = violation.role.partition(":")[2]
    value = found[name].value if name in found else torch.zeros_like(due[name])
    for symptom, note in _causes(stage, asked, made, layer, name, value, due[name]):
        return repaired(stage, asked, replace(violation, symptom=symptom), note)
    return violation


def _causes(
    stage: Stage, asked: Combination, made: Combined, layer: str, name: str, found: Tensor, due: Tensor
) -> Iterator[tuple[str, str]]:
    undivided = stage.formula.delta is None
    factored = undivided and "A" in combining.sources(stage, asked, layer)[0][0].tensors
    if undivided and not factored:  # exact, and so before what is known up to a rounding only
        lost = identity_lost(stage, asked, layer, name, found, due)
        if lost is not None:
            yield lost
    if _single_precision(stage, asked, layer, name, found, due):
        yield "single precision", "right to float32 only, where the adapters are float64"
    if factored:
        lost = _not_copied(stage, asked, made, layer)
        if lost is not None:
            yield lost
    short = stored_shorter(stage, made, layer)
    if short is not None and _within(found, due, 2.0**-5 * _reach(stage, asked, layer, name)):
        yield "dtype", short
    if undivided:
        return
    share = excess(found, due)
    wrong = wrong_alone(stage, asked, layer, name)
    whole = alone(found, due)
    stacked = len(asked.members) > 1 and asked.kind.rank == "sum" and stage.spec(layer).groups > 1
    if wrong is None and stacked:
        note = "each adapter alone is right; stacked, rows of A stand in other groups than columns of B"
        yield "groups", f"{note}; {share} of the combined delta was not asked for"
    if len(asked.members) == 1 or wrong is not None or (asked.kind.rank != "common" and whole[0] == "scaled"):
        yield wrong or whole
    exact = cross_energy(stage, asked, layer, found) if asked.kind.rank == "common" and name == "weight" else None
    if exact is not None:
        yield (
            "cross terms",
            f"{100 * exact:.2g} % of the combined delta lies in B_i A_j with i != j, which nobody asked for",
        )
    elif asked.kind.rank == "common":
        yield "cross terms", f"each adapter alone is right; {share} of the combined delta was not asked for"
    yield "numeric", f"each adapter alone is right; {share} of the combined delta was not asked for"


def _within(found: Tensor, due: Tensor, size: float) -> bool:
    return float(torch.linalg.vector_norm(found - due)) <= size


def _reach(stage: Stage, asked: Combination, layer: str, name: str) -> float:
    """Return sum abs(w_i) norm(D_i)."""
    _, weights = combining.sources(stage, asked, layer)
    changes = combining.changes(stage, asked, layer, plain=True)
    sizes = [float(torch.linalg.vector_norm(one[name].value)) if name in one else 0.0 for one in changes]
    return sum(abs(weight) * size for weight, size in zip(weights, sizes, strict=True))


def stored_shorter(stage: Stage, made: Combined, layer: str) -> str | None:
    """Return what to say where the combined adapter is stored in a shorter dtype than its sources."""
    stored = [tensor.dtype for tensor in made.tensors.get(layer, {}).values()]
    shortest = max(stored, key=lambda dtype: torch.finfo(dtype).eps, default=None)
    kept = stage.machine.adapter.store.dtype
    if shortest is None or torch.finfo(shortest).eps <= torch.finfo(kept).eps:
        return None
    short, wide = (str(dtype).removeprefix("torch.") for dtype in (shortest, kept))
    return f"the combined adapter is stored in {short}, its sources in {wide}"


def wrong_alone(stage: Stage, asked: Combination, layer: str, name: str) -> tuple[str, str] | None:
    """Return the error of the first member that the library gets wrong by itself, or None."""
    for index, weight in zip(asked.members, asked.weights, strict=True):
        single = asked.but(members=(index,), weights=(weight,)).having(svd_clamp=None)
        error = _error(stage, single)
        if error is None or error <= _tolerable(stage) or layer not in combining.layers(stage, single):
            continue
        due = combining.total(stage, single, layer, plain=True)
        got = combining.outcome(stage, combining.made(stage, single), layer) or {}
        if name not in due:
            continue
        value, norm = zero_unless(got, name, due), float(due[name].value.norm())
        rounded = compare(name, value, due[name].value, combining.exact_bound(stage, single, layer)[name]).holds
        if not rounded and not _within(value, due[name].value, _tolerable(stage) * norm):
            symptom, note = alone(value, due[name].value)
            return symptom, f"already of '{stage.names[index]}' alone: {note}"
    return None


def zero_unless(found: Change, name: str, due: Change) -> Tensor:
    """Return what is found of a tensor, zeros where it is left alone."""
    return found[name].value if name in found else torch.zeros_like(due[name].value)


def _not_copied(stage: Stage, asked: Combination, made: Combined, layer: str) -> tuple[str, str] | None:
    """Return what to say where a single adapter's own tensors, other than its factors, have not come over."""
    site, source = combining.combined(stage, made, layer), combining.sources(stage, asked, layer)[0][0]
    if len(asked.members) > 1 or site is None:
        return None
    for role, form in source.tensors.items():
        if role not in ("A", "B") and not (role in site.tensors and torch.equal(site.tensors[role].value, form.value)):
            return f"{role} lost", f"the combined adapter does not have its source's {role}"
    return None


def excess(found: Tensor, due: Tensor) -> str:
    """Return the energy of found - due as a share of the energy of found, in words."""
    size = float(torch.linalg.vector_norm(found))
    wrong = float(torch.linalg.vector_norm(found - due))
    return f"{min((wrong / size) ** 2, 9.99):.0%}" if size else "nothing"


def alone(found: Tensor, due: Tensor) -> tuple[str, str]:
    """Name the error of what ought to be `due` where no other adapter can have a part in it."""
    energy = float((due * due).sum())
    if not bool(found.any()):
        return "lost", "the combined adapter changes nothing"
    factor = float((found * due).sum()) / energy if energy else 0.0
    apart = float(torch.linalg.vector_norm(found - factor * due))
    if energy and abs(factor - 1) > 2.0**-10 and apart <= 2.0**-6 * float(torch.linalg.vector_norm(found)):
        if factor < 0:
            return "sign", f"the combined delta is {factor:.4g} times what was asked for"
        return "scaled", f"the combined delta is {factor:.4g} times what was asked for"
    return "numeric", f"{excess(found, due)} of the combined delta was not asked for"


def _single_precision(stage: Stage, asked: Combination, layer: str, name: str, found: Tensor, due: Tensor) -> bool:
    """Return whether an error in float64 is no larger than a few roundings to float32."""
    if stage.machine.adapter.store.dtype != torch.float64:
        return False
    return _within(found, due, 2.0**-20 * _reach(stage, asked, layer, name))


def identity_lost(
    stage: Stage, asked: Combination, layer: str, name: str, found: Tensor, due: Tensor
) -> tuple[str, str] | None:
    """Return what to say where found - due is a multiple of the base: the vectors were added, not the changes."""
    base, wrong = stage.base(layer)[name].value, found - due
    energy = float((base * base).sum())
    factor = float((wrong * base).sum()) / energy if energy else 0.0
    if not energy or float(torch.linalg.vector_norm(wrong - factor * base)) > 2.0**-6 * float(
        torch.linalg.vector_norm(wrong)
    ):
        return None
    if abs(sum(asked.weights) - 1) < 2.0**-20:
        return "absent counted as zero", (
            f"an adapter that is not on a layer leaves it alone, yet counts as a scale of zero: adapters that do "
            f"nothing would leave {1 + factor:.4g} W here"
        )
    return "identity lost", (
        f"the scales were added, not what they change: adapters that do nothing would leave {1 + factor:.4g} W here; "
        "right only where the weights of the adapters on a layer sum to 1"
    )


def _tolerable(stage: Stage) -> float:
    """Return a relative error far above rounding and far below a wrong sign or scale: for a diagnosis only."""
    return max(2.0**-10, 64 * stage.machine.adapter.store.u)


def _error(stage: Stage, asked: Combination) -> float | None:
    """Return the largest relative error over the layers of a combination; None where it fails."""
    try:
        made = combining.made(stage, asked)
        worst = 0.0
        for layer in combining.layers(stage, asked):
            due = combining.total(stage, asked, layer, plain=True)
            found = combining.outcome(stage, made, layer) or {}
            for tensor, form in due.items():
                size = float(torch.linalg.vector_norm(form.value))
                value = found[tensor].value if tensor in found else torch.zeros_like(form.value)
                off = float(torch.linalg.vector_norm(value - form.value))
                worst = max(worst, off / size if size else (0.0 if off == 0 else float("inf")))
        return worst
    except combining.Declined:
        return None
    except Exception as error:
        if not (refusal.is_library(error, stage.implementation) or isinstance(error, RuntimeError)):
            raise
        return None


def cross_energy(stage: Stage, asked: Combination, layer: str, found: Tensor) -> float | None:
    """Return the share of the combined delta's energy in products of unlike factors, where it is determined."""
    sites, _ = combining.sources(stage, asked, layer)
    if len(set(asked.members)) < len(asked.members) or any(not {"A", "B"} <= site.tensors.keys() for site in sites):
        return None
    m, whole = combining.plain_machine(stage), [combining.ungrouped(site) for site in sites]
    pairs = [
        [
            combining.change(stage, m, replace(left, tensors={"A": right.tensors["A"], "B": left.tensors["B"]}))[
                "weight"
            ].value
            for right in whole
        ]
        for left in whole
        if len({site.tensors["A"].value.shape[0] for site in whole}) == 1
    ]
    return cross_share(pairs, found) if pairs else None


def repairs(stage: Stage, asked: Combination) -> tuple[Repair, ...]:
    """Return which kinds give the sum within rounding, and what they cost in rank, measured on this case."""
    if stage.formula.delta is None:
        return ()
    ranks = sum(combining.highest_rank(stage.case.adapters[index]) for index in asked.members)
    tried = [
        (asked.of("cat", density=None), ranks),
        (asked.of("svd", density=None, svd_rank=ranks, svd_clamp=None), ranks),
    ]
    found = []
    for candidate, rank in tried:
        if candidate.name == asked.name or combining.promise(stage, candidate) in (None, Promise.UNSPECIFIED):
            continue
        error = _error(stage, candidate.having(svd_rank=rank if candidate.name == "svd" else None))
        if error is not None and error <= _tolerable(stage):
            found.append(Repair(candidate.name, rank, combining.rank_of(stage, asked), error))
    return tuple(found)


def repaired(stage: Stage, asked: Combination, violation: Measurement, *notes: str) -> Measurement:
    """Return a violation with what its user can do today, told after `notes` and before its own.

    Another kind is no way out where one adapter is wrong by itself, or where only the precision is short.
    """
    if stage.formula.delta is None or len(asked.members) == 1 or violation.symptom == "single precision":
        return replace(violation, note="; ".join(part for part in (*notes, violation.note) if part))
    ways = repairs(stage, asked)
    told = "repair: " + ", ".join(way.words() for way in ways) if ways else "no kind of this library gives the sum here"
    return replace(violation, note="; ".join(part for part in (*notes, told, violation.note) if part), repairs=ways)


def unpruned_factors(stage: Stage, asked: Combination, layer: str) -> tuple[Repair, ...]:
    """Return what it costs to have a definition on full deltas: the kind's truncated twin at a rank that cuts nothing.

    Nothing for random drops: two runs of them drop other elements.
    """
    twin = f"{asked.name}_svd"
    if asked.kind.prunes == "random" or twin not in stage.variant.combinations:
        return ()
    due = combining.ideal(stage, asked, layer)["weight"].value
    rank = min(due.shape[0], due[0].numel())
    candidate = asked.of(twin, svd_rank=rank)
    try:  # factors that are no adapter of the layer have no product
        change = combining.outcome(stage, combining.made(stage, candidate), layer)
        found = change["weight"].value if change else torch.zeros_like(due)
    except combining.Declined:
        return ()
    except Exception as error:
        if not (refusal.is_library(error, stage.implementation) or isinstance(error, RuntimeError)):
            raise
        return ()
    size = float(torch.linalg.vector_norm(due))
    error = float(torch.linalg.vector_norm(found - due)) / size if found.shape == due.shape and size else None
    if error is None or error > _tolerable(stage):
        return ()
    return (Repair(twin, rank, combining.rank_of(stage, asked), error),)
