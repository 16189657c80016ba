"""The ledger: strict to read, and the witness decides, row by row of its truth table."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from peftcheck import engine, law, ledger, processor, quantizers
from peftcheck.case import AdapterSpec, Case, LayerSpec, Poison, Sweep, encode
from peftcheck.errors import HarnessError, UsageError
from peftcheck.implementation import Variant
from peftcheck.implementations.peft import Peft
from peftcheck.law import Law
from peftcheck.measurement import Measurement
from peftcheck.outcome import ERROR, PASS, SKIP, VIOLATION, Outcome
from peftcheck.where import UnknownField, parse

LAWS = ("merge.roundtrip", "merge.oracle", "refuse.attach")
PRINT = "merge.roundtrip|twist|weight|numeric"


def case(layer="linear", dtype="float64", variant="twist", **fields) -> Case:
    spec = LayerSpec("a", layer, 2, 3, kernel=(1, 2) if layer == "conv2d" else ())
    sweep = Sweep("fake", variant, layer, dtype)
    return replace(Case(sweep, 0, 0, (spec,), (AdapterSpec("x", (0,)),), dtype, "normal"), **fields)


def outcome(status=VIOLATION, fingerprint=PRINT, law="merge.roundtrip") -> Outcome:
    return Outcome(
        law,
        status,
        fingerprint=fingerprint if status in (VIOLATION, ERROR) else None,
        message="what was found",
    )


@dataclass
class Fake:
    """A library of one variant on two layers; `answers` says what a law finds on a dtype (default: the defect)."""

    answers: dict[str, Outcome] = field(default_factory=dict)
    version: str = "1.4"
    name: str = "fake"
    folders: tuple[Path, ...] = ()
    ledger: Path | None = None
    checked: list[Case] = field(default_factory=list)

    def variants(self):
        return {"twist": Variant("twist", "lora", frozenset({"linear", "conv2d"}))}

    def check(self, implementation, case, laws):
        self.checked.append(case)
        return [replace(self.answers.get(case.sweep.dtype, outcome()), law=one.name) for one in laws]


def entry(**changes) -> dict:
    usual = {
        "id": "twisted",
        "law": "merge.roundtrip",
        "fingerprint": PRINT,
        "where": {"variant": "twist", "layer": "linear"},
        "versions": ">=1,<2",
        "kind": "bug",
        "severity": "silent numbers",
        "reason": "unmerge turns the wrong way",
        "opened": "2025-01-31",
        "witness": encode(case(), "merge.roundtrip"),
    }
    return {key: value for key, value in {**usual, **changes}.items() if value is not None}


def toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def write(path: Path, *entries: dict) -> Path:
    path.write_text("\n".join(["[[issue]]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in e.items()) for e in entries]))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.toml"


def court(path, library, *entries) -> ledger.Court:
    laws = [Law(name, "", (), lambda stage: None, "") for name in LAWS]
    return ledger.Court(ledger.load(write(path, *(entries or (entry(),))), LAWS), library, laws, library.check)


SWEEP = case().sweep


# the truth table


def test_a_witness_that_violates_and_a_clean_search_elsewhere_is_known(path):
    one = court(path, Fake())
    assert one.verdict("twisted") == "known"
    assert one.absorbs(outcome(), case()) == "twisted"
    assert one.rule("merge.roundtrip", SWEEP, [(outcome(), case(values=7))]).status == "known"
    elsewhere = case("conv2d").sweep
    assert one.rule("merge.roundtrip", elsewhere, []) == ledger.Ruling("pass")


def test_a_known_issue_stays_known_where_the_search_misses_it(path):
    ruling = court(path, Fake()).rule("merge.roundtrip", SWEEP, [])
    assert (ruling.status, ruling.issues) == ("known", ("twisted",))


@pytest.mark.parametrize(
    ("failure", "on"),
    [
        (outcome(), case("conv2d")),
        (outcome(fingerprint="merge.roundtrip|twist|bias|numeric"), case()),
        (outcome(fingerprint="merge.roundtrip|twist|weight|non-finite"), case()),
        (outcome(ERROR, "crash|twist|KeyError in twist.py:merge"), case()),
        (outcome(fingerprint="merge.oracle|twist|weight|numeric", law="merge.oracle"), case()),
    ],
    ids=["outside where", "another tensor", "another symptom", "a crash", "another law"],
)
def test_a_second_bug_stays_visible_beside_the_known_one(path, failure, on):
    one = court(path, Fake())
    assert one.absorbs(failure, on) is None
    ruling = one.rule("merge.roundtrip", on.sweep, [(outcome(), case()), (failure, on)])
    assert ruling.status == failure.status
    assert ruling.new == ((failure, on),)
    assert ruling.issues == ("twisted",)


def test_a_witness_that_holds_is_fixed_but_listed_and_absorbs_nothing(path):
    one = court(path, Fake({"float64": outcome(PASS)}))
    assert one.verdict("twisted") == "fixed"
    assert one.fixed_in("merge.roundtrip", SWEEP) == ("twisted",)
    assert one.fixed_in("merge.roundtrip", case(dtype="float32").sweep) == ()
    ruling = one.rule("merge.roundtrip", SWEEP, [])
    assert ruling.status == "fixed" and "remove the entry" in ruling.message
    assert one.rule("merge.roundtrip", SWEEP, [(outcome(), case(values=3))]).status == "violation"


@pytest.mark.parametrize(
    "answer",
    [
        outcome(ERROR, "crash|twist|KeyError in twist.py:merge"),
        outcome(fingerprint="merge.roundtrip|twist|bias|numeric"),
    ],
    ids=["raises", "another fingerprint"],
)
def test_a_witness_that_fails_otherwise_is_an_error_never_absorbed(path, answer):
    one = court(path, Fake({"float64": answer}))
    assert one.verdict("twisted") == "error"
    assert one.absorbs(outcome(), case()) is None
    assert one.absorbs(answer, case()) is None
    ruling = one.rule("merge.roundtrip", SWEEP, [])
    assert ruling.status == "error" and answer.fingerprint in ruling.message


def test_a_witness_of_which_the_law_says_nothing_is_an_error(path):
    assert court(path, Fake({"float64": outcome(SKIP)})).verdict("twisted") == "error"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {
                "where": {"variant": "twirl"},
                "witness": encode(case(variant="twirl"), "merge.roundtrip"),
                "fingerprint": "merge.roundtrip|twirl|weight|numeric",
            },
            "where.variant: stale",
        ),
        ({"where": {"variant": ["twist", "twirl*"], "layer": "linear"}}, "'twirl*'"),
        ({"where": {"variant": "twist", "layer": ["linear", "embedding"]}}, "where.layer: stale"),
        (
            {
                "where": {},
                "fingerprint": "merge.roundtrip|*|weight|numeric",
                "witness": encode(case("conv3d"), "merge.roundtrip"),
            },
            "witness: stale",
        ),
    ],
)
def test_an_issue_that_matches_nothing_is_refused_as_stale(path, changes, says):
    library = Fake()
    with pytest.raises(UsageError, match="stale") as raised:
        court(path, library, entry(**changes))
    assert says in str(raised.value) and "twisted" in str(raised.value)
    assert not library.checked, "stale is told at collection, before anything runs"


def test_an_unknown_field_and_a_witness_outside_where_are_refused_when_read(path):
    with pytest.raises(UsageError, match="no case has a field 'colour'"):
        ledger.load(write(path, entry(where={"colour": "red"})), LAWS)
    with pytest.raises(UsageError, match="witness: witness lies outside 'where'"):
        ledger.load(write(path, entry(where={"variant": "twist", "layer": "conv2d"})), LAWS)


def test_another_version_makes_an_issue_inactive_and_the_law_must_hold(path):
    library = Fake(version="2.0")
    one = court(path, library, entry(), entry(id="gone", where={"variant": ["twist", "older"], "layer": "linear"}))
    assert one.verdict("twisted") == one.verdict("gone") == "inactive"
    assert one.rule("merge.roundtrip", SWEEP, [(outcome(), case())]).status == "violation"
    assert one.rule("merge.roundtrip", SWEEP, []).status == "pass"
    assert not library.checked


def test_versions_follow_pep_440(path):
    read = ledger.load(write(path, entry(versions=">=1.2,<2")), LAWS)
    listed = [v for v in ("1.1", "1.2", "1.10", "1.9.dev1", "2.0rc1", "2.0") if ledger.active(read, v)]
    assert listed == ["1.2", "1.10", "1.9.dev1"]
    with pytest.raises(UsageError, match="PEP 440"):
        ledger.active(read, "unknown build")


# several laws, fingerprints, witnesses


def test_one_root_cause_may_name_several_laws_and_fingerprints(path):
    tokens = [encode(case(), "merge.roundtrip"), encode(case(dtype="float32"), "merge.oracle")]
    prints = ["merge.*|twi*|weight|numeric", "crash|twist|KeyError in *"]
    crash = outcome(ERROR, "crash|twist|KeyError in twist.py:merge")
    one = court(path, Fake({"float32": crash}), entry(law="merge.*", fingerprint=prints, witness=tokens))
    assert one.verdict("twisted") == "known"
    assert (
        one.absorbs(outcome(law="merge.oracle", fingerprint="merge.oracle|twist|weight|numeric"), case()) == "twisted"
    )
    assert one.absorbs(crash, case()) == "twisted"
    assert one.absorbs(outcome(fingerprint="merge.roundtrip|twist|bias|numeric"), case()) is None


def test_a_fingerprint_that_no_witness_shows_absorbs_nothing(path):
    prints = [PRINT, "crash|twist|KeyError in *"]
    one = court(path, Fake(), entry(law="*", fingerprint=prints))
    assert one.verdict("twisted") == "known"
    assert one.absorbs(outcome(ERROR, "crash|twist|KeyError in twist.py:merge"), case()) is None


def test_every_witness_must_still_show_the_issue(path):
    tokens = [encode(case(dtype=dtype), "merge.roundtrip") for dtype in ("float64", "float32")]
    one = court(path, Fake({"float32": outcome(PASS)}), entry(witness=tokens))
    assert one.verdict("twisted") == "fixed"
    assert one.absorbs(outcome(), case()) is None


def test_a_star_never_crosses_a_bar():
    assert ledger.fits("merge.oracle|ia3|ia3.epsilon", "merge.*|ia3*|ia3.epsilon")
    assert not ledger.fits("merge.oracle|ia3|weight|numeric", "merge.*|*|numeric")


def test_witnesses_are_heard_when_asked_for_and_once(path):
    library = Fake()
    one = court(path, library)
    assert not library.checked
    assert one.absorbs(outcome(fingerprint="merge.roundtrip|twist|bias|numeric"), case()) is None
    assert one.rule("merge.roundtrip", case("conv2d").sweep, []).status == "pass"
    assert not library.checked, "a filtered run hears no witness of a cell that it leaves out"
    for _ in range(3):
        one.verdict("twisted"), one.absorbs(outcome(), case())
    assert library.checked == [case()]


def test_a_fault_of_the_harness_on_a_witness_is_nobodys_verdict(path):
    def broken(implementation, case, laws):
        raise HarnessError("negative budget")

    library = Fake()
    library.check = broken
    with pytest.raises(HarnessError):
        court(path, library).verdict("twisted")


# reading


def test_an_entry_reads_back(path):
    (issue,) = ledger.load(write(path, entry(url="https://example.org/1"))).issues
    assert issue.law == ("merge.roundtrip",) and issue.fingerprint == (PRINT,)
    assert issue.opened == datetime.date(2025, 1, 31) and issue.url == "https://example.org/1"
    assert issue.witnesses[0].case == case() and issue.witness == (encode(case(), "merge.roundtrip"),)


def test_a_date_may_be_one_of_toml(path):
    write(path, entry())
    path.write_text(path.read_text().replace('"2025-01-31"', "2025-01-31"))
    assert ledger.load(path, LAWS).issues[0].opened == datetime.date(2025, 1, 31)


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"law": "merge.roundabout"}, "law", "unknown law"),
        ({"law": ["merge.roundtrip", "nope.*"]}, "law", "unknown law 'nope.*'"),
        ({"law": []}, "law", "list of texts"),
        ({"colour": "red"}, "colour", "unknown field"),
        ({"reason": None}, "reason", "missing"),
        ({"reason": " "}, "reason", "must be text"),
        ({"versions": "since 1.0"}, "versions", "PEP 440"),
        ({"versions": 1}, "versions", "PEP 440"),
        ({"needs": "sse9"}, "needs", "none of avx512, avx512_bf16"),
        ({"needs": 7}, "needs", "list of texts"),
        ({"kind": "quirk"}, "kind", "none of bug, documented, upstream"),
        ({"severity": "bad"}, "severity", "none of"),
        ({"opened": "31.1.2025"}, "opened", "no date"),
        ({"opened": 2025}, "opened", "no date"),
        ({"url": "javascript:alert(1)"}, "url", "address"),
        ({"where": "everywhere"}, "where", "must be a table"),
        ({"where": {"layer": "liner"}}, "where.layer", "stale"),
        ({"where": {"dtype": "fp8"}}, "where.dtype", "stale"),
        ({"where": {"variant": []}}, "where", "no alternative"),
        ({"where": {"poison": {"strength": 1}}}, "where", "no poison has a field"),
        ({"where": {"poison": "nan"}}, "where", "must be a table"),
        ({"witness": "pc1.nonsense"}, "witness", "broken token"),
        ({"witness": "hello"}, "witness", "not a token"),
        ({"witness": encode(case(), "merge.elsewhere")}, "witness", "unknown"),
        ({"witness": encode(case(), "merge.oracle")}, "witness", "'law' does not name"),
        ({"fingerprint": "merge.roundtrip|other|weight|numeric"}, "witness", "cannot show"),
        ({"fingerprint": [PRINT, "merge.oracle|twist|weight|numeric"]}, "fingerprint", "no witness can show"),
        ({"fingerprint": [PRINT, "weight"]}, "fingerprint", "neither"),
        ({"bound": "ia3.sigma"}, "bound", "none of"),
        ({"bound": "ia3.epsilon"}, "bound", "not explained"),
    ],
)
def test_a_bad_entry_is_refused_in_one_line_with_file_entry_and_field(path, changes, field, says):
    with pytest.raises(UsageError) as raised:
        ledger.load(write(path, entry(**changes)), LAWS)
    text = str(raised.value)
    assert text.startswith(f"{path}: issue 'twisted': {field}: ") and says in text and "\n" not in text


def test_what_is_no_ledger_is_refused(path):
    path.write_text("[[issue]\n")
    with pytest.raises(UsageError, match="cannot read the ledger"):
        ledger.load(path, LAWS)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read the ledger"):
        ledger.load(path, LAWS)
    with pytest.raises(UsageError, match="cannot read the ledger"):
        ledger.load(path.with_name("nowhere.toml"), LAWS)
    path.write_text("issues = []\n")
    with pytest.raises(UsageError, match=r"\[\[issue\]\] tables only, not 'issues'"):
        ledger.load(path, LAWS)
    with pytest.raises(UsageError, match="issue 2: id: missing"):
        ledger.load(write(path, entry(), entry(id=None)), LAWS)
    with pytest.raises(UsageError, match="'twisted': id: there are two of them"):
        ledger.load(write(path, entry(), entry()), LAWS)
    path.write_text("")
    assert ledger.load(path, LAWS).issues == ()


# where


@pytest.mark.parametrize(
    ("table", "covered"),
    [
        ({}, True),
        ({"variant": "tw*", "layer": ["linear", "conv2d"]}, True),
        ({"variant": "!twist"}, False),
        ({"quantizer": "none"}, True),
        ({"quantizer": "bitsandbytes.*"}, False),
        ({"kernel": 2}, True),
        ({"kernel": [[1, 2]]}, True),
        ({"kernel": [[2, 1]]}, False),
        ({"kernel": ">2"}, False),
        ({"n_out": ">= 3", "n_in": [1, 2]}, True),
        ({"groups": "!= 1"}, False),
        ({"bias": False}, True),
        ({"bias": 0}, False),
        ({"rank": 1, "padding_mode": "zeros"}, True),
        ({"options": {"dora": True}}, False),
        ({"poison": {"value": "n*"}}, True),
        ({"poison": {"value": "inf"}}, False),
        ({"extra": {"kind": "svd"}}, False),
        ({"profile": "normal", "adapter_dtype": "float64", "safe": False}, True),
        ({"adapters": 1}, True),
        ({"adapters": ">1"}, False),
    ],
)
def test_where_covers_what_its_conditions_say(table, covered):
    assert parse(table).covers(case("conv2d", poison=Poison("nan"))) is covered


def test_conditions_on_a_layer_and_an_adapter_speak_of_one_pair():
    layers = (
        LayerSpec("a", "linear", 2, 2, bias=True),
        LayerSpec("b", "linear", 5, 2),
        LayerSpec("c", "linear", 9, 2),
    )
    adapters = (AdapterSpec("x", (0,), rank=1), AdapterSpec("y", (1,), rank=4))
    both = replace(case(), layers=layers, adapters=adapters)
    assert parse({"bias": True, "rank": 1}).covers(both)
    assert not parse({"bias": True, "rank": 4}).covers(both)
    assert not parse({"n_in": 9}).covers(both), "a bystander is no place of the issue"


def test_a_value_that_no_field_can_have_is_refused():
    with pytest.raises(UnknownField, match="must be text"):
        parse({"rank": [{"a": 1}]})


# printing


@pytest.mark.parametrize(
    ("found", "severity"),
    [
        (
            Outcome(
                "merge.roundtrip",
                VIOLATION,
                Measurement(9.0, 9.0, "a:weight"),
                fingerprint=PRINT,
                message='"said"\n\x7f\\',
            ),
            "silent numbers",
        ),
        (Outcome("merge.roundtrip", ERROR, fingerprint="crash|twist|KeyError in [x].py:merge"), "crash"),
        (
            Outcome("merge.roundtrip", VIOLATION, Measurement(9.0, 9.0, "", "half merged"), fingerprint=PRINT),
            "corrupted state",
        ),
        (
            Outcome("merge.roundtrip", VIOLATION, Measurement(9.0, 9.0, "", "unnamed"), fingerprint=PRINT),
            "contract",
        ),
    ],
)
def test_a_printed_entry_is_one_that_reads_and_absorbs(path, found, severity):
    text = ledger.entry_text(case(), "merge.roundtrip", found, "1.4", datetime.date(2026, 1, 2))
    path.write_text(text)
    read = ledger.load(path, LAWS)
    (issue,) = read.issues
    assert (issue.severity, issue.versions, issue.opened) == (severity, "==1.4", datetime.date(2026, 1, 2))
    laws = [Law(name, "", (), lambda stage: None, "") for name in LAWS]
    library = Fake({"float64": found})
    assert ledger.Court(read, library, laws, library.check).absorbs(found, case(values=9)) == issue.id


def test_there_is_no_entry_for_what_holds():
    with pytest.raises(UsageError, match="does not fail"):
        ledger.entry_text(case(), "merge.roundtrip", outcome(PASS), "1.4")


# with the library


def test_the_documented_inexactness_of_ia3_is_known_and_an_entry_for_it_is_strict(path):
    layer = LayerSpec("a", "linear", 1, 1)
    adapter = AdapterSpec("default", (0,), options=(("feedforward", False),))
    one = Case(
        Sweep("peft", "ia3", "linear", "float64"),
        0,
        0,
        (layer,),
        (adapter,),
        "float64",
        "dyadic",
        values=3,
        batch=(1,),
    )
    library, laws = Peft(), law.laws()
    (found,) = engine.check(library, one, law.laws("merge.roundtrip"))
    assert found.fingerprint == "merge.roundtrip|ia3|ia3.epsilon"
    path.write_text(ledger.entry_text(one, "merge.roundtrip", found, library.version))
    read = ledger.load(path)
    assert (read.issues[0].kind, read.issues[0].bound) == ("documented", "ia3.epsilon")
    known = ledger.Court(read, library, laws)
    assert known.verdict(read.issues[0].id) == "known" and known.absorbs(found, one)
    single = replace(one, sweep=replace(one.sweep, dtype="float32"), adapter_dtype="float32")  # s + 1e-8 is s there
    path.write_text(path.read_text().replace(encode(one, "merge.roundtrip"), encode(single, "merge.roundtrip")))
    assert ledger.Court(ledger.load(path), library, laws).verdict(read.issues[0].id) == "fixed"


def test_a_folder_is_read_as_one_ledger(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(write(tmp_path / "one", entry(id=name)).read_text())
    assert [issue.id for issue in ledger.load(tmp_path, LAWS).issues] == ["a", "b"]
    (tmp_path / "c.toml").write_text((tmp_path / "a.toml").read_text())
    with pytest.raises(UsageError, match="there are two of them"):
        ledger.load(tmp_path, LAWS)


def test_an_empty_folder_is_no_ledger(tmp_path):
    with pytest.raises(UsageError, match="there is none"):
        ledger.load(tmp_path, LAWS)


# what an issue needs


def test_an_issue_that_needs_a_processor_is_inactive_on_others(path, monkeypatch):
    one = entry(needs="avx512_bf16")
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx512", "avx512_bf16"}))
    assert court(path, Fake(), one).verdict("twisted") == "known"
    assert court(path, Fake(answers={"float64": outcome(PASS)}), one).verdict("twisted") == "fixed"
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx512"}))
    elsewhere = court(path, Fake(), one)
    assert elsewhere.verdict("twisted") == "inactive"
    assert "avx512_bf16" in elsewhere.hearing("twisted").message
    assert elsewhere.rule("merge.roundtrip", SWEEP, [(outcome(), case())]).status == "violation"
    assert elsewhere.rule("merge.roundtrip", SWEEP, []).status == "pass"


def test_a_witness_whose_quantizer_is_missing_is_not_heard(path, monkeypatch):
    coded = replace(case(), sweep=replace(SWEEP, quantizer="hqq.4"))
    tokens = [encode(coded, "merge.roundtrip"), encode(case(), "merge.roundtrip")]
    monkeypatch.setattr(quantizers, "available", lambda name: False)
    library = Fake()
    assert court(path, library, entry(witness=tokens)).verdict("twisted") == "known"
    assert library.checked == [case()]
    alone = court(path, Fake(), entry(witness=tokens[:1]))
    assert alone.verdict("twisted") == "inactive"
    assert alone.absorbs(outcome(), coded) is None


def test_features_are_read_from_the_flags_where_torch_does_not_tell(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n")
    assert processor.flagged(info) == {"avx512", "avx512_bf16"}
    info.write_text("Features : fp asimd\n")
    assert processor.flagged(info) == processor.flagged(tmp_path / "nothing") == frozenset()


def test_this_processors_features_are_in_the_calibration():
    assert processor.features() <= set(processor.FEATURES)
    if Path("/proc/cpuinfo").exists():
        assert processor.features() == processor.flagged(Path("/proc/cpuinfo"))
