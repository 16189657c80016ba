"""Activated LoRA: a low-rank change of the tokens from an invocation on, and of none before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck import transformer_models
from peftcheck.case import AdapterSpec, Case
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, unmerged
from peftcheck.oracle.layers import layer_output
from peftcheck.oracle.lowrank import path
from peftcheck.rounding import Bounded


def lasts(x: Tensor) -> list[int | None]:
    """Return how many of the last tokens of each row are invoked, None for none, in the input of a layer alone.

    There are no ids there: what invokes a row of x (rows[, tokens], n) is the first token whose first feature is
    positive. A rule of the harness that a row knows by itself, whatever other rows it stands among.
    """
    heads = x[..., 0].reshape(len(x), -1)
    return [_from_first(row > 0) for row in heads]


def _from_first(hits: Tensor) -> int | None:
    places = hits.nonzero()
    return len(hits) - int(places[0]) if len(places) else None


def invocation(case: Case, adapter: str) -> tuple[int, ...]:
    """Return the ids that invoke an adapter of a whole model: one or two that stand in a row of the case's input.

    Of several adapters each has its own, taken from another row or another place.
    """
    ids = transformer_models.arguments(case)[0]
    index = next(i for i, own in enumerate(case.adapters) if own.name == adapter)
    row = ids[index % len(ids)]
    start = (index + len(row) // 2) % len(row)
    return tuple(int(token) for token in row[start : start + 2])


def told(case: Case, adapter: AdapterSpec) -> AdapterSpec:
    """Return the adapter with the option `lasts` where the ids of a whole model decide: see `lasts`."""
    if not case.whole:
        return adapter
    wanted = torch.tensor(invocation(case, adapter.name))
    found = []
    for row in transformer_models.arguments(case)[0]:
        starts = [s for s in range(len(row) - len(wanted) + 1) if torch.equal(row[s : s + len(wanted)], wanted)]
        found.append(len(row) - starts[-1] if starts else None)
    return replace(adapter, options=tuple(sorted({**dict(adapter.options), "lasts": tuple(found)}.items())))


def _forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return W x, plus s B A x for the tokens from the last invocation on: the others keep every bit."""
    y = layer_output(m.base, sites[0].spec, base, x)
    for site in sites:
        tokens = x.value[..., 0].reshape(len(x.value), -1).shape[1]
        counts = site.adapter.option("lasts") or lasts(x.value)
        on = torch.stack([torch.arange(tokens) >= tokens - (count or 0) for count in counts])
        on = on.reshape(*x.value.shape[:-1], 1)
        added = m.base.add(y, path(m, site, x))
        y = Bounded(torch.where(on, added.value, y.value), torch.where(on, added.bound, y.bound))
    return y


FORMULAS = {
    "lora.alora": Formula(
        Family.OPAQUE,
        unmerged,
        _forward,
        "Greenewald et al., Activated LoRA, 2025, section 3: W x + s B A x from the invocation tokens on, W x before",
        told=told,
        dyadic=False,
    ),
}
