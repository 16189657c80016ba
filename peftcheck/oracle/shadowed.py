"""ShadowPEFT: a state that goes from block to block beside the hidden one, and is injected into each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from peftcheck.oracle.decoder import block
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, unmerged
from peftcheck.rounding import Arithmetic, Bounded


def _injected(m: Machine, site: Site, hidden: Bounded, state: Bounded) -> Bounded:
    """Return h + alpha W_up W_down (h - s), the difference in the base's dtype, the factors in the adapter's (eq. 2 to 4)."""
    down, up = (site.tensors[role].map(torch.t) for role in ("down", "up"))
    difference = m.adapter.rounded(m.base.sub(hidden, state))
    change = m.adapter.scale(m.adapter.matmul(m.adapter.matmul(difference, down), up), site.adapter.alpha)
    return m.base.add(hidden, m.base.rounded(change))


def _network(ar: Arithmetic, site: Site, name: str, x: Bounded) -> Bounded:
    """Return a network of two layers, GELU between, which is off by some roundoffs of the input where erf is near -1."""

    def linear(layer: int, given: Bounded) -> Bounded:
        weight, bias = (site.tensors[f"{name}.{layer}.{kind}"] for kind in ("weight", "bias"))
        return ar.join(ar.matmul(given, weight.map(torch.t)), bias)

    inside = linear(0, x)
    made = ar.apply(inside, lambda t: 0.5 * t * (1 + torch.erf(t / math.sqrt(2))), 1.13)
    return linear(2, made.widened(4 * ar.store.a * inside.ceiling()))


def _updated(m: Machine, site: Site, hidden: Bounded, state: Bounded) -> Bounded:
    """Return (1 - g) s + g t, t and g what two networks make of the block's output (eq. 5 to 7)."""
    ar = m.adapter
    given = ar.rounded(hidden)
    candidate = _network(ar, site, "transform", given)
    gate = ar.apply(_network(ar, site, "gate", given), torch.sigmoid, 0.25)
    kept = ar.sub(Bounded(torch.ones((), dtype=torch.float64)), gate)
    return m.base.rounded(ar.add(ar.mul(kept, ar.rounded(state)), ar.mul(gate, candidate)))


def _forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return what the block is given, the next state and the next hidden state, (3, batch, length, features).

    x stacks the hidden state, the state beside it and what the block made of what it was given: what a block computes is
    the base's own matter. Of a hidden state alone, (batch, length, features), return the block's output beside a state of
    zero.
    """
    (site,) = sites  # one adapter is active at a time
    if x.value.dim() == 3:
        alone = Bounded(torch.zeros_like(x.value))
        return block(m.base, site.spec, base, _injected(m, site, x, alone))
    hidden, state, after = (x.map(lambda t, at=at: t[at]) for at in range(3))
    made = (_injected(m, site, hidden, state), _updated(m, site, after, state), after)
    return Bounded(torch.stack([one.value for one in made]), torch.stack([one.bound for one in made]))


FORMULAS = {
    "shadow": Formula(
        Family.OPAQUE,
        unmerged,
        _forward,
        "ShadowPEFT, 2026, eq. 2 to 7: each block is given h + alpha W_up W_down (h - s), then s + g (t - s); "
        "the state that the first block is given, the output of the shadow network, is recorded and not judged",
        dyadic=False,
    ),
}
