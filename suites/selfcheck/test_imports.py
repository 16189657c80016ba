"""Imports go one way, the core knows no adapter library, and no module grows beyond reading."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peftcheck

ROOT = Path(peftcheck.__file__).parent
# Each line may import from the lines above it and, for what stands on one line, to its left. A package is one name.
ORDER = """
    errors escape dataclass_json tokens
    rounding rounding_linalg processor calibration
    case where issue attention values transformer_models models targets
    recording implementation spelling refusal
    oracle budgets programs reductions quantizers
    measurement architecture memento outcome
    generator_model generator stage staging checkpoint standing sequence_outputs sequence operations training combination
    combination_diagnosis generator_combine
    law laws engine
    strategies machine
    implementations
    shrink hearings ledger_file ledger repro
    record_tables record joining summary diff report_combinations report_quantized report_html report_markdown report_junit
    report_index
    report terminal
    watchdog faults selection quantized_cost suite walk session bench listing checkpoint_table closing
    plugin protocol __init__ running conformance cli
""".split()
LIBRARIES = {"peft", "lycoris", "loralib", "transformers", "diffusers", "bitsandbytes", "torchao", "optimum", "hqq"}
LONGEST = 350


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("peftcheck", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Yield what a module imports when it is imported itself: not within functions, not for annotations alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


IMPORTS = {name: {target for target in imported(path) if target in MODULES} for name, path in MODULES.items()}


def unit(module: str) -> str:
    """Return the top-level module or package below `peftcheck`."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_module_has_one_place_in_the_order():
    assert len(set(ORDER)) == len(ORDER)
    units = {unit(name) for name in MODULES}
    assert units - set(ORDER) == set(), "give these a place in ORDER"
    assert set(ORDER) - units == set(), "these are gone: take them out of ORDER"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    own = unit(module)
    for target in sorted(IMPORTS[module]):
        if unit(target) != own:
            assert ORDER.index(unit(target)) < ORDER.index(own), f"{module} imports {target}, which stands below it"


def test_no_import_goes_in_a_circle():
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(IMPORTS[module]):
                walk(target, (*trail, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())


def test_the_core_imports_neither_adapter_library_nor_quantizer():
    """Each stands in a module of its own below these packages, imported when it is asked for."""
    for module, path in MODULES.items():
        if not module.startswith(("peftcheck.implementations.", "peftcheck.quantizers.")):
            found = {target.partition(".")[0] for target in imported(path)} & LIBRARIES
            assert not found, f"{module} imports {', '.join(found)}"


def test_oracles_and_budgets_know_nothing_of_implementations():
    for module in MODULES:
        if unit(module) in ("oracle", "budgets"):
            assert not [target for target in IMPORTS[module] if unit(target) in ("implementation", "implementations")]


def test_the_engine_knows_neither_test_runner_nor_terminal():
    for module, path in MODULES.items():
        if unit(module) in ORDER[: ORDER.index("record")]:
            found = {target.partition(".")[0] for target in imported(path)} & {"pytest", "xdist", "click", "rich"}
            assert not found, f"{module} imports {', '.join(found)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_too_long(module):
    lines = [line for line in MODULES[module].read_text().splitlines() if line.strip()]
    assert len(lines) <= LONGEST, f"{module} has {len(lines)} lines that are not blank: divide it"


def test_the_plugin_brings_no_torch_until_a_check_is_collected():
    code = "import sys, peftcheck, peftcheck.plugin; print('torch' in sys.modules, 'peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
