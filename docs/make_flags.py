"""Write docs/flags/: the flags of every script, from the scripts themselves. A test says when a page is out of date.

python docs/make_flags.py
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import parse_options  # noqa: E402
from common.files import atomic_write  # noqa: E402
from model.architecture import field_descriptions  # noqa: E402
from trainer.options import TrainOptions  # noqa: E402

FOLDER = ROOT / "docs" / "flags"
SHARED = "training"  # the page of the flags that all stages have
MODEL = "model"  # the page of the fields of the model


class _Parser(BaseException):
    """Carries a script's parser out of it, before anything is done."""


def _parser_of(parse: Callable[[], object]) -> argparse.ArgumentParser:
    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Parser(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            parse()
        except _Parser as caught:
            return caught.args[0]
    raise AssertionError("the script did not read its flags")


@functools.cache
def actions_of(script: str) -> dict[str, argparse.Action]:
    """Return the flags of a script by name, --help included; "TrainOptions" stands for those of all stages."""
    if script == "TrainOptions":
        parser = _parser_of(lambda: parse_options(TrainOptions, ""))
    else:
        path = ROOT / script
        name = f"flags_of_{path.stem.replace('-', '_')}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where its dataclasses are looked up
        with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
            spec.loader.exec_module(module)
            parser = _parser_of(getattr(module, "parse_args", None) or module.main)
    return {name: action for action in parser._actions for name in action.option_strings}


def scripts() -> list[str]:
    """Return the scripts of the root folder."""
    return sorted(path.name for path in ROOT.glob("*.py"))


def is_stage(script: str) -> bool:
    return "--resume" in actions_of(script)


def pages() -> dict[str, str]:
    """Return the text of every page by its name, without .md."""
    shared = actions_of("TrainOptions")
    fields = [f"--{name}" for name in field_descriptions()]
    found = {
        SHARED: "# Flags of all training stages\n\n"
        "If a stage has another default, its own page says so. On-off flags have a `--no-` form. All values out of "
        "range are reported at once, before any work.\n\n"
        + _table({k: v for k, v in shared.items() if k not in fields}),
        MODEL: "# Flags of the model\n\n"
        "With or without `--preset`, every field can be set. A stage that starts from a checkpoint takes the architecture "
        "from it and rejects other values; only `--max_seq_len` and `--dropout` may differ. The defaults are "
        "those of `minimind-v1-small`.\n\n" + _table({k: shared[k] for k in fields}),
    }
    for script in scripts():
        actions = actions_of(script)
        text = f"# Flags of `{script}`\n\n"
        if is_stage(script):
            shown = {k: (v.default, v.help) for k, v in shared.items()}
            actions = {k: v for k, v in actions.items() if (v.default, v.help) != shown.get(k)}
            text += f"Also those of [all stages]({SHARED}.md), and the fields of the [model]({MODEL}.md).\n\n"
        found[script.removesuffix(".py")] = text + _table(actions)
    return found


def _table(actions: dict[str, argparse.Action]) -> str:
    """Return a table of flags; `--no-` forms and --help are left out."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, action in actions.items():
        if name.startswith("--no-") or name in ("-h", "--help"):
            continue
        meaning, default = _split_default(action.help or "")
        choices = [str(choice) for choice in action.choices or ()]
        if any(choice not in meaning for choice in choices):
            meaning += f"; one of {', '.join(f'`{choice}`' for choice in choices)}"
        cells = (f"`{name}`", default or _default(action), meaning)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _split_default(help: str) -> tuple[str, str]:
    """Return a help text without the default in it, and that default ("" if there is none)."""
    match = re.search(r" ?\(default: ((?:[^()]|\([^()]*\))*)\)", help)
    text = help.replace(match[0], "") if match else help
    default = match[1].replace(f"{ROOT}{os.sep}", "") if match else ""  # the same wherever the project stands
    return text.replace("%%", "%"), default


def _default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value == [] or value is argparse.SUPPRESS:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    values = value if isinstance(value, (list, tuple)) else [value]
    shown = [
        v.relative_to(ROOT).as_posix() if isinstance(v, Path) and v.is_relative_to(ROOT) else str(v) for v in values
    ]
    return f"`{' '.join(shown)}`"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    texts = pages()
    for path in FOLDER.glob("*.md"):
        if path.stem not in texts:
            path.unlink()
    for name, text in texts.items():
        with atomic_write(FOLDER / f"{name}.md") as file:
            file.write(text)
    print(f"{len(texts)} pages in {FOLDER}")


if __name__ == "__main__":
    main()
