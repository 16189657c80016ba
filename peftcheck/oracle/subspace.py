"""PSOFT and DeLoRA: a low-rank change whose middle is a rotation, or a normalisation."""

from __future__ import annotations

import torch

from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Machine, Site
from peftcheck.oracle.rotation import constrained, neumann, skew
from peftcheck.rounding import Arithmetic, Bounded, precision
from peftcheck.rounding_linalg import cayley, working

_SINGLE = Arithmetic(precision(torch.float32))

# PSOFT


def rotation(m: Machine, site: Site) -> Bounded:
    """Return diag(b) R diag(a) (r, r), R = (I + Q)(I - Q)^-1 or its Neumann series, or free; as the adapter holds it.

    The solver and the gains that follow it work in single precision where the adapter is in half.
    """
    tensors, adapter, ar = site.tensors, site.adapter, m.adapter
    if not adapter.option("orthogonal"):
        middle = tensors["R"]
    else:
        q = skew(tensors["R"].map(lambda t: t[None])).map(lambda t: t[0])
        if adapter.option("neumann"):
            if adapter.option("eps") is not None:
                q = constrained(ar, q, adapter.option("eps"))
            middle = neumann(ar, q, adapter.option("terms"))
        else:
            ar = working(ar)
            middle = cayley(ar, Bounded(-q.value, q.error))
    if "b" in tensors:
        middle = ar.mul(tensors["b"].map(lambda t: t[:, None]), middle)
    if "a" in tensors:
        middle = ar.mul(middle, tensors["a"].map(lambda t: t[None, :]))
    return m.adapter.rounded(middle) if ar.store.dtype != m.adapter.store.dtype else middle


def _scale(site: Site) -> float:
    return site.adapter.alpha / site.adapter.rank


def psoft_delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return (alpha / r) B (R - I) A, in single precision, as the base's dtype holds it."""
    a, b, ar = site.tensors["A"], site.tensors["B"], _SINGLE
    middle = rotation(m, site)
    turned = ar.sub(middle, Bounded(torch.eye(middle.value.shape[0], dtype=torch.float64)))
    change = ar.scale(ar.matmul(ar.matmul(b, turned), a), _scale(site))
    return {"weight": m.base.rounded(change)}


def psoft_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return (alpha / r) B (R A x - A x), in single precision: the difference is of two rounded vectors."""
    a, b, ar = site.tensors["A"], site.tensors["B"], _SINGLE
    low = ar.matmul(ar.rounded(x), a.map(torch.t))
    turned = ar.matmul(low, rotation(m, site).map(torch.t))
    return ar.scale(ar.matmul(ar.sub(turned, low), b.map(torch.t)), _scale(site))


PSOFT = additive(
    psoft_delta,
    psoft_path,
    "Wu et al., Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, 2025, eq. 6 and 8",
    hints={"R": "rotation", "a": "scale", "b": "scale", "A": "keep", "B": "keep"},
    dyadic=False,
)

# DeLoRA


def _strength(m: Machine, site: Site) -> Bounded:
    """Return lambda / (r norm(a_i) norm(b_i)) for every rank-one component (r)."""
    ar, a, b = m.adapter, site.tensors["A"], site.tensors["B"]
    norms = ar.mul(ar.norm(a, 1).map(lambda t: t[:, 0]), ar.norm(b, 0).map(lambda t: t[0]))
    bound = ar.div(site.tensors["lambda"], Bounded(torch.tensor(float(site.adapter.rank), dtype=torch.float64)))
    return ar.div(bound, norms)


def delora_delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return (lambda / r) sum_i b_i a_i^T / (norm(a_i) norm(b_i)), each column times that of the base."""
    ar, tensors = m.adapter, site.tensors
    change = ar.matmul(ar.mul(tensors["B"], _strength(m, site)), tensors["A"])
    return {"weight": ar.mul(change, tensors["norm"])}


def delora_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return the same applied to x, factor by factor."""
    ar, tensors = m.adapter, site.tensors
    hidden = ar.matmul(ar.mul(ar.rounded(x), tensors["norm"]), tensors["A"].map(torch.t))
    y = ar.matmul(ar.mul(hidden, _strength(m, site)), tensors["B"].map(torch.t))
    return m.base.rounded(y) if m.mixed else y


DELORA = additive(
    delora_delta,
    delora_path,
    "Bini et al., DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation, 2025, eq. 7 and 8, with the norm of "
    "each column of the base in place of that of the whole, as documented",
    # never near zero: a component without a direction has no norm to divide by; lambda carries the zero profile
    hints={"A": "scale", "B": "scale", "norm": "keep"},
    dyadic=False,
)

FORMULAS = {"psoft": PSOFT, "delora": DELORA}
