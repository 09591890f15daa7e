"""The command line of every script: a dataclass of flags, and everything that is wrong with them in one line each.

    @dataclass
    class Options:
        data_path: list[Path] = flag([], "files to read", nargs="+")
        epochs: float = flag(1.0, "passes over the data")

        def validate(self) -> list[str]:
            return [] if self.epochs > 0 else [f"--epochs {self.epochs} must be more than 0"]

    options = parse_options(Options, __doc__)

A field is a flag, its default is the flag's default. Only whole names of flags are accepted.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from common.errors import known_flags, name_flags

FlagSpec = tuple[Any, str]  # (type, help) of a flag that is declared elsewhere


def flag(default: Any, help: str, *, group: str = "", positional: bool = False, **settings: Any) -> Any:
    """Return a dataclass field that becomes a flag.

    Args:
        default: a list is copied for every instance.
        help: the default value is added to it, unless it says "(default: ...)" itself.
        group: title under which `--help` shows the flag.
        positional: an argument without a name.
        settings: for `ArgumentParser.add_argument`.
    """
    metadata = {"help": help, "group": group, "positional": positional, "settings": settings}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_group(title: str, description: str, flags: Callable[[], dict[str, FlagSpec]]) -> Any:
    """Return a dataclass field that holds a dict of those flags of a group that were given.

    flags: returns name -> (type, help); called only when a command line is parsed.
    """
    metadata = {"title": title, "description": description, "flags": flags}
    return dataclasses.field(default_factory=dict, metadata=metadata)


Options = typing.TypeVar("Options")


def parse_options(
    options: type[Options], description: str | None, argv: list[str] | None = None, **defaults: Any
) -> Options:
    """Read the command line into a dataclass of flags; exit with all that is wrong at once.

    A class that does not want a flag of its base overrides the field with `dataclasses.field(init=False, default=...)`.

    Args:
        description: of the script, for `--help`; usually its docstring.
        argv: the command line; None: that of the process.
        defaults: replace defaults of the fields.
    """
    parser = Parser(description=description)
    hints = typing.get_type_hints(options)
    groups: dict[str, Any] = {"": parser}
    members: dict[str, list[str]] = {}  # field of a group -> its flags
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        metadata = field.metadata
        if "help" in metadata:
            title = metadata["group"]
            target = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
            default = defaults.get(field.name, _default(field))
            name = field.name if metadata["positional"] else f"--{field.name}"
            _add(target, name, hints[field.name], default, metadata["help"], metadata["settings"])
        elif "flags" in metadata:
            group = parser.add_argument_group(metadata["title"], metadata["description"])
            flags = metadata["flags"]()
            members[field.name] = list(flags)
            for name, (kind, help) in flags.items():
                _add(group, f"--{name}", kind, None, help, {})
    given = vars(parser.parse_args(argv))
    for field_name, names in members.items():
        values = {name: given.pop(name) for name in names}
        given[field_name] = {name: value for name, value in values.items() if value is not None}
    result = options(**given)
    if errors := result.validate():  # type: ignore[attr-defined]
        parser.error(errors)
    return result


def _add(parser: Any, name: str, kind: Any, default: Any, help: str, settings: dict) -> None:
    kind = _inner(kind)
    if kind is bool:
        settings = {"action": argparse.BooleanOptionalAction} | settings
    elif "action" not in settings:
        settings = {"type": kind} | settings
    shown = default is not None and kind is not bool and default != [] and default != ()
    if shown and "(default" not in help:
        help += f" (default: {default})"
    parser.add_argument(name, default=default, help=help.replace("%", "%%"), **settings)


def _inner(kind: Any) -> Any:
    """`int | None` -> int, `list[Path]` -> Path."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) in (list, tuple) else kind


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are short: no usage of forty lines in front of them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self.register("type", Path, _path)  # reads every flag of type Path

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        known_flags.update(name.removeprefix("--") for name in self._option_string_actions)
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str | list[str]) -> NoReturn:
        """Exit with argparse's own message, or with all errors that a script found.

        Of several processes that were started alike only the first one prints them.
        """
        if isinstance(message, str):
            message = message.removeprefix("argument ")
            unknown = message.removeprefix("unrecognized arguments: ")
            if unknown != message and unknown.startswith("-"):
                name = unknown.split()[0].split("=")[0]
                near = difflib.get_close_matches(name, self._option_string_actions, 1)
                message += f"; did you mean {near[0]}?" if near else ""
            message = [f"{message} (python {sys.argv[0]} --help lists the flags)"]
        if int(os.environ.get("LOCAL_RANK", "0")):
            time.sleep(5)  # the launcher stops the other processes when the first one exits
            sys.exit(2)
        self.exit(2, "".join(f"error: {name_flags(line)}\n" for line in message))


def _path(text: str) -> Path:
    """Read a path. An empty one is a shell variable that was not set, and would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def validate_folder(flag: str, folder: Path) -> list[str]:
    """Return why `folder`, the value of `flag`, cannot take files: found before any work. It need not exist yet."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long
        return [f"{flag} {folder}: {error.strerror}; choose another"]
    if not nearest.is_dir():
        return [f"{flag} {folder}: {nearest} is not a folder; choose another"]
    try:
        with tempfile.TemporaryFile(dir=nearest):  # permissions do not tell all: a disk may be read-only
            return []
    except OSError as error:
        return [f"{flag} {folder}: nothing can be written in {nearest} ({error.strerror}); choose another"]
