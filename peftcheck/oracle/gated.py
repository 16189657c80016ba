"""GLoRA and HiRA: the weight is multiplied elementwise by one plus a learned matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftcheck.case import CONVOLUTIONS, EMBEDDINGS
from peftcheck.oracle.form import Base, Family, Formula, Machine, Site
from peftcheck.oracle.layers import layer_output, linear_map, oriented
from peftcheck.rounding import Bounded

# GLoRA


def glora_part(m: Machine, site: Site, part: str) -> Bounded:
    """Return A or B (out, in), C (in, 1), D or E (out), or what broadcasts to it, as the base's dtype holds it.

    A part is a product of two factors, a vector, a single number, or zeros.
    """
    tensors = site.tensors
    if f"{part}.down" in tensors:
        made = m.adapter.matmul(tensors[f"{part}.down"], tensors[f"{part}.up"])
    else:
        made = tensors[f"{part}.vector"] if f"{part}.vector" in tensors else tensors[f"{part}.zeros"]
    return m.base.rounded(made) if m.mixed else made


def glora_merge_many(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    """Return W + sum(W * A + B), b + sum(b * D + E + W C), the sums over the adapters and all of the pristine W, b.

    To merge one more adapter a library may unmerge those before and start over from what it recovers, so that the
    round trip of those before joins the error of W and b.
    """
    merged = _glora_sum(m, sites[:1], base)
    for count in range(2, len(sites) + 1):
        lost = glora_back(m, sites[: count - 1], base)
        recovered = {name: value.widened(lost[name]) if name in lost else value for name, value in base.items()}
        merged = _glora_sum(m, sites[:count], recovered)
    return merged


def _glora_sum(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    ar, merged = m.base, dict(base)
    for site in sites:
        a, b = glora_part(m, site, "A"), glora_part(m, site, "B")
        merged["weight"] = ar.add(merged["weight"], ar.add(ar.mul(base["weight"], a), b))
        if "bias" in base:
            merged["bias"] = ar.add(merged["bias"], _glora_bias(m, site, base))
    return merged


def _glora_bias(m: Machine, site: Site, base: Base) -> Bounded:
    ar = m.base
    c, d, e = (glora_part(m, site, part) for part in "CDE")
    through = ar.matmul(base["weight"], c).map(lambda t: t.squeeze(-1))
    return ar.add(ar.add(ar.mul(base["bias"], d), e), through)


def _size(x: Bounded) -> Bounded:
    return Bounded(x.ceiling())


def glora_back(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, torch.Tensor]:
    """Bound the round trip W' = (M - sum B) / (1 + sum A), b' = (N - sum E - sum W' C) / (1 + sum D).

    The machine's A', B', ... are the same tensors at merge and at unmerge. With e_M what the merge adds by rounding,
    g what the sum of B and the subtraction add, and d the rounding of the divisor,

        W' - W = (W (1 + sum A') + e_M + g) / (1 + sum A' + d) - W = (e_M + g - W d) / (1 + sum A' + d),

    and one rounding more: it grows with 1 / min abs(1 + sum A). All roundings are taken of nonnegative numbers that
    are at least as large as the machine's, the divisor of one that is no larger. The bias goes the same way, with
    the difference of W' to W entering through C.
    """
    ar = m.base
    sizes = {name: _size(value) for name, value in base.items()}
    fresh = dict(sizes)
    sums = {part: None for part in "ABCDE"}
    through = None
    for site in sites:
        parts = {part: _size(glora_part(m, site, part)) for part in "ABCDE"}
        fresh["weight"] = ar.add(fresh["weight"], ar.add(ar.mul(sizes["weight"], parts["A"]), parts["B"]))
        if "bias" in base:
            product = ar.matmul(sizes["weight"], parts["C"]).map(lambda t: t.squeeze(-1))
            inner = ar.add(ar.add(ar.mul(sizes["bias"], parts["D"]), parts["E"]), product)
            fresh["bias"] = ar.add(fresh["bias"], inner)
        for part, made in parts.items():
            sums[part] = made if sums[part] is None else ar.add(sums[part], made)
    lost = {"weight": _divided(m, sites, "A", base["weight"], ar.add(fresh["weight"], sums["B"]), sums["A"])}
    if "bias" in base:
        returned = sizes["weight"].widened(lost["weight"])
        for site in sites:
            c = _size(glora_part(m, site, "C"))
            product = ar.matmul(returned, c).map(lambda t: t.squeeze(-1))
            through = product if through is None else ar.add(through, product)
        numerator = ar.add(ar.add(fresh["bias"], sums["E"]), through)
        lost["bias"] = _divided(m, sites, "D", base["bias"], numerator, sums["D"])
    return lost


def _divided(m: Machine, sites: Sequence[Site], part: str, start: Bounded, numerator: Bounded, total: Bounded):
    """Return the bound for (numerator) / (1 + the sum of a part), from the roundings of both."""
    parts = [glora_part(m, site, part) for site in sites]
    exact = 1 + sum(p.value for p in parts)
    divisor = m.base.add(Bounded(torch.ones_like(total.value)), total)
    floor = exact.abs() - sum(p.bound for p in parts) - divisor.bound
    error = (numerator.bound + start.ceiling() * divisor.bound) / floor
    error = torch.where(floor > 0, error, torch.full_like(error, m.base.store.largest))
    return m.base.rounded(Bounded(start.value, error.broadcast_to(start.value.shape))).bound


def glora_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return y0 + sum(y_k - y0), y0 the plain output and y_k that of adapter k's own weight and bias.

    All y are summed before k y0 is taken off. The machine's y0 is one tensor: its own error remains k - 1 times.
    """
    ar, spec = m.base, sites[0].spec
    plain = layer_output(ar, spec, base, x)
    start = Bounded(plain.value)
    total = start
    for site in sites:
        a, b = glora_part(m, site, "A"), glora_part(m, site, "B")
        weight = ar.add(ar.add(base["weight"], ar.mul(base["weight"], a)), b)
        effective = {"weight": weight}
        if "bias" in base:
            c, d, e = (glora_part(m, site, part) for part in "CDE")
            through = ar.matmul(base["weight"], c).map(lambda t: t.squeeze(-1))
            inner = ar.add(ar.add(base["bias"], ar.mul(base["bias"], d)), e)
            effective["bias"] = ar.add(inner, through)
        total = ar.add(total, layer_output(ar, spec, effective, x))
    count = len(sites)
    result = ar.sub(total, ar.scale(start, float(count)))
    # the roundings above were taken of y0 as it should be, not as it is: up to count + 2 of them
    return result.widened((count - 1 + (count + 2) * 2 * ar.store.roundoff) * plain.bound)


def _glora_roundtrip(m: Machine, formula: Formula, sites: Sequence[Site], base: Base):
    lost = glora_back(m, sites, base)
    if len(sites) == 1:
        return lost
    # merged one by one, each merge starts from what an unmerge recovers
    total = lost
    for count in range(1, len(sites)):
        before = glora_back(m, sites[:count], base)
        total = {name: bound + before[name] for name, bound in total.items()}
    return total


GLORA = Formula(
    Family.SCALING,
    lambda m, site, base: glora_merge_many(m, (site,), base),
    glora_forward,
    "Chavan et al., One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, 2023, eq. 10, with the products "
    "by A and D taken elementwise, as documented",
    # a divisor 1 + A of zero, frequent among small integers, loses the weight
    dyadic=False,
    hints={f"{part}.zeros": "keep" for part in "ABCDE"},
    merge_many=glora_merge_many,
    roundtrip=_glora_roundtrip,
)

# HiRA


def hira_factor(m: Machine, site: Site) -> Bounded:
    """Return B A in the layer's orientation, as the base's dtype holds it."""
    a, b = site.tensors["A"], site.tensors["B"]
    matrix = m.adapter.matmul(b.map(lambda t: t.flatten(1)), a.map(lambda t: t.flatten(1)))
    if site.spec.kind in CONVOLUTIONS:
        return matrix.map(lambda t: t.reshape(site.spec.weight_shape))
    return oriented(site.spec, matrix)


def hira_merge_many(m: Machine, sites: Sequence[Site], base: Base) -> dict[str, Bounded]:
    """Return W + W * sum(B A), every product with the pristine W.

    Merged in one call the factors are summed first, one by one each is multiplied and added: the larger bound counts.
    """
    ar, weight = m.base, base["weight"]
    factors = [ar.rounded(hira_factor(m, site)) if m.mixed else hira_factor(m, site) for site in sites]
    total, apart = factors[0], ar.add(weight, ar.mul(weight, factors[0]))
    for factor in factors[1:]:
        total = ar.add(total, factor)
        apart = ar.add(apart, ar.mul(weight, factor))
    joint = ar.add(weight, ar.mul(weight, total))
    if joint.error is None and apart.error is None:
        return {"weight": joint}
    return {"weight": Bounded(joint.value, torch.maximum(joint.bound, apart.bound))}


def hira_forward(m: Machine, sites: Sequence[Site], base: Base, x: Bounded) -> Bounded:
    """Return W x + b + sum((W * B A) x), each term from its own kernel in the adapter's dtype."""
    spec = sites[0].spec
    y = layer_output(m.base, spec, base, x)
    for site in sites:
        kernel = m.adapter.mul(base["weight"], hira_factor(m, site))
        seen = x if spec.kind in EMBEDDINGS else m.adapter.rounded(x)
        y = m.base.add(y, linear_map(m.adapter, spec, kernel, seen))
    return y


HIRA = Formula(
    Family.SNAPSHOT,
    lambda m, site, base: hira_merge_many(m, (site,), base),
    hira_forward,
    "Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, 2025, eq. 4",
    merge_many=hira_merge_many,
)

FORMULAS = {"glora": GLORA, "hira": HIRA}
