"""Every public function says what it does: its docstring begins with a verb, as "Return ..." or "Raise ..."."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "model", "data_pipeline", "export", "inference", "evaluation", "trainer", "serving")
TREES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for name in PACKAGES
    for path in sorted(ROOT.glob(f"{name}/**/*.py"))
}
FORMULAS = {"x", "pixels"}
NO_VERBS = {"A", "An", "The", "This", "What", "How", "Whether", "Who", "Which", "It", "Its", "One", "All", "If", "When"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(node: ast.Module | ast.ClassDef, bases: tuple[str, ...] = ()) -> Iterator[tuple[Function, bool]]:
    """Yield functions and methods with a public name; and whether it belongs to a class that has a base."""
    for child in node.body:
        if isinstance(child, Function) and not child.name.startswith("_"):
            yield child, bool(bases)
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, tuple(ast.unparse(base) for base in child.bases))


def is_plain(function: Function) -> bool:
    """Return whether the name and the one statement of a function say it all."""
    return len(function.body) == 1 and function.end_lineno - function.body[0].lineno <= 1


def test_public_functions_have_docstrings():
    """Except those of one statement, and methods that take the place of a documented one of the base class."""
    missing = [
        f"{path}:{function.lineno} {function.name}"
        for path, tree in TREES.items()
        for function, inherits in public_functions(tree)
        if not (ast.get_docstring(function) or is_plain(function) or inherits)
    ]
    assert missing == []


def test_docstrings_begin_with_a_verb():
    """Or with the formula of a layer, or the shape of an array."""
    openings = {
        f"{path}:{function.lineno} {function.name}": (ast.get_docstring(function) or "Return").split()[0]
        for path, tree in TREES.items()
        for function, _ in public_functions(tree)
    }
    assert len(openings) > 500
    wrong = {
        k: word for k, word in openings.items() if word in NO_VERBS or (word[0].islower() and word not in FORMULAS)
    }
    assert wrong == {}
