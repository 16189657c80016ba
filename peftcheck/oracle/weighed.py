"""X-LoRA: LoRA adapters weighed token by token, by what a classifier makes of the last hidden state of the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftcheck.case import AdapterSpec, Case
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site, unmerged
from peftcheck.oracle.layers import layer_output
from peftcheck.oracle.softmax import softmax
from peftcheck.rounding import Arithmetic, Bounded

HIDDEN = "hidden"
"""The role of the last hidden state: what the head is given."""


def _told(case: Case, adapter: AdapterSpec) -> AdapterSpec:
    """Return the adapter with the names of its layers, in the model's order: the classifier may weigh each apart."""
    names = tuple(case.layers[target].name for target in sorted(adapter.targets))
    return replace(adapter, options=tuple(sorted({**dict(adapter.options), "order": names}.items())))


def _scores(ar: Arithmetic, site: Site) -> Bounded:
    """Return what the classifier gives each expert on this layer, (batch, tokens, experts): linear layers, ReLU between."""
    count = sum(role.endswith(".weight") for role in site.tensors)
    made = site.tensors[HIDDEN]
    for layer in range(count):
        if layer:
            made = Bounded(made.value.clamp(min=0), made.error)  # moves nothing by more than its error
        weight, bias = (site.tensors[f"classifier.{layer}.{name}"] for name in ("weight", "bias"))
        made = ar.join(ar.matmul(made, weight.map(torch.t)), bias)
    if not site.adapter.option("layerwise"):
        return made
    order = site.adapter.option("order")
    return made.map(lambda t: t.unflatten(-1, (len(order), -1))[..., order.index(site.spec.name), :])


def weights(ar: Arithmetic, site: Site) -> Bounded:
    """Return the weight of each expert at each token, (batch, tokens, experts), all but the `top` largest zero.

    Softmax of the scores over all experts, over those that are kept, or none at all. Where rounding may make another
    choice nothing is vouched for.
    """
    made, over, most = _scores(ar, site), site.adapter.option("softmax"), site.adapter.option("top")
    if over == "all":
        temperature = torch.tensor(site.adapter.option("temperature"), dtype=torch.float64)
        made = softmax(ar, ar.div(made, Bounded(temperature)))
    if not most or most >= made.value.shape[-1]:
        return softmax(ar, made) if over == "top" else made
    dropped, unsure = _choice(made, most)
    if over == "top":
        made = softmax(ar, made, dropped)
    kept = made.map(lambda t: torch.where(dropped, 0.0, t))
    return Bounded(kept.value, torch.where(unsure, torch.inf, kept.bound))


def _choice(scores: Bounded, most: int) -> tuple[Tensor, Tensor]:
    """Return which experts are not among the `most` largest, and at which tokens (..., 1) that is not sure."""
    ranked = scores.value.argsort(-1, descending=True)
    dropped = torch.ones_like(scores.value, dtype=torch.bool).scatter(-1, ranked[..., :most], False)
    least = torch.where(dropped, torch.inf, scores.value - scores.bound).amin(-1, keepdim=True)
    highest = torch.where(dropped, scores.value + scores.bound, -torch.inf).amax(-1, keepdim=True)
    return dropped, highest >= least


def _forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return W x + b + g sum_e lambda_e s B_e A_e x: each expert is given its share of the input."""
    y = layer_output(m.base, sites[0].spec, base, x)
    for site in sites:
        shares, given = weights(m.base, site), m.adapter.rounded(x)
        for expert in range(shares.value.shape[-1]):
            a, b = (site.tensors[f"{factor}.{expert}"].map(torch.t) for factor in "AB")
            own = m.adapter.mul(given, shares.map(lambda t, at=expert: t[..., at : at + 1]))
            made = m.adapter.matmul(m.adapter.matmul(own, a), b)
            made = m.adapter.scale(made, site.adapter.alpha / site.adapter.rank)
            y = m.base.add(y, m.adapter.scale(made, site.adapter.option("weight")))
    return y


FORMULAS = {
    "xlora": Formula(
        Family.OPAQUE,
        unmerged,
        _forward,
        "Buehler and Buehler, X-LoRA, 2024, eq. 3 and 4: W x + sum_e lambda_e s B_e A_e x, "
        "lambda from a pass of the model without adapters",
        dyadic=False,
        told=_told,
        hears={HIDDEN: "lm_head"},
    ),
}
