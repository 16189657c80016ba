"""Standalone scripts of the laws of combinations, on every witness of PEFT's ledger that is of such a law."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

import pytest
from peft import LoraModel
from scripts import execute

from peftcheck import engine, repro
from peftcheck.case import AdapterSpec, Case, LayerSpec, Sweep, decode
from peftcheck.implementations.peft import Peft
from peftcheck.law import laws
from peftcheck.measurement import Measurement
from peftcheck.outcome import VIOLATION, Outcome
from peftcheck.repro import combining

LIBRARY = Peft()
LAWS = {one.name: one for one in laws("combine.*")}


def witnesses() -> dict[str, tuple[Case, str]]:
    """Return the witnesses by issue, law and number."""
    listed = tomllib.loads((files("peftcheck.implementations.peft") / "ledger" / "combine.toml").read_text())
    found = {}
    for issue in listed["issue"]:
        for index, token in enumerate(issue["witness"]):
            case, law = decode(token)
            found[f"{issue['id']}-{law.partition('.')[2]}-{index}"] = (case, law)
    return found


WITNESSES = witnesses()
SPOKEN = [name for name, (_, law) in WITNESSES.items() if law not in combining.UNSPOKEN]


@cache
def written(name: str) -> str:
    case, law = WITNESSES[name]
    script = repro.standalone(LIBRARY, case, LAWS[law])
    assert script is not None, f"no script for {law} on {case.words()}"
    return script


@pytest.mark.parametrize("name", SPOKEN)
def test_a_witness_of_the_ledger_is_shown_by_a_short_program(name):
    script = written(name)
    assert len(script.splitlines()) < 40
    imported = {
        line.split()[1].partition(".")[0] for line in script.splitlines() if line.startswith(("import ", "from "))
    }
    assert imported <= {"torch", "peft", "transformers", "pathlib", "tempfile"}
    code, said = execute(script)
    assert code == 1, said
    assert "found" in said and "expected" in said


def test_every_law_of_combinations_has_a_script_or_a_reason():
    assert combining.BODIES.keys() | combining.UNSPOKEN.keys() == LAWS.keys()
    assert not combining.BODIES.keys() & combining.UNSPOKEN.keys()
    assert all(combining.UNSPOKEN.values())


# where a law holds


def asked(
    variant: str, layer: LayerSpec, kind: str, weights: tuple[float, ...], dtype: str = "float64", **settings
) -> Case:
    """Return adapters of rank 2 on one layer, and what is asked of them."""
    gates = {
        "ia3": (("feedforward", False),),
        "lora.velora": (("groups", 1),),
        "lora.bdlora": (("blocks", 1), ("factor", "A")),
    }.get(variant, ())
    own = tuple(AdapterSpec(name, (0,), 2, 4.0, gates) for name in ("x", "y-1", "z")[: max(2, len(weights))])
    extra = tuple(sorted({"kind": kind, "weights": weights, "members": tuple(range(len(weights))), **settings}.items()))
    return Case(Sweep("peft", variant, layer.kind, dtype), 0, 0, (layer,), own, dtype, "normal", values=5, extra=extra)


LINEAR = LayerSpec("mlp.up", "linear", 5, 4, bias=True)
CONVOLUTION = LayerSpec("a", "conv2d", 3, 4, kernel=(2, 2), stride=(1, 1), padding=(0, 0), dilation=(1, 1), size=(4, 4))
HELD = {
    "cat": asked("lora", LINEAR, "cat", (1.0, -1.7)),
    "three": asked("lora", LINEAR, "cat", (2.0, -1.0, 0.5), "float32"),
    "half": asked("lora", LINEAR, "cat", (2.0, -1.0), "bfloat16"),
    "svd": asked("lora", LINEAR, "svd", (1.0, -1.7), "float32"),
    "svd whole": asked("lora", LINEAR, "svd", (1.0, -1.7), "float32", svd_rank=4),
    "kernel": asked("lora", CONVOLUTION, "cat", (0.3, 3.0)),
    "transposed": asked("lora", LayerSpec("a", "conv1d-transformers", 5, 4, bias=True), "cat", (1.0, 3.0)),
    "embedding": asked("lora", LayerSpec("a", "embedding", 5, 4), "svd", (1.0, 3.0), "float32"),
    "pruned": asked("lora", LINEAR, "magnitude_prune_svd", (1.0, 0.5), "float32", density=0.5, svd_rank=4),
    "ties": asked("lora", LINEAR, "ties_svd", (1.0, 0.5), "float32", density=0.5, svd_rank=4),
    "dropped": asked("lora", LINEAR, "dare_linear_svd", (1.0, 0.5), "float32", density=0.75, svd_rank=4, seed=11),
    "merged": asked("lora", LINEAR, "cat", (1.0, -1.7), merged=1),
    "compressed": asked("lora.velora", LINEAR, "cat", (1.0, -1.7)),
    "sampled": asked("lora.monteclora", LINEAR, "svd", (1.0, -1.7), "float32", svd_rank=4),
    "one block": asked("lora.bdlora", LINEAR, "cat", (1.0, -1.7)),
    "gates": asked("ia3", LINEAR, "linear", (0.5, 0.5)),
    "unknown kind": asked("lora", LINEAR, "cat", (1.0, 2.0), request="unknown kind"),
}


def pretended(name: str, case: Case, role: str, symptom: str) -> str | None:
    """Return the script of a defect that is not there, or None where the law or the method has none."""
    outcome = Outcome(
        name, VIOLATION, Measurement(9.0, 9.0, role, symptom, note="ValueError: x"), fingerprint="pretended"
    )
    with engine.pinned():
        lines = repro._lines(LIBRARY, case, LAWS[name], outcome)
    return None if lines is None else "\n".join(lines)


ROLES = {"combine.rank": ("model:rank", "rank"), "combine.base_untouched": ("mlp.up.weight", "changed")}


@pytest.mark.parametrize("of", HELD)
def test_where_a_law_holds_its_script_exits_0(of):
    case, seen = HELD[of], set()
    for name in sorted(combining.BODIES):
        (outcome,) = engine.check(LIBRARY, case, [LAWS[name]])
        if outcome.status != "pass":
            continue  # it says nothing of this case, or is a known issue of PEFT
        role, symptom = ROLES.get(name, (f"{case.layers[0].name}:weight", "numeric"))
        role = f"request:{case.setting('request')}" if name == "combine.refuses" else role
        script = pretended(name, case, role, symptom)
        if script is None and case.sweep.variant == "ia3" and name == "combine.rank":
            continue  # a gate has no rank
        assert script is not None, name
        code, said = execute(script)
        assert code == 0, f"{name}: {said}\n{script}"
        seen.add(name)
    assert len(seen) >= 6, seen


@pytest.mark.parametrize("name", ["linear", "single", "cancel", "homogeneous", "additive", "definition", "best_rank"])
def test_a_script_notices_what_it_is_to_notice(name, monkeypatch):
    """Plant a defect in the library after the script is written: it must exit 1."""
    of = {"definition": "pruned", "best_rank": "svd"}.get(name, "three")
    script = pretended(f"combine.{name}", HELD[of], "mlp.up:weight", "numeric")
    assert execute(script)[0] == 0
    clean, calls = LoraModel.add_weighted_adapter, []

    def drifting(self, adapters, weights, into, **options):
        clean(self, adapters, weights, into, **options)
        calls.append(into)
        for module in self.modules():
            if into in getattr(module, "scaling", {}):
                module.scaling[into] += 1e-3 * len(calls)
                module.lora_B[into].weight.data[:, 0] += 0.1 * len(calls)

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", drifting)
    code, said = execute(script)
    assert code == 1, said
