"""Low-rank updates with something between, in or around the two factors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from peftcheck.oracle.additive import additive
from peftcheck.oracle.form import Machine, Site
from peftcheck.oracle.layers import oriented
from peftcheck.oracle.lowrank import LORA, delta, path, scale
from peftcheck.rounding import Bounded


def kasa(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return s B diag(d) A: a learned singular value for each direction."""
    a, b, diag = (site.tensors[role] for role in ("A", "B", "diag"))
    change = m.adapter.scale(m.adapter.matmul(m.adapter.mul(b, diag), a), scale(site.adapter))
    return {"weight": oriented(site.spec, change)}


def kasa_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return s B (d * A x)."""
    a, b, diag = (site.tensors[role] for role in ("A", "B", "diag"))
    hidden = m.adapter.mul(m.adapter.matmul(m.adapter.rounded(x), a.map(torch.t)), diag)
    return m.adapter.scale(m.adapter.matmul(hidden, b.map(torch.t)), scale(site.adapter))


def written_out(site: Site) -> Site:
    """Return the site with its blocked factor as the matrix it stands for: blocks along the diagonal, zeros else.

    A factor that is as wide as that matrix is one already.
    """
    role, blocks = site.adapter.option("factor"), site.adapter.option("blocks")
    wide = site.spec.n_in if role == "A" else site.tensors["A"].value.shape[0]
    if site.tensors[role].value.shape[1] == wide:
        return site

    def spread(t: Tensor) -> Tensor:
        height, width = t.shape[0] // blocks, t.shape[1]
        full = t.new_zeros(t.shape[0], width * blocks)
        for k in range(blocks):
            own = slice(k * height, (k + 1) * height)
            full[own, k * width : (k + 1) * width] = t[own]
        return full

    return replace(site, tensors={**site.tensors, role: site.tensors[role].map(spread)})


def blocked(m: Machine, site: Site) -> dict[str, Bounded]:
    """Return s B A with A or B block-diagonal."""
    return delta(m, written_out(site))


def blocked_path(m: Machine, site: Site, x: Bounded) -> Bounded:
    """Return s B (A x); the zeros beside the blocks add nothing to the value."""
    return path(m, written_out(site), x)


FORMULAS = {
    "lora.kasa": additive(
        kasa, kasa_path, "Wang et al., KaSA, 2024: W + s B diag(sigma) A, on the base less its r smallest directions"
    ),
    "lora.bdlora": additive(blocked, blocked_path, "BD-LoRA, as PEFT documents it: LoRA with A or B block-diagonal"),
    # the compression is of what is kept for the backward pass; the forward is LoRA's
    "lora.velora": replace(
        LORA,
        hints={"embed": "keep"},
        source="Miles et al., VeLoRA, 2024: LoRA, but for what the backward pass keeps of the input",
    ),
    # in evaluation nothing is sampled
    "lora.monteclora": replace(
        LORA,
        hints={
            f"lora_monteclora_sampler.{name}": "keep"
            for name in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
        },
        source="MonteCLoRA: LoRA, with A perturbed in training only",
    ),
}
