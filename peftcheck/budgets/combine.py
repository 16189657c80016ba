"""Budgets of weighted combinations: of those that are exact but for rounding, and of truncated ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck.case import AdapterSpec
from peftcheck.oracle.combination import matrix, weighted_sum
from peftcheck.oracle.form import Base, Formula, Machine, Site
from peftcheck.rounding import EXACT_FP64, Arithmetic, Bounded, Precision

_ORACLE = Arithmetic(EXACT_FP64)
_LAPACK = 35.0
"""LAPACK accepts a computed SVD up to `norm(A - U S V') <= 35 max(m, n) ulp norm(A)`, and as much loss of
orthogonality in U and V (TESTING/svd.in; Users' Guide, 3rd ed., section 4.9: a modestly growing function of m, n)."""


def stored(numbers: Precision) -> float:
    """Return the relative error of one rounding to storage, through the accumulator where that is wider."""
    return numbers.u + (numbers.a if numbers.u != numbers.a else 0.0)


def ceilings(formula: Formula, site: Site) -> dict[str, Tensor]:
    """Return s abs(B) abs(A), the delta of the absolute factors: no partial sum of the delta exceeds it."""
    absolute = {role: Bounded(form.value.abs()) for role, form in site.tensors.items()}
    change = formula.delta(Machine(_ORACLE, _ORACLE, False), replace(site, tensors=absolute))
    return {name: form.value.abs() for name, form in change.items()}


def _unscaled(adapter: AdapterSpec) -> AdapterSpec:
    """Return the adapter with a scale of one."""
    options = tuple((name, value) for name, value in adapter.options if name != "rslora")
    return replace(adapter, alpha=float(adapter.rank), options=options)


def _factors(formula: Formula, site: Site) -> tuple[str, ...]:
    """Return the roles of what the change is a product of: not of what is kept beside it."""
    return tuple(role for role in site.tensors if formula.hints.get(role) != "keep")


def _underflow(formula: Formula, site: Site) -> dict[str, Tensor]:
    """Return abs(B) 1 + 1 abs(A) + r: what an error of one in every element of a factor makes of the product."""
    plain = replace(site, adapter=_unscaled(site.adapter))
    total: dict[str, Tensor] = {}
    roles = _factors(formula, site)
    for lifted in (*({role} for role in roles), set(roles)):
        tensors = {
            r: Bounded(torch.ones_like(f.value) if r in lifted else f.value.abs()) for r, f in site.tensors.items()
        }
        change = formula.delta(Machine(_ORACLE, _ORACLE, False), replace(plain, tensors=tensors))
        for name, form in change.items():
            total[name] = total.get(name, 0.0) + form.value.abs()
    return total


def exact(
    m: Machine, formula: Formula, scales: Sequence[float], sites: Sequence[Site], weights: Sequence[float], split: bool
) -> dict[str, Tensor]:
    """Bound an exact combination of low-rank adapters: ((1 + v)^4 - 1) sum abs(w_i) s_i abs(B_i) abs(A_i) + underflow.

    The combined factors hold the weights: on one side, where w and s cost a rounding each, or as roots on both
    sides, where the root and the product cost one on each side: at most four roundings v in any term of the
    product. Nothing is summed in between, so that nothing else rounds; the products and sums that the judgement
    itself takes in fp64 add gamma(r n + 4). A stored element that underflows is off by eta, times what stands on
    the other side, times the scale or its root where that is applied afterwards.

    The exact regime: with the weights on one side (`split` false), if A w s is representable throughout and fp64
    holds the sum, the bound is zero.
    """
    if not split and m.exact and _representable(m, formula, scales, sites, weights):
        return {name: torch.zeros_like(value) for name, value in ceilings(formula, sites[0]).items()}
    v, eta = stored(m.adapter.store), m.adapter.store.eta
    ranks = sum(site.adapter.rank for site in sites)
    growth = (1 + v) ** 4 - 1 + 2 * EXACT_FP64.gamma(ranks + len(sites) + 8)
    bound: dict[str, Tensor] = {}
    for site, weight, scale in zip(sites, weights, scales, strict=True):
        lifted = eta * 2 * max(1.0, scale, math.sqrt(abs(weight) * scale))
        under = _underflow(formula, site)
        for name, ceiling in ceilings(formula, site).items():
            bound[name] = bound.get(name, 0.0) + growth * abs(weight) * ceiling + lifted * under[name]
    return bound


def _representable(m: Machine, formula: Formula, scales, sites: Sequence[Site], weights: Sequence[float]) -> bool:
    """Return whether A w s never rounds in storage, and the judgement's own sum never rounds in fp64."""
    changes: dict[str, list[Bounded]] = {}
    for site, weight, scale in zip(sites, weights, scales, strict=True):
        for form in (site.tensors[role] for role in _factors(formula, site)):
            if m.adapter.scale(m.adapter.scale(form, weight), scale).error is not None:
                return False
        for name, form in formula.delta(Machine(_ORACLE, _ORACLE, True), site).items():
            changes.setdefault(name, []).append(_ORACLE.scale(form, weight))
    return all(weighted_sum(_ORACLE, forms, [1.0] * len(forms)).error is None for forms in changes.values())


def factorwise(
    m: Machine,
    formula: Formula,
    scales: Sequence[float],
    sites: Sequence[Site],
    weights: Sequence[float],
    density: float,
) -> dict[str, Tensor]:
    """Bound how far two right computations of sums over factors differ: 2 ((1 + v)^(2n + 8) - 1) (sum c B)(sum c A).

    c_i = sqrt(abs(w_i) s_i) / density, absolute values throughout. In either factor a term costs the root, the
    product, the division by the density and that by the number of members, the cast, and n - 1 additions: n + 4
    roundings, on both sides; each may underflow.
    """
    v, count = stored(m.adapter.store), len(sites)
    roots = [math.sqrt(abs(weight) * scale) / density for weight, scale in zip(weights, scales, strict=True)]
    summed = {
        role: sum(root * site.tensors[role].value.abs() for root, site in zip(roots, sites, strict=True))
        for role in _factors(formula, sites[0])
    }
    plain = _unscaled(sites[0].adapter)
    union = replace(sites[0], adapter=plain, tensors={role: Bounded(value) for role, value in summed.items()})
    growth = 2 * ((1 + v) ** (2 * count + 8) - 1) + 2 * EXACT_FP64.gamma(plain.rank + 8)
    eta, under = m.adapter.store.eta * (count + 4) * max(1.0, *roots), _underflow(formula, union)
    bound = {name: growth * ceiling + eta * under[name] for name, ceiling in ceilings(formula, union).items()}
    for name, room in bound.items():
        if name != "weight":  # a tensor that is no product: its terms may carry the whole weight, not a root of it
            once = sum(abs(w) * ceilings(formula, site)[name] for w, site in zip(weights, sites, strict=True)) / density
            bound[name] = torch.maximum(room, growth * once + eta * under[name])
    return bound


def gates(
    m: Machine, formula: Formula, sites: Sequence[Site], weights: Sequence[float], base: Base
) -> dict[str, Tensor]:
    """Bound a weighted sum of vectors that multiply the base: gamma-like (n + 2) v sum abs(w_i l_i) abs(W) + eta."""
    growth = (1 + stored(m.adapter.store)) ** (len(sites) + 2) - 1 + EXACT_FP64.gamma(len(sites) + 6)
    bound: dict[str, Tensor] = {}
    absolute: Mapping[str, Bounded] = {name: Bounded(form.value.abs()) for name, form in base.items()}
    for site, weight in zip(sites, weights, strict=True):
        tensors = {role: Bounded(form.value.abs()) for role, form in site.tensors.items()}
        scaled = formula.merge(Machine(_ORACLE, _ORACLE, False), replace(site, tensors=tensors), absolute)
        for name, form in scaled.items():
            # the change is taken relative to the base: l W - W, rounded in fp64
            size = abs(weight) * (form.value + absolute[name].value)
            bound[name] = bound.get(name, 0.0) + growth * size + 2 * m.adapter.store.eta * absolute[name].value
    return {name: value + 4 * EXACT_FP64.u * absolute[name].value for name, value in bound.items()}


def truncation(m: Machine, target: Bounded, discarded: float) -> float:
    """Bound norm(T - X) in Frobenius' norm for a right truncated SVD X of T: the tail and what rounds.

    T itself is computed, elementwise within E, so that X approximates some T' with norm(T' - T) <= norm(E): its
    tail is at most tail(T) + norm(E), and the comparison is with T again: 2 norm(E). The SVD of T' is that of
    T' + F with U and V orthogonal up to a like amount, norm(F) <= p norm(T'), p = 35 max(m, n) 2a: F enters the
    residual and, by Mirsky's theorem, the tail; the loss of orthogonality of U and V scales the tail: 4 p in all.
    The product U S and both factors are stored: with orthonormal U, V each rounding moves X by at most v norm(T),
    and roots of S on either side cost one rounding more: 4 v. Elements that underflow move X by eta (m + n) (1 + norm(T)).
    The constants are for the worst case of an algorithm that random matrices do not come near: about 1 % of p is
    what they need.
    """
    numbers = m.adapter.store
    rows, columns = matrix(target.value).shape
    doubt = float(torch.linalg.vector_norm(target.bound))
    size = float(torch.linalg.vector_norm(target.value)) + doubt
    p = _LAPACK * max(rows, columns) * 2 * numbers.a
    return discarded + 2 * doubt + (4 * p + 4 * stored(numbers)) * size + numbers.eta * (rows + columns) * (1 + size)
