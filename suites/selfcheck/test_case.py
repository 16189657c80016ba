"""Tokens: what is encoded comes back, and what is broken is refused in one line."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcheck.case import LAYERS, AdapterSpec, Case, LayerSpec, Poison, Sweep, decode, encode, to_plain
from peftcheck.errors import UsageError
from peftcheck.rounding import DTYPES
from peftcheck.tokens import TOKEN_PREFIX

names = st.text(min_size=1, max_size=8)
small = st.integers(1, 600)
numbers = st.floats(allow_nan=False, allow_infinity=False)
dtypes = st.sampled_from(sorted(DTYPES))
dims = st.lists(st.integers(0, 9), max_size=3).map(tuple)
scalars = st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=5)
items = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
pairs = st.lists(st.tuples(names, items), max_size=3).map(tuple)
layers = st.builds(
    LayerSpec,
    name=names,
    kind=st.sampled_from(LAYERS),
    n_in=small,
    n_out=small,
    bias=st.booleans(),
    kernel=dims,
    stride=dims,
    padding=dims | st.sampled_from(["same", "valid"]),
    dilation=dims,
    groups=small,
    padding_mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    size=dims,
    padding_idx=st.none() | small,
    scale=numbers,
    tied=st.none() | names,
    depth=st.integers(0, 3),
)
adapters = st.builds(AdapterSpec, name=names, targets=dims, rank=small, alpha=numbers, options=pairs)
all_cases = st.builds(
    Case,
    sweep=st.builds(Sweep, names, names, st.sampled_from(LAYERS), dtypes, st.none() | names),
    seed=st.integers(0, 2**63),
    index=st.integers(0, 2**31),
    layers=st.lists(layers, max_size=3).map(tuple),
    adapters=st.lists(adapters, max_size=3).map(tuple),
    adapter_dtype=dtypes,
    profile=names,
    values=st.integers(0, 2**32),
    batch=dims,
    safe=st.booleans(),
    joint=st.booleans(),
    cycles=small,
    train=st.booleans(),
    poison=st.builds(Poison, names, small, small, small, small),
    extra=pairs,
)

CASE = Case(
    Sweep("peft", "lora", "linear", "float32"),
    0,
    7,
    (LayerSpec("a.b", "conv2d", 2, 3, True, (1, 2), (1, 1), "same", (1, 1), size=(4, 4)),),
    (AdapterSpec("x", (0,), 4, 8.0, (("rslora", True), ("ranks", (1, 2)))),),
    "float32",
    "normal",
)


def packed(content: Any) -> str:
    """Return a token that holds any JSON data."""
    text = content if isinstance(content, str) else json.dumps(content)
    return TOKEN_PREFIX + base64.urlsafe_b64encode(zlib.compress(text.encode())).decode().rstrip("=")


@settings(deadline=None, max_examples=200)
@given(case=all_cases, law=names)
def test_a_token_gives_back_the_case_and_the_law(case, law):
    token = encode(case, law)
    assert decode(token) == (case, law)
    assert decode(f"  {token}\n") == (case, law)
    assert encode(*decode(token)) == token
    assert token.isascii() and not set(token) & set(" =+/\"'")  # can be pasted into a shell and a URL


def test_a_token_leaves_defaults_out_and_stays_short():
    assert to_plain(LayerSpec("a", "linear", 1, 2)) == {"name": "a", "kind": "linear", "n_in": 1, "n_out": 2}
    assert len(encode(CASE, "merge.roundtrip")) < 400


def test_tokens_keep_their_meaning_from_version_to_version():
    """A token printed by an older version has to replay: fields may be added, never renamed or given new defaults."""
    plain = [
        "merge.roundtrip",
        {
            "sweep": {"implementation": "peft", "variant": "lora", "layer": "linear", "dtype": "float32"},
            "seed": 0,
            "index": 7,
            "layers": [{"name": "a", "kind": "linear", "n_in": 1, "n_out": 2}],
            "adapters": [{"name": "x", "targets": [0]}],
            "adapter_dtype": "float32",
            "profile": "normal",
        },
    ]
    case, law = decode(packed(plain))
    assert law == "merge.roundtrip" and case.layers[0] == LayerSpec("a", "linear", 1, 2)
    assert (case.batch, case.safe, case.joint, case.cycles, case.poison) == ((2,), False, True, 3, Poison())


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda b: TOKEN_PREFIX + base64.urlsafe_b64encode(b).decode()))
def test_what_is_no_token_is_refused(text):
    with pytest.raises(UsageError, match="token"):
        decode(text)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_token_cut_or_miscopied_is_refused_or_still_the_same(data):
    token = encode(CASE, "merge.roundtrip")
    at = data.draw(st.integers(0, len(token) - 1))
    with pytest.raises(UsageError):
        decode(token[:at])
    changed = token[:at] + data.draw(st.characters()) + token[at + 1 :]
    try:
        case, _ = decode(changed)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert case == CASE  # padding bits of the last character


PLAIN = json.loads(json.dumps(["merge.roundtrip", to_plain(CASE)]))


def places(node: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    if isinstance(node, dict | list):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            found += places(item, (*path, key))
    return found


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_forged_token_is_refused_or_makes_a_case(data):
    """Any JSON in any place: no exception but UsageError ever comes out."""
    path = data.draw(st.sampled_from(places(PLAIN)))
    junk = data.draw(scalars | st.lists(scalars, max_size=2) | st.dictionaries(names, scalars, max_size=2))
    content = json.loads(json.dumps(PLAIN))
    if not path:
        content = junk
    else:
        node = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = junk
    try:
        case, law = decode(packed(content))
    except UsageError:
        return
    assert isinstance(case, Case) and isinstance(law, str)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '["law", {}]' + " " * (1 << 21),
        '["law", ' + "9" * 5000 + "]",
        "[1, NaN]",
        ["law", {**PLAIN[1], "newer": 1}],
        ["law", {**PLAIN[1], "adapter_dtype": "float8"}],
        ["law", {**PLAIN[1], "adapter_dtype": []}],
        [["law"], PLAIN[1]],
        [PLAIN[1], "law"],
        ["law"],
    ],
    ids=["deep", "deep and closed", "bomb", "long number", "nan", "newer", "dtype", "list", "law", "order", "short"],
)
def test_hostile_tokens_are_refused(content):
    with pytest.raises(UsageError, match="token"):
        decode(packed(content))


def test_words_name_what_matters():
    words = CASE.words()
    parts = "a.b: conv2d 2->3; kernel 1x2; padding same; with bias; 'x' on a.b; rank 4; rslora True; float32"
    assert all(part in words for part in parts.split("; "))
    assert "\n" not in words


@pytest.mark.parametrize(
    ("spec", "fan_in", "shape"),
    [
        (LayerSpec("l", "linear", 5, 3), 5, (3, 5)),
        (LayerSpec("l", "conv1d-transformers", 5, 3), 5, (5, 3)),
        (LayerSpec("l", "conv2d", 6, 4, kernel=(3, 2), groups=2), 18, (4, 3, 3, 2)),
        (LayerSpec("l", "embedding", 9, 4), 1, (9, 4)),
        (LayerSpec("l", "parameter", 3, 4, depth=2), 3, (2, 4, 3)),
        (LayerSpec("l", "parameter", 3, 4), 3, (4, 3)),
        (LayerSpec("l", "mha", 4, 4), 4, (12, 4)),
        (LayerSpec("l", "layernorm", 4, 4), 4, (4,)),
    ],
)
def test_shapes_follow_from_the_spec(spec, fan_in, shape):
    assert (spec.fan_in, spec.weight_shape) == (fan_in, shape)


def test_cases_that_compare_equal_and_are_written_apart_have_tokens_of_their_own() -> None:
    whole, real = (replace(CASE, extra=(("weight", number),)) for number in (1, 1.0))
    assert whole == real
    assert [type(decode(encode(case, "merge.oracle"))[0].setting("weight")) for case in (whole, real)] == [int, float]
