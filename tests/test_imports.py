"""Imports go one way, from the scripts down to common/; `--help` answers without loading what it does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Bottom up. A package may import the packages below its own line.
LAYERS = [{"common"}, {"model"}, {"data_pipeline", "export"}, {"inference"}, {"evaluation"}, {"trainer", "serving"}]
BELOW = {package: set().union(*LAYERS[:i]) for i, layer in enumerate(LAYERS) for package in layer}
SCRIPT_FILES = sorted(ROOT.glob("*.py"))
ABOVE_ALL = {path.stem for path in SCRIPT_FILES} | {"bench", "tests", "dataset", "docs"}
COMMAND_LINE = {"argparse", "streamlit", "fastapi", "uvicorn", "wandb"}  # nothing for model/ to know
SMALL = {"filelock", "tqdm"}  # all that common/ may import beside the standard library
POSIX_ONLY = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}  # Windows lacks them
HEAVY = {
    *("torch", "transformers", "peft", "deepspeed", "pandas", "pyarrow", "fastapi", "uvicorn", "streamlit"),
    *("matplotlib", "wandb", "tensorboard"),
}


def imports(path: Path, source: str | None = None) -> set[str]:
    """Return the absolute dotted names of all that a file imports, at any place: in functions, for annotations only."""
    package = list(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(source if source is not None else path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> dict[str, Path]:
    """Return the file of every module in a package by its dotted name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = {name: path for package in sorted(BELOW) for name, path in modules(package).items()}


def first_names(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        done.add(name)
        return next((cycle for other in sorted(graph[name]) if (cycle := visit(other, [*trail, name]))), None)

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), None)


def test_these_tests_see_imports_and_cycles():
    assert {"common.cli", "model.model", "data_pipeline.readers", "trainer.parallel.fsdp"} <= FILES.keys()
    here = ROOT / "model" / "x.py"
    assert imports(here, "from .moe import Router") == {"model.moe", "model.moe.Router"}
    assert imports(here, "def f():\n    import a.b as c\n    from . import rope") == {"a.b", "model", "model.rope"}
    assert imports(here, "if TYPE_CHECKING:\n    import a") == {"a"}
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert BELOW["inference"] == {"common", "model", "data_pipeline", "export"}


def test_every_folder_with_code_has_its_layer():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders - {"bench", "docs", "tests"} == set(BELOW)


@pytest.mark.parametrize("name", FILES)
def test_packages_import_only_downwards(name):
    package = name.split(".")[0]
    found = first_names(FILES[name])
    assert not found & ((set(BELOW) - BELOW[package] - {package}) | ABOVE_ALL)
    if package == "common":
        assert found - {"common"} <= set(sys.stdlib_module_names) | SMALL
    if package == "model":
        assert not found & COMMAND_LINE
    assert not found & POSIX_ONLY


@pytest.mark.parametrize("package", sorted(BELOW))
def test_no_module_imports_itself_through_others(package):
    names = modules(package)
    graph = {
        name: {other for other in imports(path) if other in names} - {name, package} for name, path in names.items()
    }
    assert find_cycle(graph) is None


@pytest.mark.parametrize("path", SCRIPT_FILES, ids=lambda path: path.name)
def test_no_script_imports_a_script(path):
    assert not first_names(path) & (ABOVE_ALL - set(sys.stdlib_module_names))
    assert not first_names(path) & POSIX_ONLY


def test_importing_a_module_does_no_work():
    """Nothing at import time but definitions: no statement that calls a project function at module level."""
    for name, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            allowed = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
            if isinstance(node, (ast.For, ast.While, ast.With)) or (isinstance(node, ast.Expr) and not allowed):
                call = ast.unparse(node)
                # Registering the gradient of an operator, or a handler of wrong bytes, is a definition.
                assert ".register_" in call, f"{name}, line {node.lineno}: {call:.80}"


LOADED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
print("LOADED", *{name.split(".")[0] for name in sys.modules})
"""


def loaded_by(*command: str) -> set[str]:
    """Return the top-level names of the modules that a script has loaded when it ends."""
    command = [sys.executable, "-c", LOADED, *command]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("path", SCRIPT_FILES, ids=lambda path: path.name)
def test_help_loads_no_heavy_library(path):
    """So that it answers in less than a second."""
    assert not loaded_by(path.name, "--help") & HEAVY


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.split(".")[0] == "common"] + ["data_pipeline.cleaning"]
)
def test_data_workers_load_no_torch(name, tmp_path):
    """A process of data_process.py imports these."""
    script = tmp_path / "script.py"
    script.write_text(f"import {name}", encoding="utf-8")
    assert not loaded_by(str(script)) & {"torch", "transformers"}
