"""AdaLoRA: a delta in the form of a singular value decomposition."""

from __future__ import annotations

import torch

from peftcheck.case import CONVOLUTIONS, LayerSpec
from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Machine, Site
from peftcheck.oracle.layers import convolve, oriented
from peftcheck.rounding import Bounded

# The authors' code divides by the number of ranks plus this, so that an emptied budget divides by no zero.
_GUARD = 1e-5


def _rank(m: Machine, site: Site) -> Bounded:
    held = torch.tensor(_GUARD, dtype=torch.float64)
    guard = Bounded(held, torch.full_like(held, _GUARD * m.adapter.store.a))
    return m.adapter.add(site.tensors["ranknum"], guard)


def _singular(m: Machine, site: Site) -> Bounded:
    return m.adapter.mul(site.tensors["Q"], site.tensors["E"])


def _scaled(m: Machine, site: Site, y: Bounded) -> Bounded:
    return m.adapter.div(m.adapter.scale(y, site.adapter.alpha), _rank(m, site))


def delta(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return alpha / (r + 1e-5) P diag(E) Q in the layer's orientation."""
    spec = site.spec
    change = _scaled(m, site, m.adapter.matmul(site.tensors["P"], _singular(m, site)))
    if spec.kind in CONVOLUTIONS:
        return {"weight": change.map(lambda t: _own_group(spec, t))}
    return {"weight": oriented(spec, change)}


def _own_group(spec: LayerSpec, matrix: torch.Tensor) -> torch.Tensor:
    """Shape (out, in * kernel) to the kernel, of which each output keeps the inputs of its own group."""
    dense = matrix.reshape(spec.groups, spec.n_out // spec.groups, spec.groups, spec.n_in // spec.groups, *spec.kernel)
    return torch.cat([dense[group, :, group] for group in range(spec.groups)])


def path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return alpha / (r + 1e-5) P (diag(E) Q x); a convolution applies its delta."""
    if site.spec.kind in CONVOLUTIONS:
        return convolve(m.adapter, site.spec, delta(m, site)["weight"], x)
    hidden = m.adapter.matmul(x, _singular(m, site).map(torch.t))
    return _scaled(m, site, m.adapter.matmul(hidden, site.tensors["P"].map(torch.t)))


FORMULAS = {
    "adalora": additive(
        delta,
        path,
        "Zhang et al., AdaLoRA, 2023, eq. 3: W + P diag(E) Q, times alpha / (r + 1e-5) as in the authors' code",
        hints={"ranknum": "keep"},
        dyadic=False,
    )
}
