"""The closed form of Activated LoRA against the same formula written token by token."""

from __future__ import annotations

import pytest
import torch

from peftcheck import generator, transformer_models
from peftcheck.case import AdapterSpec, LayerSpec, Sweep
from peftcheck.implementations.reference import Reference
from peftcheck.oracle import FORMULAS, Site, machine
from peftcheck.oracle.activated import invocation, lasts, told
from peftcheck.rounding import leaf
from peftcheck.values import normal

FORM = FORMULAS["lora.alora"]
DOUBLE = machine(torch.float64, torch.float64, False)
SINGLE = machine(torch.float32, torch.float32, False)
SPEC = LayerSpec("l", "linear", 3, 4)
BASE = {"weight": normal("w", (4, 3))}
A, B = normal("a", (2, 3)), normal("b", (4, 2))


def site(**options) -> Site:
    return Site(SPEC, AdapterSpec("a", (0,), 2, 3.0, tuple(options.items())), {"A": leaf(A), "B": leaf(B)})


def output(x, one: Site, on=DOUBLE):
    return FORM.forward(on, [one], {name: leaf(tensor) for name, tensor in BASE.items()}, leaf(x))


@pytest.mark.parametrize("counts", [(None, 1, 5), (5, None, None), (2, 3, 4)])
def test_the_tokens_from_the_invocation_on_are_changed_and_no_other(counts):
    x = normal("x", (3, 5, 3))
    expected = x @ BASE["weight"].T
    for row, count in enumerate(counts):
        for token in range(5 - (count or 0), 5):
            expected[row, token] += 1.5 * B @ (A @ x[row, token])
    assert torch.allclose(output(x, site(lasts=counts)).value, expected)


def test_a_token_before_the_invocation_keeps_the_bound_of_the_plain_layer():
    x = normal("x", (2, 4, 3))
    none, all_ = (output(x, site(lasts=counts), SINGLE) for counts in ((None, None), (4, 4)))
    some = output(x, site(lasts=(1, 3)), SINGLE)
    on = torch.tensor([[False, False, False, True], [False, True, True, True]])
    assert torch.equal(some.bound[~on], none.bound[~on]) and torch.equal(some.bound[on], all_.bound[on])
    assert bool((all_.bound > none.bound).all())


def test_a_row_alone_is_invoked_by_its_first_token_with_a_positive_feature():
    x = torch.tensor([[[-1.0], [2.0], [-1.0]], [[-1.0], [-1.0], [-1.0]], [[1.0], [1.0], [-1.0]]])
    assert lasts(x) == [2, None, 3]
    assert lasts(x[:, 0]) == [None, None, 1]
    assert lasts(x[1:2]) == [None], "what a row is depends on no other row"


def _whole(index: int):
    return generator.draw(
        Reference().variants()["lora"], Sweep("reference", "lora", "model.llama", "float32"), 3, index
    )


def test_the_last_occurrence_in_the_ids_counts():
    seen = set()
    for case in map(_whole, range(12)):
        ids = transformer_models.arguments(case)[0].tolist()
        for adapter in case.adapters:
            wanted = list(invocation(case, adapter.name))
            due = []
            for row in ids:
                found = [len(row) - s for s in range(len(row)) if row[s : s + len(wanted)] == wanted]
                due.append(min(found) if found else None)
            assert told(case, adapter).option("lasts") == tuple(due)
            seen |= {count is None for count in due}
            assert any(due), "an adapter that no row invokes tests nothing"
    assert seen == {True, False}
