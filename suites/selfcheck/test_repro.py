"""Standalone scripts: they show real defects on their own, and pass where a law holds."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from scripts import execute

from peftcheck import engine, generator, models, processor, repro
from peftcheck.case import AdapterSpec, Case, LayerSpec, Poison, Sweep, encode
from peftcheck.implementations.peft import Peft
from peftcheck.implementations.peft.methods import METHODS
from peftcheck.implementations.peft.script import source
from peftcheck.law import laws
from peftcheck.measurement import Measurement
from peftcheck.outcome import VIOLATION, Outcome
from peftcheck.repro import bodies, model

LIBRARY = Peft()


def law(name):
    (found,) = laws(name)
    return found


OPTIONS = {"ia3": (("feedforward", False),), "fourierft": (("seed", 777), ("times", 1))}


def case(variant, layers, adapters=None, **fields) -> Case:
    gates = OPTIONS.get(variant, ())
    adapters = adapters or (AdapterSpec("default", tuple(range(len(layers))), 1, 2.0, gates),)
    usual = Case(
        Sweep("peft", variant, layers[0].kind, "float64"),
        0,
        0,
        layers,
        adapters,
        "float64",
        "dyadic",
        values=3,
        batch=(1,),
    )
    return replace(usual, **fields)


def conv(kind, kernel, n_in=1, **fields) -> LayerSpec:
    ones = (1,) * len(kernel)
    usual = {
        "stride": ones,
        "padding": (0,) * len(kernel),
        "dilation": ones,
        "size": tuple(k + 2 for k in kernel),
    }
    return LayerSpec("a", kind, n_in, 1, kernel=kernel, **{**usual, **fields})


ONE = (LayerSpec("a", "linear", 1, 1),)
TWO = (*ONE, LayerSpec("b", "linear", 1, 1))
HALF = Sweep("peft", "ia3", "linear", "float16")
# Real defects of PEFT 0.21.2, and what the script must say of each.
DEFECTS = {
    "epsilon": ("merge.roundtrip", case("ia3", ONE), "difference:"),
    "dilation": (
        "forward.oracle",
        case("lora", (conv("conv2d", (2, 1), dilation=(2, 1), size=(5, 2)),)),
        "expected:",
    ),
    "dilation crash": (
        "forward.oracle",
        case("lora", (conv("conv2d", (2, 1), dilation=(2, 1), size=(4, 2)),)),
        "found:",
    ),
    "narrow kernel": (
        "merge.oracle",
        case("lora", (conv("conv3d", (1, 1, 1), n_in=2),)),
        "found: RuntimeError",
    ),
    "half merged": (
        "safe_merge.all_or_nothing",
        case("lora", TWO, poison=Poison("nan", 0, 1)),
        "found: written",
    ),
    "unnamed": (
        "safe_merge.names",
        case("ia3", ONE, sweep=HALF, adapter_dtype="float32", poison=Poison("overflow")),
        "found: accepted, merged [[-inf]]",
    ),
    "seeded indices": (
        "safe_merge.all_or_nothing",
        case("fourierft", TWO, profile="normal", poison=Poison("nan", 0, 1)),
        "found: written",
    ),
    "overflow": (
        "safe_merge.rejects",
        case("ia3", ONE, sweep=HALF, adapter_dtype="float32", poison=Poison("overflow")),
        "found: accepted, merged [[-inf]]",
    ),
}

RUNNER = """
import contextlib, io, json, pathlib, runpy, sys
results = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    out = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
    results[path.stem] = (code, out.getvalue())
print(json.dumps({"results": results, "peftcheck": "peftcheck" in sys.modules}))
"""


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    made = {name: repro.standalone(LIBRARY, one, law(rule)) for name, (rule, one, _) in DEFECTS.items()}
    assert None not in made.values()
    return made


@pytest.fixture(scope="module")
def ran(scripts, tmp_path_factory) -> dict:
    """Run every script in one other interpreter, each as its own main program."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-c", RUNNER, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", DEFECTS)
def test_a_script_shows_a_real_defect_on_its_own(name, ran):
    code, said = ran["results"][name]
    assert code == 1
    assert DEFECTS[name][2] in said and "expected" in said


def test_the_scripts_need_torch_and_the_library_alone(scripts, ran):
    assert ran["peftcheck"] is False
    for text in scripts.values():
        found = {
            line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))
        }
        assert found <= {"torch", "peft"}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_script_is_short_and_says_what_it_is_of(name, scripts):
    lines = scripts[name].splitlines()
    assert len(lines) < 40
    assert DEFECTS[name][0] in lines[0] and LIBRARY.version in lines[0]
    assert lines[1] == f"# {DEFECTS[name][1].words()}"


# where the law holds


def pretended(name: str, one: Case, role: str, symptom: str) -> str:
    """Return the script of a defect that is not there."""
    outcome = Outcome(name, VIOLATION, Measurement(9.0, 9.0, role, symptom), fingerprint="pretended")
    with engine.pinned():
        lines = repro._lines(LIBRARY, one, law(name), outcome)
    return "\n".join(lines)


HELD = (
    case(
        "lora",
        (LayerSpec("mlp.up", "linear", 3, 2, True), LayerSpec("q", "linear", 2, 2)),
        profile="normal",
        adapters=(AdapterSpec("x-1", (0,), 2, 3.0), AdapterSpec("x", (0, 1), 1, 8.0)),
        joint=False,
        cycles=2,
    ),
    case("lora", (replace(conv("conv2d", (2, 2), n_in=2), bias=True),), profile="normal", safe=True),
    case("lora", (LayerSpec("a", "embedding.scaled", 3, 2, scale=3.7),), profile="normal"),
    case(
        "ia3",
        (LayerSpec("a", "conv1d-transformers", 2, 3, True),),
        profile="normal",
        sweep=Sweep("peft", "ia3", "conv1d-transformers", "bfloat16"),
        adapter_dtype="bfloat16",
    ),
)
NUMERIC = (
    "forward.oracle",
    "merge.forward",
    "merge.oracle",
    "merge.delta",
    "merge.roundtrip",
    "merge.drift",
    "merge.disable",
    "merge.export",
    "merge.unload",
    "merge.isolated",
    "safe_merge.agrees",
)


@pytest.mark.parametrize("one", HELD, ids=lambda one: f"{one.sweep.variant}-{one.sweep.layer}")
@pytest.mark.parametrize("name", NUMERIC)
def test_where_a_law_holds_its_script_exits_0(name, one):
    (outcome,) = engine.check(LIBRARY, one, [law(name)])
    if outcome.status == "skip":
        return  # the variant has no such operation
    assert outcome.status == "pass"
    where = f"{one.layers[0].name}:{'output' if 'forward' in name or 'disable' in name else 'weight'}"
    code, said = execute(pretended(name, one, where, "numeric" if name != "merge.isolated" else "changed"))
    assert code == 0, said


@pytest.mark.parametrize("one", HELD, ids=lambda one: f"{one.sweep.variant}-{one.sweep.layer}")
@pytest.mark.parametrize(
    ("name", "symptom"),
    [
        ("merge.export", "attributes"),
        ("merge.unload", "module type"),
        ("merge.preserves", "strides"),
        ("merge.preserves", "dtype"),
        ("safe_merge.atomic", "written"),
        ("safe_merge.names", "unnamed"),
        ("safe_merge.rejects", "accepted nan"),
    ],
)
def test_where_nothing_is_broken_its_script_exits_0(name, symptom, one):
    poisoned = replace(one, poison=Poison("nan"))
    code, said = execute(pretended(name, poisoned, f"{one.layers[0].name}.weight", symptom))
    assert code == 0, said


def test_a_refused_merge_exits_0_and_an_accepted_one_1():
    grouped = replace(conv("conv2d", (2, 2), n_in=2), groups=2, n_out=2)
    refused = case("lora", (grouped,), (AdapterSpec("default", (0,), 2, 2.0),))
    assert execute(pretended("refuse.merge", refused, ":merge", "accepted"))[0] == 0
    accepted = case("lora", (replace(grouped, groups=1),))
    assert execute(pretended("refuse.merge", accepted, ":merge", "accepted"))[0] == 1


@pytest.mark.parametrize(
    "name",
    ["forward.oracle", "merge.forward", "merge.oracle", "merge.delta", "merge.roundtrip", "merge.unload"],
)
def test_a_script_notices_what_it_is_to_notice(name, monkeypatch):
    """Plant a defect in the library after the script is written: it must exit 1."""
    from peft import LoraModel
    from peft.tuners.lora.layer import Linear

    symptom = "changed" if name == "merge.unload" else "numeric"
    text = pretended(name, HELD[0], f"mlp.up:{'output' if 'forward' in name else 'weight'}", symptom)
    assert execute(text)[0] == 0
    if name == "merge.unload":
        clean = LoraModel.unload

        def leaving(self):
            exported = clean(self)
            exported.get_submodule("mlp.up").weight.data[0, 0] += 1e-9
            return exported

        monkeypatch.setattr(LoraModel, "unload", leaving)
    elif name == "forward.oracle":
        plain = Linear.forward
        monkeypatch.setattr(Linear, "forward", lambda self, x: plain(self, x) + 1e-12)
    else:
        half = Linear.get_delta_weight
        calls = []

        def drifting(self, adapter):
            calls.append(adapter)
            return half(self, adapter) * (1 + 1e-12 * len(calls))

        monkeypatch.setattr(Linear, "get_delta_weight", drifting)
    code, said = execute(text)
    assert code == 1, said


# what scripts are made of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_literals_are_exact(dtype):
    info = torch.finfo(dtype)
    tricky = [0.1, -0.0, 1 / 3, info.max, info.tiny, info.smallest_normal / 2, math.inf, -math.inf, math.nan]
    tensor = torch.tensor([tricky], dtype=dtype)
    back = eval(model.literal(tensor), {"torch": torch})
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
    indices = torch.tensor([[3, 1]])
    assert torch.equal(eval(model.literal(indices), {"torch": torch}), indices)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_configuration_reads_back(name):
    import peft
    from peft.tuners.lora.config import CordaConfig

    known = {**vars(peft), "CordaConfig": CordaConfig}
    variant = METHODS[name].variant
    layer = sorted(variant.layers | variant.within)[0]
    for index in range(3):
        one = generator.draw(variant, Sweep("peft", name, layer, "float32"), 0, index)
        for adapter in one.adapters:
            config = METHODS[name].config(adapter, [one.layers[target].name for target in adapter.targets])
            assert eval(source(config), dict(known)) == config


@pytest.mark.parametrize("index", range(12))
@pytest.mark.parametrize(
    "layer", ["linear", "conv1d-transformers", "conv1d", "conv2d", "conv3d", "embedding", "embedding.scaled"]
)
def test_a_model_in_source_is_the_model(layer, index):
    one = generator.draw(METHODS["lora"].variant, Sweep("peft", "lora", layer, "float32"), 0, index)
    names: dict = {}
    lines = [
        "import torch",
        "from torch import nn",
        *model.imports(one),
        *model.definitions(one),
        *model.build(one),
    ]
    exec("\n".join(lines), names)
    built, bench = names["model"], models.build(one)
    for spec in one.layers:
        assert repr(built.get_submodule(spec.name)) == repr(bench.get_submodule(spec.name)).replace(
            "peftcheck.models.", ""
        )
    assert {n: (p.shape, p.dtype) for n, p in built.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in bench.named_parameters()
    }
    assert built.training is one.train


def test_names_and_tensors_of_any_kind_survive():
    odd = 'q"\\\n\u00e9\U0001f600'
    assert eval(model.text(odd)) == odd


# where there is no standalone form


@dataclass
class Mute:
    """PEFT without a spelling."""

    name, version, folders, ledger = LIBRARY.name, LIBRARY.version, LIBRARY.folders, None

    def variants(self):
        return LIBRARY.variants()

    def attach(self, model, case):
        return LIBRARY.attach(model, case)


def test_what_has_no_standalone_form_is_a_replay_of_the_token():
    rule, one, _ = DEFECTS["epsilon"]
    for library, law_, failing in (
        (Mute(), law(rule), one),
        (LIBRARY, replace(law(rule), name="other.law"), one),
    ):
        assert repro.standalone(library, failing, law_) is None
        text = repro.script(library, failing, law_)
        assert encode(failing, law_.name) in text and "replay" in text
        compile(text, "script", "exec")


def test_a_case_that_holds_has_no_standalone_script():
    assert repro.standalone(LIBRARY, HELD[0], law("merge.roundtrip")) is None


def test_every_body_is_of_a_law_that_exists():
    assert set(bodies.BODIES) <= {one.name for one in laws()}


def test_the_text_of_an_issue_cannot_leave_its_fences():
    rule, one, _ = DEFECTS["epsilon"]
    found = Outcome(rule, VIOLATION, fingerprint="x", message="`</code>` ~~~~ \n# heading")
    text = repro.issue(LIBRARY, one, law(rule), found)
    assert text.count("~~~~python") == 1 and text.count("\n~~~~") == 2
    assert "\n# heading" not in text.split("~~~~python")[0]
    assert encode(one, rule) in text


# quantized layers


def coded(quantizer: str, **fields) -> Case:
    """Return a LoRA on one layer of 32 x 32 that 4-bit layers can run forward."""
    spec = LayerSpec("a", "linear", 32, 32, bias=fields.pop("bias", False))
    adapter = fields.pop("adapter", AdapterSpec("default", (0,), 1, 1.0))
    settings = {} if quantizer.endswith("int8") else {"blocksize": 32}
    usual = Case(
        Sweep("peft", fields.pop("variant", "lora"), "linear", "float32", quantizer), 0, 0, (spec,), (adapter,), "float32",
        "dyadic", values=3, batch=(1,), extra=tuple(settings.items()),
    )  # fmt: skip
    return replace(usual, **fields)


_SPECTRAL = case("fourierft", (LayerSpec("a", "linear", 1, 1),)).adapters[0]
MISS = AdapterSpec("default", (0,), 1, 1.0, (("init", False),))


def outcome_of(script: str) -> int:
    """Return the exit code of a script, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        exec(compile(script, "script", "exec"), {"__name__": "script"})
    return end.value.code


def shown(case: Case, name: str) -> str:
    script = repro.standalone(LIBRARY, case, law(name))
    assert script is not None, f"no script for {name} on {case.words()}"
    assert len(script.splitlines()) < 40
    assert "peftcheck" not in "\n".join(line for line in script.splitlines() if "import" in line)
    return script


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (coded("bitsandbytes.int8", variant="miss", adapter=MISS), "quantize.warns"),
        (coded("bitsandbytes.nf4", variant="miss", adapter=MISS), "quantize.warns"),
        (
            coded("bitsandbytes.int8", variant="lora.bias", bias=True, adapter=AdapterSpec("default", (0,), 1, 2.0)),
            "quantize.merge_budget",
        ),
        (coded("bitsandbytes.int8", profile="normal", poison=Poison("overflow")), "quantize.rejects"),
        (coded("bitsandbytes.int8", variant="hra"), "quantize.refuses"),
        (coded("bitsandbytes.nf4", variant="fourierft", adapter=_SPECTRAL), "quantize.refuses"),
        (coded("bitsandbytes.nf4", variant="pvera"), "quantize.merge_budget"),
    ],
)  # fmt: skip
def test_a_quantized_defect_is_shown_by_a_short_program(case, name):
    variant = LIBRARY.variants()[case.sweep.variant]
    case = replace(
        case, adapters=variant.fit_all(tuple(variant.fit(a, case.layers, False) for a in case.adapters), case.layers)
    )
    script = shown(case, name)
    assert "import bitsandbytes as bnb" in script
    assert outcome_of(script) == 1


@pytest.mark.skipif("avx512_bf16" not in processor.features(), reason="bitsandbytes repacks with AVX512-BF16 only")
def test_a_merge_after_a_forward_is_shown_by_a_short_program():
    assert outcome_of(shown(coded("bitsandbytes.nf4"), "quantize.after_forward")) == 1


def test_a_quantized_program_passes_where_the_defect_is_gone():
    """With the adapter's bias scaled by 1 the merge is right: the same program then exits 0."""
    case = coded("bitsandbytes.int8", variant="lora.bias", bias=True, adapter=AdapterSpec("default", (0,), 1, 2.0))
    variant = LIBRARY.variants()["lora.bias"]
    case = replace(case, adapters=(variant.fit(case.adapters[0], case.layers, False),))
    script = shown(case, "quantize.merge_budget")
    head, _, tail = script.partition('"base_model.model.a.lora_B.default.bias": [')
    numbers, _, rest = tail.partition("]")
    doubled = ", ".join(repr(2 * float(number)) for number in numbers.split(","))
    assert outcome_of(f'{head}"base_model.model.a.lora_B.default.bias": [{doubled}]{rest}') == 0
