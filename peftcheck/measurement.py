"""What a law measures: residuals against budgets, elementwise, and the worst of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Repair:
    """What gives a violated combination today, measured on the same case.

    `kind`: the combination kind that gives it; `rank`: what that costs, `instead` of the rank of the kind asked for;
    `error`: the relative error that is left (Frobenius).
    """

    kind: str
    rank: int
    instead: int
    error: float

    def words(self) -> str:
        """Say it in a clause."""
        return f"'{self.kind}' gives it at rank {self.rank} instead of {self.instead} (relative error {self.error:.2g})"


@dataclass(frozen=True)
class Measurement:
    """The worst element of everything that a law compared.

    `ratio` = residual / bound there: 0 where the residual is 0, inf where only the bound is, NaN where either is
    NaN. `beyond` is the same against bound + the bounds that the library documents (equal to `ratio` where there
    are none). `role` names the tensor, `symptom` the kind of difference: 'numeric', 'non-finite', 'shape',
    'dtype', 'changed', ... `note` says more, in words. `repairs`: what its user can do today, where that was measured.
    """

    ratio: float
    beyond: float
    role: str
    symptom: str = "numeric"
    residual: float = 0.0
    bound: float = 0.0
    element: tuple[int, ...] = ()
    note: str = ""
    explained: str = ""
    repairs: tuple[Repair, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the law holds; NaN does not."""
        return self.ratio <= 1


NOTHING = Measurement(0.0, 0.0, "")


def ratios(residual: Tensor, budget: Tensor) -> Tensor:
    """Return residual / budget elementwise: 0 where the residual is 0, NaN where either is, inf over zero."""
    quotient = residual / budget
    zero = (residual == 0) & ~torch.isnan(budget)
    return torch.where(zero, torch.zeros_like(quotient), quotient)


def compare(
    role: str, found: Tensor, expected: Tensor, budget: Tensor, documented: Tensor | None = None
) -> Measurement:
    """Return the worst element of abs(found - expected) / budget; all are taken to fp64.

    Raises ValueError where a budget is negative: that is a defect of the harness.
    """
    if found.shape != expected.shape:
        return broken(role, "shape", f"shape {tuple(found.shape)} where {tuple(expected.shape)} is due")
    if found.numel() == 0:
        return replace(NOTHING, role=role)
    try:
        budget = budget.broadcast_to(expected.shape)
    except RuntimeError:  # both tensors came from the library, alike in a shape that is not the layer's
        return broken(role, "shape", f"shape {tuple(found.shape)} where {tuple(budget.shape)} is due")
    if bool((budget < 0).any()):
        raise ValueError(f"negative budget for {role}")
    found, expected = found.detach().double(), expected.detach().double()
    residual = (found - expected).abs()
    same = found == expected  # equal infinities: no difference
    residual = torch.where(same, torch.zeros_like(residual), residual)
    quotient = ratios(residual, budget)
    at = _worst(quotient)
    ratio = float(quotient.reshape(-1)[at])
    beyond = ratio
    if documented is not None and not ratio <= 1:
        allowed = ratios(residual, budget + documented.broadcast_to(expected.shape))
        worst = _worst(allowed)
        beyond = float(allowed.reshape(-1)[worst])
        at = at if beyond <= 1 else worst
    value = float(found.reshape(-1)[at])
    symptom = "numeric" if math.isfinite(value) or not math.isfinite(float(expected.reshape(-1)[at])) else "non-finite"
    return Measurement(
        ratio,
        beyond,
        role,
        symptom,
        float(residual.reshape(-1)[at]),
        float(budget.reshape(-1)[at]),
        tuple(int(i) for i in np.unravel_index(at, tuple(expected.shape))),
        f"{value:.17g} where {float(expected.reshape(-1)[at]):.17g} is due",
    )


def _worst(quotient: Tensor) -> int:
    flat = quotient.reshape(-1)
    missing = torch.isnan(flat)
    return int(missing.nonzero()[0]) if bool(missing.any()) else int(flat.argmax())


def identical(role: str, found: Tensor, expected: Tensor, symptom: str = "changed") -> Measurement:
    """Return whether two tensors agree in shape, dtype and every bit (NaN equal to NaN)."""
    if found.shape != expected.shape:
        return broken(role, "shape", f"shape {tuple(found.shape)} where {tuple(expected.shape)} is due")
    if found.dtype != expected.dtype:
        return broken(role, "dtype", f"{found.dtype} where {expected.dtype} is due")
    if torch.equal(_bits(found), _bits(expected)):
        return replace(NOTHING, role=role)
    different = (_bits(found) != _bits(expected)) & ~((found != found) & (expected != expected))
    if not bool(different.any()):
        return replace(NOTHING, role=role)
    at = tuple(int(i) for i in different.nonzero()[0])
    note = f"{found[at].item():.17g} where {expected[at].item():.17g} stood" if found.is_floating_point() else ""
    return Measurement(math.inf, math.inf, role, symptom, element=at, note=note)


_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _bits(tensor: Tensor) -> Tensor:
    """Return the tensor as integers, which tell -0.0 from 0.0."""
    return tensor.detach().view(_WORDS[tensor.element_size()]) if tensor.is_floating_point() else tensor


def broken(role: str, symptom: str, note: str) -> Measurement:
    """Return the measurement of a fact that does not hold at all."""
    return Measurement(math.inf, math.inf, role, symptom, note=note)


def worst(measurements: Iterable[Measurement]) -> Measurement:
    """Return the measurement that is furthest from holding: NaN first, then the largest beyond and ratio."""
    return max(measurements, key=lambda m: (_rank(m.beyond), _rank(m.ratio)), default=NOTHING)


def _rank(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio
