"""Low-rank factors assembled from one short vector or bank that all layers share: VB-LoRA and Uni-LoRA."""

from __future__ import annotations

import torch

from peftcheck.oracle.additive import Delta, Path, additive
from peftcheck.oracle.form import Machine, Site
from peftcheck.oracle.layers import oriented
from peftcheck.rounding import Arithmetic, Bounded


def admixture(ar: Arithmetic, logits: Bounded, bank: Bounded, k: int) -> Bounded:
    """Return the top-k admixture of the bank's vectors: softmax over the k largest logits, then their weighted sum.

    logits (..., h), bank (h, b) -> (..., b). The logits are compared as they are stored, so that the choice is
    certain unless the k-th largest ties with the next: then each choice among the tied ones is right, all have the
    same weight w, and the bound covers them (m of them chosen: m w (largest - smallest of their elements)).
    """
    values, chosen = logits.value.topk(k, dim=-1)
    peak = Bounded(values[..., :1])
    exponent = ar.sub(Bounded(values), peak)
    powers = ar.apply(exponent, torch.exp, torch.exp(exponent.value + exponent.bound))
    # some kernels divide, some multiply by the reciprocal: one rounding more
    weights = ar.mul(powers, ar.div(Bounded(torch.ones(())), ar.sum(powers, -1)))
    terms = ar.mul(weights.map(lambda t: t.unsqueeze(-1)), bank.map(lambda t: t[chosen]))
    mixed = ar.sum(terms, -2, keepdim=False)
    tied = logits.value == values[..., -1:]
    ambiguous = tied.sum(-1) > (values == values[..., -1:]).sum(-1)
    if not bool(ambiguous.any()):
        return mixed
    inside = (values == values[..., -1:]).sum(-1, keepdim=True)
    candidates = bank.value.expand(*tied.shape, -1)
    largest = candidates.masked_fill(~tied.unsqueeze(-1), -torch.inf).amax(-2)
    smallest = candidates.masked_fill(~tied.unsqueeze(-1), torch.inf).amin(-2)
    spread = inside * weights.value[..., -1:] * (largest - smallest) * (1 + 4 * ar.store.roundoff)
    return mixed.widened(torch.where(ambiguous.unsqueeze(-1), spread, torch.zeros_like(spread)))


def _vblora(m: Machine, site: Site) -> tuple[Bounded, Bounded]:
    """Return B (out, r) and A (r, in), glued together from sub-vectors of length b."""
    k, bank = site.adapter.option("topk"), site.tensors["bank"]
    a = admixture(m.adapter, site.tensors["logits.A"], bank, k).map(lambda t: t.flatten(1))
    b = admixture(m.adapter, site.tensors["logits.B"], bank, k).map(lambda t: t.transpose(1, 2).flatten(0, 1))
    return b, a


def _unilora(m: Machine, site: Site) -> tuple[Bounded, Bounded]:
    """Return B (out, r) and A (r, in), each element one of theta's, times what makes the projection an isometry."""

    def factor(name: str) -> Bounded:
        entries = site.tensors[f"entries.{name}"].value.long()
        return m.adapter.mul(site.tensors["theta"].map(lambda t: t[entries]), site.tensors[f"scales.{name}"])

    return factor("B"), factor("A")


def _low_rank(factors) -> tuple[Delta, Path]:
    def delta(m: Machine, site: Site) -> dict[str, Bounded]:
        b, a = factors(m, site)
        return {"weight": oriented(site.spec, m.adapter.matmul(b, a))}

    def path(m: Machine, site: Site, x: Bounded) -> Bounded:
        b, a = factors(m, site)
        hidden = m.adapter.matmul(x, a.map(torch.t))
        return m.adapter.matmul(hidden, b.map(torch.t))

    return delta, path


FORMULAS = {
    "vblora": additive(
        *_low_rank(_vblora),
        "Li et al., VB-LoRA, 2024, eq. 2-3: every sub-vector of A and B is a top-k admixture of a shared bank",
        dyadic=False,
    ),
    "unilora": additive(
        *_low_rank(_unilora),
        "Li et al., Uni-LoRA, 2025, section 3: all entries of A and B are P theta, one nonzero per row of P",
        hints={"scales.A": "projection", "scales.B": "projection"},
    ),
}
