"""Hypothesis strategies: the cases of a library, and programs for them. For tests of peftcheck and of libraries."""

from __future__ import annotations

from hypothesis import strategies as st

from peftcheck import generator
from peftcheck.case import MODELS, Case, Sweep
from peftcheck.errors import UsageError
from peftcheck.implementation import Implementation
from peftcheck.programs import FACTORS, KINDS, Step


def sweeps(
    implementation: Implementation, variant: str | None = None, layer: str | None = None, dtype: str | None = None
):
    """Return a strategy for the unquantized sweeps of a library; each argument that is given is kept fixed.

    Whole models are drawn only where `layer` names one.

    Raises UsageError where no sweep is left.
    """
    found = [
        Sweep(implementation.name, name, kind, number)
        for name, one in implementation.variants().items()
        for kind in sorted(one.layers)
        for number in sorted(one.dtypes)
        if variant in (None, name)
        and (layer == kind or (layer is None and kind not in MODELS))
        and dtype in (None, number)
    ]
    if not found:
        raise UsageError(
            f"{implementation.name} has no {variant or 'variant'} on {layer or 'any layer'} in {dtype or 'any dtype'}"
        )
    return st.sampled_from(found)


@st.composite
def cases(
    draw, implementation: Implementation, variant: str | None = None, layer: str | None = None, dtype: str | None = None
) -> Case:
    """Draw a case of a library, in the exact regime or not: what the generator makes of a seed and an index."""
    sweep = draw(sweeps(implementation, variant, layer, dtype))
    seed, index, exact = draw(st.integers(0, 2**16)), draw(st.integers(0, 200)), draw(st.booleans())
    return generator.draw(implementation.variants()[sweep.variant], sweep, seed, index, exact)


def steps(kind: str, adapters: int) -> st.SearchStrategy[Step]:
    """Return a strategy for a step of a kind on a model with as many adapters."""
    one, switch = st.integers(0, adapters - 1), st.booleans()
    some = st.lists(one, min_size=1, max_size=adapters, unique=True).map(tuple)
    if kind == "activate":
        return some.map(lambda names: (kind, names))
    if kind == "merge":
        return st.tuples(st.just(kind), some | st.just(()), switch)
    if kind == "forward":
        return switch.map(lambda training: (kind, True) if training else (kind,))
    if kind == "rescale":
        return st.tuples(st.just(kind), one, st.sampled_from(FACTORS))
    if kind == "export":
        return switch.map(lambda safe: (kind, safe))
    if kind in ("delete", "add", "save", "load"):
        return one.map(lambda name: (kind, name))
    return st.just((kind,))


def programs(adapters: int, longest: int = 12) -> st.SearchStrategy[tuple[Step, ...]]:
    """Return a strategy for programs: up to `longest` steps of any kind."""
    anything = st.sampled_from(KINDS).flatmap(lambda kind: steps(kind, adapters))
    return st.lists(anything, min_size=1, max_size=longest).map(tuple)
