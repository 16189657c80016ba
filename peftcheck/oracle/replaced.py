"""Methods that replace: whole layers (LN tuning), rows of an embedding (trainable tokens)."""

from __future__ import annotations

from collections.abc import Sequence

from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import layer_output
from peftcheck.rounding import Bounded


def layer(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return the layer's own tensors as the adapter has them."""
    return {name: m.base.rounded(site.tensors[name]) for name in base}


def layer_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return the output of the layer that the adapter puts in the place of the base's."""
    return layer_output(m.base, sites[-1].spec, layer(m, sites[-1], base), x)


def _with_rows(table: Bounded, rows: list[int], new: Bounded) -> Bounded:
    value, error = table.value.clone(), table.bound.clone()
    value[rows] = new.value
    error[rows] = new.bound
    quantum = None if table.quantum is None or new.quantum is None else min(table.quantum, new.quantum)
    return Bounded(value, error if bool((error != 0).any()) else None, quantum if bool((error == 0).all()) else None)


def tokens(m: Machine, site: Site, base: Base) -> dict[str, Bounded]:
    """Return the weight with the trained rows in the place of the base's."""
    rows = list(site.adapter.option("tokens"))
    return {"weight": _with_rows(base["weight"], rows, m.base.rounded(site.tensors["rows"]))}


def tokens_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return the layer's output on the weight with all trained rows in place; its bias stays."""
    tuned = dict(base)
    for site in sites:
        tuned = {**tuned, **tokens(m, site, tuned)}
    return layer_output(m.base, sites[0].spec, tuned, x)


FORMULAS = {
    "ln_tuning": Formula(
        Family.SNAPSHOT,
        layer,
        layer_forward,
        "Zhao et al., Tuning LayerNorm in Attention, 2023: the parameters of the layer are trained as they are",
        hints={"embed_scale": "keep"},
    ),
    "trainable_tokens": Formula(
        Family.SNAPSHOT,
        tokens,
        tokens_forward,
        "PEFT's documentation of TrainableTokensConfig: the chosen rows are trained, the rest is as it was",
        hints={"original": "keep"},
    ),
}
