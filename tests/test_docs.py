"""The textbook is up to date: its quotes are the code, both languages say the same, its experiments run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from docs.quotes import QUOTE, quote, update

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXPERIMENTS = sorted(path.stem for path in DOCS.glob("experiments/*.py") if path.stem != "tiny")
CHINESE = sorted(path.name for path in DOCS.glob("zh/*.md"))


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_quotes_are_the_code(path):
    page = path.read_text(encoding="utf-8")
    assert update(page, path.name) == page, "run python docs/quotes.py"
    assert len(QUOTE.findall(page)) == page.count("<!-- quote:") == page.count("<!-- /quote -->")


SOURCE = '''
LIMIT = 3


class A:
    """Text."""

    @property
    def f(self):
        """More
        text."""
        x = 1
        return x
'''


@pytest.mark.parametrize(
    ("name", "limits", "expected"),
    [
        ("LIMIT", [], "LIMIT = 3"),
        ("A.f", [], "@property\ndef f(self):\n    x = 1\n    return x"),
        ("A", ["x =", "return"], "x = 1\nreturn x"),
    ],
)
def test_a_quote(name, limits, expected):
    assert quote(SOURCE, name, limits) == expected


@pytest.mark.parametrize(("name", "limits"), [("B", []), ("A.g", []), ("A.f", ["y =", "return"])])
def test_a_quote_of_what_is_not_there(name, limits):
    with pytest.raises(LookupError):
        quote(SOURCE, name, limits)


def test_every_idea_has_a_page_an_experiment_and_a_picture():
    assert len(EXPERIMENTS) >= 10
    for name in EXPERIMENTS:
        page = text(f"{name}.md")
        assert f"\n    python docs/experiments/{name}.py\n" in page, name
        assert f"](figures/{name}.svg)" in page and (DOCS / "figures" / f"{name}.svg").is_file(), name
        assert QUOTE.search(page) and "$$" in page, name
        assert len(page.splitlines()) <= 150, name
        questions, _, answers = page.split("\n## Questions\n")[1].partition("<summary>Answers</summary>")
        assert re.findall(r"^(\d)\. ", questions, re.MULTILINE) == ["1", "2", "3"], name
        assert re.findall(r"^- \*\*(\d)\.\*\* ", answers, re.MULTILINE) == ["1", "2", "3"], name
        for index, line in (("README.md", f"]({name}.md)"), ("zh/README.md", f"]({name}.md)")):
            assert line in text(index), f"{index}: {name}"


@pytest.mark.parametrize("name", [*CHINESE, *(f"zh/{name}" for name in CHINESE)])
def test_formulas(name):
    """Markdown takes a backslash before punctuation away, and GitHub does it in formulas too; each has its two ends."""
    prose = re.sub(r"`[^`\n]*`", "", without_code(text(name)))
    formulas = re.findall(r"\$\$.*?\$\$|\$[^$]+\$", prose, re.DOTALL)
    assert [formula for formula in formulas if re.search(r"\\[^A-Za-z ]", formula) or "\n\n" in formula] == []
    assert prose.count("$") == sum(formula.count("$") for formula in formulas)


@pytest.mark.parametrize("name", CHINESE)
def test_both_languages_have_the_same(name):
    """Headings by level, quotes, commands, figures, formulas, tables: what a change of only one page would miss."""

    def parts(page: str) -> dict[str, list[str]]:
        prose = without_code(page)
        return {
            "headings": re.findall(r"^(#+) ", prose, re.MULTILINE),
            "quotes": re.findall(r"<!-- quote: .*? -->", page),
            "commands": re.findall(r"(?:python|mkdocs|pip install) [ -_a-~]*\w", prose),
            "answers": re.findall(r"^- \*\*\d\.\*\* ", prose, re.MULTILINE),
            "figures": re.findall(r"figures/[\w.]+", page),
            "formulas": re.findall(r"^\$\$.*\$\$$", prose, re.MULTILINE),
            "rows of tables": ["|"] * len(re.findall(r"^\|", prose, re.MULTILINE)),
            "papers": sorted(re.findall(r"\]\((https?://[^)]+)\)", prose)),
        }

    english, chinese = parts(text(name)), parts(text(f"zh/{name}"))
    assert chinese == english
    assert f"](zh/{name})" in text(name) and f"](../{name})" in text(f"zh/{name}")


def test_every_page_is_translated_and_in_the_site():
    assert {f"{name}.md" for name in EXPERIMENTS} | {"README.md", "questions.md", "troubleshooting.md"} == set(CHINESE)

    def leaves(node) -> list[str]:
        if isinstance(node, dict):
            return [leaf for value in node.values() for leaf in leaves(value)]
        return [leaf for value in node for leaf in leaves(value)] if isinstance(node, list) else [node]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path.parent.name != "flags"]
    assert sorted(listed) == sorted(pages)


def names_in(path: Path) -> set[str]:
    """Return the names that a module has at its top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            found |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


@pytest.mark.parametrize("name", ["tiny", *EXPERIMENTS])
def test_what_an_experiment_imports_is_there(name):
    """They import what they need after their flags were read: a name that has changed would be found only by running."""
    tree = ast.parse((DOCS / "experiments" / f"{name}.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {node: ROOT / f"{str(node.module).replace('.', '/')}.py" for node in imports}
    ours = {node: path for node, path in ours.items() if path.exists()}
    missing = [
        (node.module, alias.name)
        for node, path in ours.items()
        for alias in node.names
        if alias.name not in names_in(path)
    ]
    assert ours and not missing


def test_an_experiment_runs(run_here, tmp_path):
    """The one of the loss: fast, and its first row has to show equal gradients."""
    result = run_here("docs/experiments/loss.py", "--output", tmp_path / "a.svg")
    assert result.returncode in (0, None), result.stderr
    ours, other = re.findall(r"^\| .* \| ([\d.e-]+) \| [\d.]+ \|$", result.stdout, re.MULTILINE)
    assert float(ours) < 1e-5 < 0.01 < float(other)
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").count("<path") > 8
