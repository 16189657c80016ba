"""From a sweep, a combination kind, a seed and an index to a case: adapters to combine, weights, options."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from peftcheck import generator
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep
from peftcheck.combination import REQUESTS, highest_rank
from peftcheck.implementation import Claim, Op, Variant
from peftcheck.oracle.combination import KINDS, Kind

_NAMES = (
    ("default", "other", "third", "fourth", "fifth"),
    ("a", "ab", "abc", "b", "ba"),
    ("combined_1", "combined_10", "combine", "combined_", "c"),
    ("lora_", "lora", "adapter", "lora_A", "part_"),
    ("x-1", "x-10", "x", "y", "x-2"),
)
_WEIGHTS = (1.0, 1.0, -1.0, 0.5, -0.5, 2.0, 0.0, 0.3, -1.7, 1e-4, 1e3)
_EXTREMES = (1e-12, -1e-12, 1e6, -1e6)
_DYADIC = (1.0, 1.0, -1.0, 2.0, -2.0, 0.5, 0.0, 3.0)
_NAMED = ((-1.0,), (1.0, -1.0), (2.0, -1.0, 0.5))  # a single one negated, a difference, an analogy
_PLAIN = ((1.0, 1.0), (1.0, -1.0), (0.7, 0.3), (2.0, -1.0, 0.5), (-1.0, 0.5, 1.0))
_PLAIN_DYADIC = ((1.0, 1.0), (1.0, -1.0), (2.0, -0.5), (2.0, -1.0, 0.5))
_PROFILES = (
    "normal",
    "normal",
    "normal",
    "probe",
    "probe",
    "parallel",
    "duplicated",
    "onehot",
    "large",
    "small",
    "zero",
)


def combination_case(variant: Variant, sweep: Sweep, kind: str, seed: int, index: int, exact: bool = False) -> Case:
    """Return case `index` of a combination kind on a sweep, in the exact (dyadic) regime if asked for.

    One to five adapters, unlike in rank, alpha, options and targets where the kind allows that; the same adapter
    may be a member twice; weights negative, zero, tiny and huge; at times another adapter is merged meanwhile. Every
    fourth case of either regime is plain (`_plain`): every law says something of it, so that chance leaves no cell vacuous.
    """
    case = generator.draw(variant, sweep, seed, index, exact)
    exact = case.profile == "dyadic"
    rng = random.Random(f"{sweep}|{kind}|{seed}|{index}|{exact}")
    way = KINDS[kind]
    if index % 8 in (2, 3):
        case = _plain(rng, variant, case, way, exact)
        adapters, settings = case.adapters, dict(case.extra)
        members = settings["members"]
    else:
        adapters = _adapters(rng, variant, case.layers, way, exact)
        members = list(range(len(adapters)))
        if rng.random() < 0.15:
            members.append(rng.choice(members))
        settings = {
            "weights": _weights(rng, len(members), exact),
            **_options(rng, variant, way, case.layers, adapters, members),
        }
        merged = rng.randrange(len(adapters))
        if rng.random() < 0.15 and _merges(variant, case.layers, adapters[merged]):
            settings["merged"] = merged
    request = rng.choice(_requests(variant, way, adapters, len(members)))
    extra = {**settings, "kind": kind, "members": tuple(members), "seed": rng.randrange(2**31), "request": request}
    avoided = variant.avoids
    profile = "dyadic" if exact else rng.choice([name for name in _PROFILES if name not in avoided])
    if not exact and index % 4 == 3 and "probe" not in avoided:
        profile = "probe"  # one law sees nothing else, and not in every probe
    return replace(case, adapters=adapters, profile=profile, extra=tuple(sorted(extra.items())))


def _plain(rng: random.Random, variant: Variant, case: Case, way: Kind, exact: bool) -> Case:
    """Return a case that every law of combinations can judge, with its members, weights and options.

    Two or three adapters of one rank lie on one layer, which has even sides of 4 or more and no groups; weights are
    moderate; the rank of the result cuts nothing off, and is full where a random drop may fill it; what prunes does.
    """
    spec = case.layers[0]
    spec = replace(spec, n_in=max(4, spec.n_in + spec.n_in % 2), n_out=max(4, spec.n_out + spec.n_out % 2), groups=1)
    rank = rng.choice([1, 4] if exact else [1, 2, 3, 4])
    layers = (spec, *(other for other in case.layers[1:] if other.tied is None))
    named = _PLAIN_DYADIC if exact else _PLAIN
    weights = rng.choice([w for w in named if len(w) <= variant.most_adapters] or [(1.0,)])
    adapters = []
    for name in rng.choice(_NAMES)[: len(weights)]:
        options = tuple((key, rng.choice(choices)) for key, choices in sorted(variant.options.items()))
        alpha = float(rank) if exact else rng.choice([1.0, 3.0, float(rank), 2.0 * rank])
        adapters.append(variant.fit(AdapterSpec(name, (0,), rank, alpha, options), layers, exact))
    if not _merges(variant, layers, adapters[0]):  # a bias of the adapter's own needs one to be merged into
        layers = (replace(spec, bias=True), *layers[1:])
    settings: dict = {"members": tuple(range(len(weights))), "weights": weights}
    if way.rank == "chosen":
        sides = min(spec.n_out, spec.n_in * _area(spec))
        settings["svd_rank"] = sides if way.prunes else min(sides, sum(highest_rank(adapter) for adapter in adapters))
        settings["svd_full_matrices"] = rng.random() < 0.5
    if way.prunes:
        settings["density"] = rng.choice([0.5, 0.75, 0.9])
    return replace(case, layers=layers, adapters=tuple(adapters), extra=tuple(sorted(settings.items())))


def _requests(variant: Variant, way: Kind, adapters: Sequence[AdapterSpec], members: int) -> list[str]:
    """Return the requests that mean nothing of these adapters, as `combine.refuses` puts them."""
    several = members > 1
    possible = {
        "unknown kind": variant.combinations.keys() != {"linear"},  # of one way nothing is to be named
        "unknown adapter": True,
        "no adapter": True,
        "fewer weights": several,
        "unequal ranks": way.rank == "common" and len({highest_rank(adapter) for adapter in adapters}) > 1,
        "driver": way.rank == "chosen" and several,
        "taken name": len(adapters) > 1,
        "no density": way.prunes is not None and several,
    }
    return [request for request in REQUESTS if possible[request]]


def _merges(variant: Variant, layers: Sequence[LayerSpec], adapter: AdapterSpec) -> bool:
    claims = {variant.claim(op, layers[target], adapter) for target in adapter.targets for op in (Op.MERGE, Op.UNMERGE)}
    return claims == {Claim.YES}


def _adapters(
    rng: random.Random, variant: Variant, layers: Sequence[LayerSpec], way: Kind, exact: bool
) -> tuple[AdapterSpec, ...]:
    count = rng.choice([1, 2, 2, 2, 3, 3, 4, 5]) if variant.most_adapters > 1 else 1
    names = rng.choice(_NAMES)
    own = [index for index, spec in enumerate(layers) if spec.tied is None]
    targets = tuple(sorted(rng.sample(own, rng.randint(1, len(own)))))
    # kinds that add factors need one rank; unequal ones are drawn at times, to be refused
    common = (
        rng.choice([1, 4, 16] if exact else [1, 2, 3, 4, 8]) if way.rank == "common" and rng.random() < 0.95 else None
    )
    options = {key: rng.choice(choices) for key, choices in sorted(variant.options.items())}
    made = []
    for name in names[:count]:
        mine = targets if not made or rng.random() < 0.6 else tuple(sorted(rng.sample(own, rng.randint(1, len(own)))))
        if made and rng.random() < 0.2:
            options = {key: rng.choice(choices) for key, choices in sorted(variant.options.items())}
        rank = common or rng.choice([1, 4, 16] if exact else [1, 2, 3, 4, 4, 8])
        alpha = (
            rank * rng.choice([1.0, 2.0, 0.5]) if exact else rng.choice([1.0, 0.5, 8.0, 3.0, float(rank), 2.0 * rank])
        )
        made.append(AdapterSpec(name, mine, rank, alpha, tuple(sorted(options.items()))))
    union = tuple(sorted({target for adapter in made for target in adapter.targets}))
    # what is combined lies on every layer of any: its rank, made of theirs, must suit all of them
    fitted = [variant.fit(replace(adapter, targets=union), tuple(layers), exact) for adapter in made]
    return tuple(replace(adapter, targets=own.targets) for adapter, own in zip(fitted, made, strict=True))


def _weights(rng: random.Random, count: int, exact: bool) -> tuple[float, ...]:
    if exact:
        return tuple(rng.choice(_DYADIC) for _ in range(count))
    known = [weights for weights in _NAMED if len(weights) == count]
    if known and rng.random() < 0.3:
        return known[0]
    if rng.random() < 0.2:  # a mean
        return (1.0 / count,) * count
    pool = _WEIGHTS + (_EXTREMES if rng.random() < 0.15 else ())
    return tuple(rng.choice(pool) for _ in range(count))


def _options(rng: random.Random, variant: Variant, way: Kind, layers, adapters, members) -> dict:
    options: dict = {}
    if way.rank == "chosen":
        targets = {target for adapter in adapters for target in adapter.targets}
        least = min(min(layers[t].n_out, layers[t].n_in * _area(layers[t])) for t in targets)
        whole = sum(adapters[m].rank for m in members)
        wide = rng.random()
        if wide < 0.9:  # above the smaller side of a layer there is no such rank: drawn at times
            options["svd_rank"] = max(
                1, min(least, rng.choice([whole, whole, least, 1, 2, 3, max(a.rank for a in adapters)]))
            )
        elif wide < 0.95:
            options["svd_rank"] = whole
        if "svd_rank" in options:
            probe = AdapterSpec("combined", tuple(sorted(targets)), options["svd_rank"], options=adapters[0].options)
            options["svd_rank"] = variant.fit(probe, tuple(layers), False).rank
        options["svd_full_matrices"] = rng.random() < 0.5
    if way.prunes:
        options["density"] = rng.choice([1.0, 0.5, 0.5, 0.2, 0.75, 0.9])
    if way.elects and rng.random() < 0.5:
        options["majority_sign_method"] = rng.choice(["total", "frequency"])
    return options


def _area(spec: LayerSpec) -> int:
    area = 1
    for extent in spec.kernel:
        area *= extent
    return area
