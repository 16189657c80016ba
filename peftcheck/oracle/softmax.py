"""The softmax, with its bound."""

from __future__ import annotations

import torch
from torch import Tensor

from peftcheck.rounding import Arithmetic, Bounded


def softmax(ar: Arithmetic, logits: Bounded, hidden: Tensor | None = None) -> Bounded:
    """Return the softmax over the last dimension; zero where `hidden`, which never is a whole row.

    Shifting by the largest logit, whichever the machine finds, changes nothing in exact arithmetic; subtracting,
    exponentials, sum and quotient are bounded one by one. Each weight lies in [0, 1], so that no error exceeds 1.
    """
    seen = logits.value if hidden is None else logits.value.masked_fill(hidden, -torch.inf)
    at = seen.argmax(-1, keepdim=True)
    exponent = ar.sub(logits, logits.map(lambda t: t.gather(-1, at)))
    powers = ar.apply(exponent, torch.exp, torch.exp(exponent.value + exponent.bound))
    if hidden is not None:
        powers = powers.map(lambda t: torch.where(hidden, 0.0, t))
    # some kernels divide, some multiply by the reciprocal: one rounding more
    weights = ar.mul(powers, ar.div(Bounded(torch.ones(())), ar.sum(powers, -1)))
    most = 1.0 + ar.store.roundoff
    return Bounded(weights.value, torch.where(weights.bound < most, weights.bound, most))
