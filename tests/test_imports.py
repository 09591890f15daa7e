"""Imports go one way: scripts -> serving, trainer -> model; inside a package modules stand in layers."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"model": {"model"}, "trainer": {"trainer", "model"}, "serving": {"serving", "model"}}
PACKAGES = [name for name in MAY_IMPORT if (ROOT / name).is_dir()]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} | {"bench", "tests", "dataset"}
USER_INTERFACES = {"argparse", "streamlit", "fastapi", "uvicorn", "gradio", "wandb"}  # nothing for model/ to know


class WithoutTypeChecking(ast.NodeTransformer):
    """Drops the bodies of `if TYPE_CHECKING:`, which never run."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)


def imports(path: Path, source: str | None = None, *, running: bool = False) -> set[str]:
    """Absolute dotted names of everything that a file imports, wherever in it; `running`: not for annotations only."""
    package = list(path.relative_to(ROOT).parent.parts)
    found = set()
    tree = ast.parse(source if source is not None else path.read_text(encoding="utf-8"))
    for node in ast.walk(WithoutTypeChecking().visit(tree) if running else tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module in a package."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = {name: path for package in PACKAGES for name, path in modules(package).items()}


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


def test_there_is_something_to_check():
    assert {"model.model", "model.weights", "data_pipeline.readers"} <= FILES.keys()
    here = ROOT / "model" / "x.py"
    assert imports(here, "from .moe import Gate") == {"model.moe", "model.moe.Gate"}
    assert imports(here, "def f():\n    import a.b as c\n    from . import rope") == {"a.b", "model", "model.rope"}
    typing_only = "if TYPE_CHECKING:\n    import a"
    assert imports(here, typing_only) == {"a"} and imports(here, typing_only, running=True) == set()
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("name", FILES)
def test_packages_import_only_downwards(name):
    package = name.split(".")[0]
    forbidden = (set(MAY_IMPORT) - MAY_IMPORT[package]) | SCRIPTS
    if package == "model":
        forbidden |= USER_INTERFACES
    assert not first_names(FILES[name]) & forbidden


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_through_others(package):
    names = modules(package)
    graph = {
        name: {other for other in imports(path, running=True) if other in names} - {name, package}
        for name, path in names.items()
    }
    assert find_cycle(graph) is None


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_a_script(path):
    assert not first_names(path) & (SCRIPTS - set(sys.stdlib_module_names))


def test_importing_the_model_does_no_work():
    """Nothing at import time but definitions: no statement that calls a project function at module level."""
    for name, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            allowed = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
            if isinstance(node, (ast.For, ast.While, ast.With)) or (isinstance(node, ast.Expr) and not allowed):
                call = ast.unparse(node)
                # Registering the gradient of an operator is a definition.
                assert "register_autograd" in call, f"{name}, line {node.lineno}: {call:.80}"
