"""Lily and Poly: low-rank factors mixed by a learned router, for the input or for the task."""

from __future__ import annotations

import torch

from peftcheck.oracle.additive import forward_by_adding
from peftcheck.oracle.form import Family, Formula, Machine, Site, unmerged
from peftcheck.oracle.softmax import softmax
from peftcheck.rounding import Arithmetic, Bounded

TASKS = 2
"""Row i of a batch belongs to task i mod 2: what the harness tells a router that asks for the task."""

_GUARD = 1e-12
"""The authors' code of Poly divides by the sum of the gates plus this."""


def _lily(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return s (A x) B', B' the experts weighted by the router's probabilities, averaged over all tokens."""
    ar, rank, width = m.adapter, site.adapter.rank, site.spec.n_out
    hidden = ar.matmul(ar.rounded(x), site.tensors["A"].map(torch.t))
    chances = softmax(ar, ar.matmul(hidden, site.tensors["router"].map(torch.t)))
    experts = chances.value.shape[-1]
    tokens = chances.map(lambda t: t.reshape(-1, experts))
    weights = ar.scale(ar.sum(tokens, 0), 1.0 / tokens.value.shape[0])
    bank = site.tensors["B"].map(lambda t: t.reshape(experts, rank * width))
    mixed = ar.matmul(weights, bank).map(lambda t: t.reshape(rank, width))
    return m.base.rounded(ar.scale(ar.matmul(hidden, mixed), site.adapter.alpha))


def _gates(ar: Arithmetic, logits: Bounded, splits: int, rows: int) -> Bounded:
    """Return sigmoid(Z) / sum(sigmoid(Z)) per row and split, (rows, splits, skills)."""
    tasks = torch.arange(rows) % TASKS
    chosen = logits.map(lambda t: t[tasks].reshape(rows, splits, -1))
    open_ = ar.apply(chosen, torch.sigmoid, 0.25)
    guard = Bounded(torch.tensor(_GUARD, dtype=torch.float64)).widened(_GUARD * ar.store.a)
    return ar.div(open_, ar.add(ar.sum(open_, -1), guard))


def _poly(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return x A_t B_t / r: per task and split of the channels, factors that are mixtures of the skills'."""
    ar, a, b = m.adapter, site.tensors["A"], site.tensors["B"]
    splits, skills = a.value.shape[:2]
    rows = x.value.shape[0]
    gates = _gates(ar, site.tensors["logits"], splits, rows)
    down = ar.bilinear(lambda w, t: torch.einsum("bqs,qsdr->bqdr", w, t), gates, a, skills)
    up = ar.bilinear(lambda w, t: torch.einsum("bqs,qsrd->bqrd", w, t), gates, b, skills)
    down = down.map(lambda t: t.reshape(rows, -1, t.shape[-1]))
    up = up.map(lambda t: t.transpose(1, 2).reshape(rows, t.shape[2], -1))
    hidden = ar.matmul(ar.rounded(x), down)
    rank = Bounded(torch.tensor(float(site.adapter.rank), dtype=torch.float64))
    return ar.div(ar.matmul(hidden, up), rank)


def _formula(path, source: str) -> Formula:
    return Formula(Family.OPAQUE, unmerged, forward_by_adding(path), source, dyadic=False)


FORMULAS = {
    "lily": _formula(
        _lily,
        "Zhong et al., Lily, 2024, section 3: W x + s B' A x, B' = sum_e S_e B_e, S the router's softmax; "
        "PEFT's documentation of num_B: one combined B per forward pass, hence the mean over its tokens",
    ),
    "poly": _formula(
        _poly,
        "Ponti et al., Polytropon, 2022, eq. 4, with heads as Caccia et al., MHR, 2023, section 3.1: "
        "A_t = sum_s sigmoid(Z_ts) A_s / sum_s sigmoid(Z_ts), B_t likewise, W x + B_t A_t x / r",
    ),
}
