"""Arrow: low-rank experts weighed, token by token, by how far the token lies along the direction each changes most."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck.oracle.additive import forward_by_adding
from peftcheck.oracle.form import Family, Formula, Machine, Site, unmerged
from peftcheck.oracle.lowrank import scale
from peftcheck.oracle.routed import softmax
from peftcheck.rounding import Arithmetic, Bounded, precision

MOST = 4
"""The largest number of experts, and of general adapters, that roles are declared for."""

_STEPS = 15
"""PEFT finds the direction by as many steps of the power iteration (documented there)."""

_GUARD = 1e-8
"""PEFT divides by the norm of each iterate plus this."""

_LUCK = 1e9
"""The tangent of a normal start's angle to the direction exceeds _LUCK (sqrt(n) + 7) less often than once in 1e9."""


def _numbered(site: Site, role: str) -> list[Bounded]:
    return [site.tensors[f"{role}.{index}"] for index in range(MOST) if f"{role}.{index}" in site.tensors]


def _purified(ar: Arithmetic, site: Site, role: str) -> list[Bounded]:
    """Return a factor of each expert, less the mean of the general adapters' where there are any."""
    own, general = _numbered(site, role), _numbered(site, f"general.{role}")
    if not general:
        return own
    stacked = Bounded(torch.stack([g.value for g in general]))
    total = ar.sum(stacked, 0, keepdim=False)
    mean = ar.div(total, Bounded(torch.tensor(float(len(general)), dtype=torch.float64)))
    return [ar.sub(one, mean) for one in own]


def direction(ar: Arithmetic, a: Bounded, b: Bounded) -> Bounded:
    """Return the right singular vector (n,) of B A that belongs to the largest singular value, up to its sign.

    As a power iteration in single precision finds it, from a random start: M = A^T (B^T B) A, whose computed products
    are off by at most E, elementwise gamma(n + 2 r + m) abs(A)^T abs(B)^T abs(B) abs(A) besides what the factors are off.
    With the eigenvalues l1 >= l2 >= ...: the computed operator's direction is off by 2 E / (l1 - l2) (Davis and
    Kahan), what is left of the start is (l2 / l1)^15 times the tangent of its angle, and the guard makes the length
    1 - guard / l1. Where these reach one, nothing is known but that no element exceeds one.
    """
    single = Arithmetic(precision(torch.float32))
    product = b.value @ a.value
    _, sizes, rows = torch.linalg.svd(product, full_matrices=False)
    first, second = float(sizes[0]) ** 2, (float(sizes[1]) ** 2 if len(sizes) > 1 else 0.0)
    n, kept = a.value.shape[1], a.value.shape[0]
    counts = n + 2 * kept + b.value.shape[0] + 8
    terms = b.ceiling() @ a.ceiling()
    moved = b.bound @ a.ceiling() + b.ceiling() @ a.bound
    error = single.store.gamma(counts) * _norm(terms) ** 2 + 2 * _norm(moved) * _norm(terms)
    far = 1.0
    if first > 0 and first - second > 4 * error:
        start = _LUCK * (math.sqrt(n) + 7) * (second / first) ** _STEPS
        far = math.sqrt(2) * (2 * error / (first - second) / (1 - second / first) + start) + _GUARD / first
        far += (counts * single.store.u) if far < 1 else 0.0
    value = rows[0]
    bound = torch.where(torch.tensor(far) < 1, torch.full_like(value, min(far, 1.0)), 1 + value.abs())
    return ar.rounded(Bounded(value, bound))


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def _chosen(near: Bounded, most: int) -> tuple[Tensor, Tensor]:
    """Return the places of the `most` largest in each row, and whether no correct computation can choose others."""
    order = near.value.argsort(-1, descending=True)
    best, rest = order[:, :most], order[:, most:]
    low = (near.value - near.bound).gather(1, best).amin(-1)
    high = (near.value + near.bound).gather(1, rest).amax(-1) if rest.shape[1] else torch.full_like(low, -math.inf)
    return best, low > high


def _routed(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return sum_e c_e s B_e A_e x, c the softmax of the largest abs(p_e x) over the temperature, p_e its direction.

    Where the choice of experts hangs on rounding, each weight may be anything from 0 to 1.
    """
    ar, n = m.adapter, site.spec.n_in
    tokens = ar.rounded(x).map(lambda t: t.reshape(-1, n))
    downs, ups = _purified(ar, site, "A"), _purified(ar, site, "B")
    guides = [direction(ar, a, b) for a, b in zip(downs, ups, strict=True)]
    stacked = Bounded(torch.stack([g.value for g in guides], -1), torch.stack([g.bound for g in guides], -1))
    near = ar.matmul(tokens, stacked)
    near = replace(near, value=near.value.abs(), products=None)
    best, certain = _chosen(near, site.adapter.option("most"))
    heat = Bounded(torch.tensor(site.adapter.option("temperature"), dtype=torch.float64))
    chances = softmax(ar, ar.div(near.map(lambda t: t.gather(1, best)), heat))
    weights = Bounded(
        torch.zeros_like(near.value).scatter(1, best, chances.value),
        torch.where(certain[:, None], torch.zeros_like(near.value).scatter(1, best, chances.bound), 1.0),
    )
    changes = [
        ar.scale(ar.matmul(ar.matmul(tokens, a.map(torch.t)), b.map(torch.t)), scale(site.adapter))
        for a, b in zip(downs, ups, strict=True)
    ]
    stack = Bounded(torch.stack([c.value for c in changes], 1), torch.stack([c.bound for c in changes], 1))
    total = ar.matmul(weights.map(lambda t: t[:, None]), stack)
    return total.map(lambda t: t.reshape(*x.value.shape[:-1], -1))


FORMULAS = {
    "lora.arrow": Formula(
        Family.OPAQUE,
        unmerged,
        forward_by_adding(_routed),
        "Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, 2024, section 4.1 (Arrow): "
        "routing by the first right singular vector of B_e A_e; Bagherifard et al., GenKnowSub, 2025: experts less the "
        "mean of general adapters, factor by factor as PEFT documents it",
        hints={"router.A": "keep", "router.B": "keep", "router.prototypes": "keep"},
        dyadic=False,
    ),
}
