"""The command line of every script: a dataclass of flags, and everything that is wrong with them in one line each.

    @dataclass
    class Options:
        data_path: list[Path] = flag([], "files to read", nargs="+")
        epochs: float = flag(1.0, "passes over the data")

        def validate(self) -> list[str]:
            return [] if self.epochs > 0 else [f"--epochs {self.epochs} must be more than 0"]

    options = parse_options(Options, __doc__)

A field is a flag, its default is the flag's default. Only whole names of flags are accepted. Flags that several scripts
share stand in a dataclass of their own: a script inherits from it, or has it as a field (`option_group`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import operator
import os
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError, known_flags, name_flags

_LIMITS = {
    "min": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "max": ("at most", operator.le),
    "below": ("below", operator.lt),
}
FlagSpec = tuple[Any, str]  # (type, help) of a flag that is declared elsewhere


def flag(
    default: Any,
    help: str,
    *,
    group: str = "",
    positional: bool = False,
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
    below: float | None = None,
    **settings: Any,
) -> Any:
    """Return a dataclass field that becomes a flag.

    Args:
        default: a list is copied for every instance.
        help: the default value is added to it, unless it says "(default: ...)" itself.
        group: title under which `--help` shows the flag.
        positional: an argument without a name.
        min, above, max, below: limits of a number; `above` and `below` themselves are not allowed. `parse_options`
            reports values outside. A flag that overrides one of a base class has its limits, unless it sets some.
        settings: for `ArgumentParser.add_argument`.
    """
    limits = {"min": min, "above": above, "max": max, "below": below}
    limits = {name: value for name, value in limits.items() if value is not None}
    metadata = {"help": help, "group": group, "positional": positional, "limits": limits, "settings": settings}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_group(title: str, description: str, flags: Callable[[], dict[str, FlagSpec]]) -> Any:
    """Return a dataclass field that holds a dict of those flags of a group that were given.

    flags: returns name -> (type, help); called only when a command line is parsed.
    """
    metadata = {"title": title, "description": description, "flags": flags}
    return dataclasses.field(default_factory=dict, metadata=metadata)


def as_word(path: Path) -> str:
    """Return a path as it is pasted into a shell, also that of Windows: in quotes if it has spaces."""
    return f'"{path}"' if " " in str(path) else str(path)


def option_group(options: Callable[..., Any], title: str, **defaults: Any) -> Any:
    """Return a dataclass field that holds an instance of another dataclass, whose fields become flags under `title`.

    defaults: replace defaults of that dataclass, for this script only.
    """
    metadata = {"options": options, "title": title, "defaults": defaults}
    return dataclasses.field(default_factory=lambda: options(**defaults), metadata=metadata)


def range_errors(options: Any, values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `values` (name -> value), by the limits of the flags of a dataclass: a line for each."""
    found = []
    for name, value in values.items():
        declared = _declarations(options if isinstance(options, type) else type(options), name)
        limits: dict[str, float] = next(filter(None, (metadata.get("limits") for metadata in declared)), {})
        if not limits or not isinstance(value, (int, float)):
            continue
        if math.isfinite(value) and all(_LIMITS[kind][1](value, limit) for kind, limit in limits.items()):
            continue
        if "min" in limits and "max" in limits:
            wanted = f"between {limits['min']} and {limits['max']}"
        else:
            wanted = " and ".join(f"{_LIMITS[kind][0]} {x}" for kind, x in limits.items() if math.isfinite(x))
        found.append(f"--{name} {value} must be {wanted or 'a finite number'}")
    return found


def _declarations(options: type, name: str) -> list[Mapping[str, Any]]:
    """Return how a field is declared: by the class itself, by its base class, ..."""
    classes = (cls for cls in options.__mro__ if dataclasses.is_dataclass(cls))
    fields = (cls.__dataclass_fields__.get(name) for cls in classes)
    return [field.metadata for field in fields if field is not None and field.metadata]


Options = typing.TypeVar("Options")


def parse_options(
    options: type[Options],
    description: str | None,
    argv: list[str] | None = None,
    *,
    parser_class: type[Parser] | None = None,
) -> Options:
    """Read the command line into a dataclass of flags; exit with all that is wrong at once.

    A class with a method `stored_flags(given, typed)` may return values that replace defaults, as JSON has them: those of
    the run that is continued. `typed`: names of the flags that the user gave.

    A class that wants another default for a flag of its base overrides the field: `epochs: float = 3.0`. One that does not
    want the flag overrides it with `dataclasses.field(init=False, default=...)`.

    Args:
        description: of the script, for `--help`; usually its docstring.
        argv: the command line; None: that of the process.
        parser_class: a `Parser` that reports errors in another way.
    """
    parser = (parser_class or Parser)(description=description)
    _add_flags(parser, parser, options, {})
    given = vars(parser.parse_args(argv))
    if (stored_flags := getattr(options, "stored_flags", None)) is not None:
        untouched = argparse.Namespace(**dict.fromkeys(given, argparse.SUPPRESS))  # a value that no flag has
        typed = {name for name, value in vars(parser.parse_args(argv, untouched)).items() if value != argparse.SUPPRESS}
        stored = stored_flags(given, typed)
        hints = typing.get_type_hints(options)
        for name in stored.keys() & given.keys() - typed:
            given[name] = _from_json(hints.get(name), stored[name])
    errors: list[str] = []
    try:
        result = _build(options, given, errors)
        errors += result.validate() if hasattr(result, "validate") else []
    except UserError as error:  # from a dataclass that checks itself
        errors.append(str(error))
    if errors:
        parser.error(errors)
    return result


def _add_flags(parser: Parser, target: Any, options: Any, defaults: dict[str, Any]) -> None:
    """Add the flags of a dataclass to `target`, the parser or one of its groups; those with a group of their own to that."""
    hints, groups = typing.get_type_hints(options), {"": target}
    for field in dataclasses.fields(options):
        metadata = next(iter(_declarations(options, field.name) if field.init else ()), {})
        if "help" in metadata:
            title = metadata["group"]
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            default = defaults.get(field.name, _default(field))
            name = field.name if metadata["positional"] else f"--{field.name}"
            _add(groups[title], name, hints[field.name], default, metadata["help"], metadata["settings"])
        elif "flags" in metadata:
            group = parser.add_argument_group(metadata["title"], metadata["description"])
            for name, (kind, help) in metadata["flags"]().items():
                _add(group, f"--{name}", kind, None, help, {})
        elif "options" in metadata:
            inner = parser.add_argument_group(metadata["title"])
            _add_flags(parser, inner, metadata["options"], metadata["defaults"])


def _build(options: Any, given: dict[str, Any], errors: list[str]) -> Any:
    """Return an instance of `options` from the values of its flags, which are taken out of `given`.

    A value outside its limits is reported in `errors` and replaced by the default, so that the other checks can run.
    """
    values = {}
    for field in dataclasses.fields(options):
        if "options" in field.metadata:
            values[field.name] = _build(field.metadata["options"], given, errors)
        elif "flags" in field.metadata:
            group = {name: given.pop(name) for name in field.metadata["flags"]()}
            values[field.name] = {name: value for name, value in group.items() if value is not None}
        elif field.name in given:
            values[field.name] = given.pop(field.name)
            if wrong := range_errors(options, {field.name: values[field.name]}):
                errors += wrong
                values[field.name] = _default(field)
    return options(**values)


def _add(parser: Any, name: str, kind: Any, default: Any, help: str, settings: dict) -> None:
    kind = _inner(kind)
    if kind is bool:
        settings = {"action": argparse.BooleanOptionalAction} | settings
    elif "action" not in settings:
        settings = {"type": kind} | settings
    shown = default is not None and kind is not bool and default != [] and default != ()
    if shown and "(default" not in help:
        help += f" (default: {default})"
    default = list(default) if isinstance(default, tuple) else default  # what action="append" adds to
    parser.add_argument(name, default=default, help=help.replace("%", "%%"), **settings)


def _inner(kind: Any) -> Any:
    """`int | None` -> int, `list[Path]` -> Path."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) in (list, tuple) else kind


def _from_json(kind: Any, value: Any) -> Any:
    """Return a value of a flag that was written as JSON, where a path is text."""
    if _inner(kind) is not Path or value is None:
        return value
    return [Path(item) for item in value] if isinstance(value, list) else Path(value)


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
        with tempfile.TemporaryFile(dir=nearest):  # permissions are not enough: a disk may be read-only
            return []
    except OSError as error:
        return [f"{flag} {folder}: nothing can be written in {nearest} ({error.strerror}); choose another"]
