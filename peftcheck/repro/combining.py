"""What scripts do for the laws of weighted combinations: combine, and compare with the weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from peftcheck import combination as combining
from peftcheck.combination import INTO, Combination
from peftcheck.laws import combine as sums
from peftcheck.laws import combine_relations
from peftcheck.laws import combine_truncation as truncated
from peftcheck.repro import combined as said
from peftcheck.repro import combined_state
from peftcheck.repro.model import literal
from peftcheck.repro.scene import Body, Scene, compared
from peftcheck.spelling import text

_DEFINED = "# expected: the definition on the full deltas, computed in fp64 outside the library"


def _against_sum(
    scene: Scene, asked: Combination, act: list[str] | None = None, part: Combination | None = None
) -> list[str] | None:
    stage, layer, changed = scene.stage, scene.site, scene.tensor
    expected = f"expected = {said.weighted(scene, asked, layer)}"
    act = said.request(scene, asked) if act is None else act
    if said.normwise(scene, asked):
        return said.judged(scene, act, [expected], said.by_norm(sums.room_of(stage, asked, layer, changed, part)))
    allowed = combining.exact_bound(stage, asked, layer, 1 if part is None else 2).get(changed)
    return said.judged(scene, act, [expected], compared(None, allowed))


def linear(scene: Scene) -> list[str] | None:
    """Combine, and compare with the weighted sum."""
    return _against_sum(scene, said.asked_of(scene))


def single(scene: Scene) -> list[str] | None:
    """Combine one adapter alone."""
    return _against_sum(scene, sums.alone(said.asked_of(scene)))


def cancel(scene: Scene) -> list[str] | None:
    """Combine an adapter with itself, with opposite weights."""
    return _against_sum(scene, sums.cancelling(said.asked_of(scene)))


def additive(scene: Scene) -> list[str] | None:
    """Combine in two steps."""
    asked = said.asked_of(scene).having(svd_clamp=None)
    return _against_sum(scene, asked, _steps(scene, asked), sums.in_two_steps(asked)[0])


def _steps(scene: Scene, asked: Combination) -> list[str]:
    part, rest = sums.in_two_steps(asked)
    last = scene.stage.names[asked.members[-1]]
    return [*said.request(scene, part, "part"), *said.request(scene, rest, INTO, ("part", last))]


def cross_term_free(scene: Scene) -> list[str] | None:
    """Combine, and look where no true term can be."""
    stage, asked, layer = scene.stage, said.asked_of(scene), scene.site
    where, target = sums.crossings(stage, asked)[layer]
    found = f"found = delta({text(INTO)}) * torch.tensor({where.int().tolist()})  # where rows of one meet columns of another"
    expected = ["expected = torch.zeros_like(found)"]
    if asked.kind.rank == "chosen":
        return said.judged(
            scene,
            said.request(scene, asked),
            expected,
            said.by_norm(combining.truncated_bound(stage, asked, target)),
            found,
        )
    allowed = combining.exact_bound(stage, asked, layer)["weight"] * where
    return said.judged(scene, said.request(scene, asked), expected, compared(None, allowed), found)


def best_rank(scene: Scene) -> list[str] | None:
    """Combine, and compare the error with the least of any matrix of that rank."""
    stage, asked, layer, changed = scene.stage, said.asked_of(scene), scene.site, scene.tensor
    target = combining.total(stage, asked, layer)[changed]
    expected = f"expected = {said.weighted(scene, asked, layer)}  # the best of the rank asked for lies within the norm allowed"
    return said.judged(
        scene, said.request(scene, asked), [expected], said.by_norm(combining.truncated_bound(stage, asked, target))
    )


def defined(scene: Scene) -> list[str] | None:
    """Combine, and compare with the definition on full deltas."""
    stage, asked, layer = scene.stage, said.asked_of(scene), scene.site
    act = said.request(scene, asked)
    if asked.kind.prunes == "random" and asked.density < 1:
        values, bounds = zip(*truncated.outcomes(stage, asked, layer), strict=True)
        return said.judged(scene, act, [f"expected = {literal(torch.stack(values))}  # all that dropping can leave, in fp64"], [
            f"allowed = {literal(torch.stack(bounds))}",
            'print("found:", found.tolist(), "expected, in each place one of:", expected.tolist())',
            "raise SystemExit(int(not ((found - expected).abs() <= allowed).any(0).all()))",
        ])  # fmt: skip
    target = combining.ideal(stage, asked, layer)["weight"]
    expected = [_DEFINED, f"expected = {literal(target.value)}"]
    if asked.kind.rank == "chosen":
        return said.judged(scene, act, expected, said.by_norm(combining.truncated_bound(stage, asked, target)))
    allowed = target.bound + combining.exact_bound(stage, asked, layer)["weight"]
    return said.judged(scene, act, expected, compared(None, allowed))


def _pair(
    scene: Scene, asked: Combination, other: Combination, factor: float = 1.0, rule: Combination | None = None
) -> list[str] | None:
    """Combine twice, and compare the second with a multiple of the first."""
    act = [*said.request(scene, asked), *said.request(scene, other, "other")]
    found, expected = 'found = delta("other")', f"expected = {factor!r} * delta({text(INTO)})"
    allowed = combine_relations.allowance(scene.stage, rule or asked, scene.site, factor)
    if isinstance(allowed, dict):
        return said.judged(scene, act, [expected], compared(None, allowed.get(scene.tensor)), found)
    bound, whole = allowed
    spectra = (
        "found, expected = (torch.linalg.svdvals(t.flatten(1)) for t in (found, expected))  # the same but for ties"
    )
    return said.judged(scene, act, [expected, *(() if whole else (spectra,))], said.by_norm(bound), found)


def homogeneous(scene: Scene) -> list[str] | None:
    """Combine with the weights, and with all of them larger or smaller by a factor."""
    asked, other, factor = sums.grown(scene.stage, said.asked_of(scene))
    return _pair(scene, asked, other, factor)


def permutation(scene: Scene) -> list[str] | None:
    """Combine in order and in reverse."""
    return _pair(scene, *sums.reversed_order(said.asked_of(scene)))


def density_one(scene: Scene) -> list[str] | None:
    """Combine at density 1, and without pruning."""
    asked, other = truncated.with_dense(said.asked_of(scene))
    return _pair(scene, asked, other, rule=other)


def clamp(scene: Scene) -> list[str] | None:
    """Combine with a threshold at the largest value, and without one."""
    asked, other = truncated.clamped(said.asked_of(scene))
    return _pair(scene, asked, other, rule=other)


def crash(scene: Scene, law: str) -> list[str] | None:
    """Return the calls that the law makes, where one of them ends in an error."""
    asked, say = said.asked_of(scene), scene.say
    if law == "combine.activated":
        lines = combined_state.activated(
            replace(scene, measured=replace(scene.measured, role=f"{combining.layers(scene.stage, asked)[0]}:weight"))
        )
        return None if lines is None else lines[:-6]
    after: dict[str, Callable[[], list[str]]] = {
        "combine.merge": lambda: [say.activate((INTO,)), say.merge((INTO,), scene.stage.case.safe)],
    }
    pairs: dict[str, Callable[[], tuple[Combination, ...]]] = {
        "combine.single": lambda: (sums.alone(asked),),
        "combine.cancel": lambda: (sums.cancelling(asked),),
        "combine.homogeneous": lambda: sums.grown(scene.stage, asked)[:2],
        "combine.permutation": lambda: sums.reversed_order(asked),
        "combine.density_one": lambda: truncated.with_dense(asked),
        "combine.clamp": lambda: truncated.clamped(asked),
    }
    if law == "combine.reload":
        return None if say.save is None or say.load is None else combined_state.reloaded(scene)
    if law == "combine.additive":
        own = _steps(scene, asked.having(svd_clamp=None))
    else:
        made = pairs.get(law, lambda: (asked,))()
        own = [
            line for one, into in zip(made, (INTO, "other"), strict=False) for line in said.request(scene, one, into)
        ]
    return [*said.first_merged(scene), *own, *after.get(law, list)()]


def _where_combined(body: Body) -> Body:
    """Return the body, for libraries whose spelling says how they combine."""

    def spoken(scene: Scene) -> list[str] | None:
        return None if scene.say.combine is None or scene.say.gain is None or scene.say.rank is None else body(scene)

    return spoken


BODIES: dict[str, Body] = {
    f"combine.{name}": _where_combined(body)
    for name, body in {
        "linear": linear,
        "cross_term_free": cross_term_free,
        "single": single,
        "cancel": cancel,
        "homogeneous": homogeneous,
        "permutation": permutation,
        "additive": additive,
        "best_rank": best_rank,
        "definition": defined,
        "density_one": density_one,
        "clamp": clamp,
        "merge": combined_state.merge,
        "activated": combined_state.activated,
        "sources_untouched": combined_state.sources_untouched,
        "base_untouched": combined_state.base_untouched,
        "rank": combined_state.rank,
        "reload": combined_state.reload,
        "refuses": combined_state.refuses,
    }.items()
}
UNSPOKEN = {
    "combine.expectation": "the verdict is on the mean of eight random draws over every layer: no single figure shows it",
}
"""Laws of combinations without a standalone form, and why."""
