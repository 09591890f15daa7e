"""Write the code that the pages of docs/ quote from the files into them, so that a quote cannot go out of date.

    python docs/quotes.py            # write all quotes again
    python docs/quotes.py --check    # exit with 1 if a page has a quote that is out of date

A quote is a block between two comments. The first says from where: a file, a function or class in it (a dot before a
method), and, for a part of it, the beginnings of its first and last line:

    <!-- quote: trainer/optim.py gradient_norm -->
    <!-- quote: model/rope.py rope_tables "pair = torch.arange" "return angles.cos()" -->
    <!-- /quote -->

The docstring is left out. A line that stands more than once means the first one at or after the beginning.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import UserError, run_script  # noqa: E402
from common.files import atomic_write  # noqa: E402

QUOTE = re.compile(r"<!-- quote: (.*?) -->\n(.*?)<!-- /quote -->", re.DOTALL)


@dataclass
class Options:
    check: bool = flag(False, "change nothing; exit with 1 if a quote is out of date", action="store_true")


def pages() -> list[Path]:
    """Return the pages of docs/, in all languages."""
    return sorted((ROOT / "docs").rglob("*.md"))


def update(text: str, page: str) -> str:
    """Return a page with all of its quotes written again. Raise UserError for one whose code is not there."""

    def written(match: re.Match) -> str:
        file, name, *limits = shlex.split(match[1])
        try:
            code = quote((ROOT / file).read_text(encoding="utf-8"), name, limits)
        except (OSError, LookupError) as error:
            raise UserError(f"{page}: quote: {match[1]}: {error}") from None
        return f"<!-- quote: {match[1]} -->\n```python\n# {file}: {name}\n{code}\n```\n<!-- /quote -->"

    return QUOTE.sub(written, text)


def quote(source: str, name: str, limits: list[str]) -> str:
    """Return the code of a function, class or constant without its docstring, or a part of it, not indented.

    Args:
        name: `function`, `Class`, `Class.method` or `CONSTANT`.
        limits: none, or how the first and the last line of the part begin.
    """
    found: ast.AST = ast.parse(source)
    for part in name.split("."):
        found = next((node for node in ast.iter_child_nodes(found) if part in _names(node)), None) or _missing(part)
    lines = source.splitlines()
    first = min([found.lineno, *(one.lineno for one in getattr(found, "decorator_list", []))]) - 1
    docstring = _docstring_lines(found, lines)
    kept = [lines[i] for i in range(first, found.end_lineno) if i not in docstring]
    if limits:
        begin = _find(kept, limits[0], 0)
        kept = kept[begin : _find(kept, limits[1], begin) + 1]
    return textwrap.dedent("\n".join(kept)).strip("\n")


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", "")]


def _missing(name: str) -> ast.AST:
    raise LookupError(f"there is no {name}")


def _docstring_lines(node: ast.AST, lines: list[str]) -> range:
    """Return the indices of the lines of a docstring, and of the blank line after it."""
    body = getattr(node, "body", [])
    if not body or not isinstance(body[0], ast.Expr) or not isinstance(body[0].value, ast.Constant):
        return range(0)
    end = body[0].end_lineno
    return range(body[0].lineno - 1, end + (not "".join(lines[end : end + 1]).strip()))


def _find(lines: list[str], start: str, first: int) -> int:
    for i in range(first, len(lines)):
        if lines[i].strip().startswith(start):
            return i
    raise LookupError(f"no line begins with {start!r}")


def main() -> None:
    options = parse_options(Options, __doc__)
    outdated, errors = [], []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        try:
            new = update(text, str(path.relative_to(ROOT)))
        except UserError as error:
            errors.append(str(error))
            continue
        if new != text:
            outdated.append(str(path.relative_to(ROOT)))
            if not options.check:
                with atomic_write(path) as file:
                    file.write(new)
    if options.check and outdated:
        errors.append(f"quotes are out of date in {', '.join(outdated)}: python docs/quotes.py")
    if errors:
        raise UserError("\n".join(errors))
    print(f"wrote {', '.join(outdated)}" if outdated else "all quotes are up to date")


if __name__ == "__main__":
    run_script(main)
