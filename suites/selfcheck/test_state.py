"""Checkpoints are weighed by their format, read without the library; what the laws of state say of small ports."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from peftcheck import checkpoint, checkpoint_table, engine, generator, repro
from peftcheck.case import Case, Sweep, decode
from peftcheck.faults import FAULTS, Faulty
from peftcheck.faults.matrix import suitable
from peftcheck.implementation import Implementation, Reloads, stored
from peftcheck.implementations.reference import Reference
from peftcheck.law import laws
from peftcheck.laws.state_tied import TIED, tied_case
from peftcheck.models import build
from peftcheck.outcome import PASS
from peftcheck.staging import set_up

REFERENCE = Reference()


def case_of(
    variant: str = "lora", layer: str = "linear", dtype: str = "float32", index: int = 0, several: bool = False
) -> Case:
    for number in range(index, 200):
        case = generator.draw(REFERENCE.variants()[variant], Sweep("reference", variant, layer, dtype), 0, number)
        if (len(case.adapters) > 1) == several and case.profile == "normal":
            return case
    raise LookupError


@pytest.mark.parametrize("names", [("a",), ("a", "b.weight"), tuple(f"layer.{i}.é" for i in range(40))])
def test_sizes_account_for_every_byte_of_a_safetensors_file(tmp_path, names) -> None:
    save_file(
        {name: torch.ones(3, 5, dtype=torch.float16) for name in names}, tmp_path / "x.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text("{}")
    found = checkpoint.sizes(tmp_path)
    assert found.values == len(names) * 30
    assert found.written == (tmp_path / "x.safetensors").stat().st_size
    assert (found.extra, found.description) == (0, 2)


def test_values_hidden_in_metadata_are_extra(tmp_path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", {"format": "pt", "values": "1.0 " * 100})
    assert checkpoint.sizes(tmp_path).extra >= 400


def test_a_file_of_another_format_counts_whole(tmp_path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x80" * 77)
    assert checkpoint.sizes(tmp_path) == checkpoint.Sizes(0, 0, 77, 0)


def test_the_header_is_read_without_its_metadata(tmp_path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", {"format": "pt"})
    assert checkpoint.header(tmp_path / "x.safetensors") == {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    }


def test_a_temporary_folder_goes_with_its_owner() -> None:
    class Owner:
        pass

    owner = Owner()
    folder = checkpoint.temporary(owner)
    (folder / "file").write_text("")
    del owner
    assert not folder.exists()


def test_the_reference_reloads_and_says_so() -> None:
    assert isinstance(REFERENCE, Reloads)
    case = case_of(several=True)
    stage = set_up(REFERENCE, case)
    folder = checkpoint.saved(stage)
    assert checkpoint.saved(stage) == folder  # written once
    again = checkpoint.reloaded(stage, stage.names)
    for name in stage.names:
        assert stored(folder, name).is_dir()
        for key, tensor in stage.attached.adapter_tensors(name).items():
            assert torch.equal(tensor, again.adapter_tensors(name)[key])


def test_what_is_declared_counts_each_storage_once() -> None:
    case = case_of()
    stage = set_up(REFERENCE, case)
    name = stage.names[0]
    tensors = stage.attached.adapter_tensors(name)
    assert checkpoint.declared(stage, name) == sum(t.nbytes for t in tensors.values())
    first = next(iter(tensors.values()))
    stage.attached.adapter_tensors = lambda adapter: {("x", "A"): first, ("y", "A"): first}
    assert checkpoint.declared(stage, name) == first.nbytes


def test_a_tied_case_shares_the_weight_of_an_adapted_layer() -> None:
    case = replace(
        case_of(),
        layers=(replace(case_of().layers[0], tied=None),),
        adapters=(replace(case_of().adapters[0], targets=(0,)),),
    )
    drawn = tied_case(case)
    model = build(drawn)
    assert drawn.layers[-1].name == TIED
    assert model.get_submodule(TIED).weight is model.get_submodule(case.layers[0].name).weight
    assert tied_case(drawn) == drawn


def test_a_case_does_not_depend_on_which_law_saves_first() -> None:
    chosen = laws("state.*")
    for index in range(4):
        case = case_of(index=index * 7)
        together = {outcome.law: outcome for outcome in engine.check(REFERENCE, case, chosen)}
        for law in chosen:
            (alone,) = engine.check(REFERENCE, case, [law])
            assert alone == together[law.name]


@pytest.mark.parametrize("name", ["checkpoint.per-layer", "checkpoint.base"])
def test_the_ratio_is_that_of_the_bytes(name: str) -> None:
    fault = next(one for one in FAULTS if one.name == name)
    for case in [one for one in suitable(REFERENCE, fault, 8) if not one.whole]:
        (outcome,) = engine.check(Faulty(REFERENCE, fault), case, laws("state.checkpoint_size"))
        found = outcome.measurement
        assert found.ratio == found.residual / found.bound > 1
        if name == "checkpoint.per-layer":
            assert found.ratio == 2


def test_a_faulty_implementation_reloads_through_the_fault() -> None:
    fault = next(one for one in FAULTS if one.name == "load.scale")
    faulty: Implementation = Faulty(REFERENCE, fault)
    case = next(suitable(REFERENCE, fault, 1))
    stage = set_up(faulty, case)
    again = checkpoint.reloaded(stage, stage.names)
    name = stage.names[0]
    site = stage.attached.sites(name)[0]
    assert torch.equal(again.delta(site, name), 2 * stage.attached.delta(site, name))


def test_descriptions_are_read_as_json(tmp_path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"rank": 1}))
    assert checkpoint.descriptions(tmp_path) == {"a.json": {"rank": 1}}


def test_the_table_has_a_row_for_each_variant_and_the_reference_stores_nothing_but_what_it_trains() -> None:
    found = checkpoint_table.table(REFERENCE, REFERENCE.variants())
    assert {row[0] for row in found.rows} == set(REFERENCE.variants())
    assert {len(row) for row in found.rows} == {len(found.columns)}
    assert {row[-1] for row in found.rows} == {1.0}
    assert found == checkpoint_table.table(REFERENCE, REFERENCE.variants())


def test_the_table_shows_what_is_stored_besides() -> None:
    fault = next(one for one in FAULTS if one.name == "checkpoint.per-layer")
    assert {row[-1] for row in checkpoint_table.table(Faulty(REFERENCE, fault), REFERENCE.variants()).rows} == {2.0}


@pytest.mark.parametrize("law", ["state.save_load", "state.checkpoint_size", "state.delete"])
def test_a_known_defect_of_the_library_shows_in_a_short_script(law: str, tmp_path) -> None:
    peft = pytest.importorskip("peftcheck.implementations.peft").Peft()
    issues = tomllib.loads((peft.ledger / "state.toml").read_text(encoding="utf-8"))["issue"]
    witnesses = [decode(token) for issue in issues for token in issue["witness"]]
    case = next(case for case, own in witnesses if own == law)
    script = repro.standalone(peft, case, laws(law)[0])
    assert script is not None
    assert len(script.splitlines()) <= repro.MOST_LINES
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "found:" in done.stdout


def test_an_adapter_added_again_beside_one_of_another_method_is_compared_alone() -> None:
    """LoRA before OFT is another function than LoRA after it, which is where an adapter that is added again comes."""
    peft = pytest.importorskip("peftcheck.implementations.peft").Peft()
    sweep, found = Sweep("peft", "mixed.lora-oft", "linear", "float32"), []
    for index in range(30):
        case = generator.draw(peft.variants()[sweep.variant], sweep, 3, index)
        if (
            case.profile == "normal"
            and len(case.adapters) == 2
            and case.adapters[0].targets == case.adapters[1].targets
        ):
            found += engine.check(peft, replace(case, poison=replace(case.poison, adapter=0)), laws("state.delete"))
    assert found
    assert {outcome.status for outcome in found} == {PASS}


def test_a_tied_weight_may_be_refused_where_a_round_trip_left_it_near_overflow() -> None:
    """DoRA on a base near overflow, in bfloat16: after merge and unmerge another safe merge is rightly refused."""
    case, law = decode(
        "pc1.eNptUe1uwjAMfBf_zlA_AEFeBSFkGhciQlKlLh-bePfZZVRsmipF9vXOd3E20DMyzdiTA_MF6LBjyjvH947Awr4NCblcgnn96sFuhBe6I4JdzQoDEc9KvX2UwsoYT2AXBhjzgVjZxfZhJkX1W1FMkuqPZGtgj9wcpaulbu5NoH6c7KOjG1iZE_D-CuR8QPYpSlMa-URyohwpjED1BEQptk2Kl1puC3Hn42gcd2lgsPMpmaMWh8DC6dA5Hw-CXTB4VfX-k96G9py9U6AWoB5zd8n3mmRaJ9ilAQp0pqg25ep1V7C1lBT7JJy5JBGTQQOw5njIqJxaHxQJKlB7bKXlPJDUJK9my7KU8krUqeU_L-fP3dP7Z0OQqaVMsdF54w7ft3LB7FFzQkgZZ04OTTImk11X9aKa1-tisX5svwGku7OR"
    )
    (outcome,) = engine.check(REFERENCE, case, laws(law))
    assert outcome.status == PASS
