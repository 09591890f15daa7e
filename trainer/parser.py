"""The command line of every script: whole names of flags only, and what is wrong with them in one line each."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are for people: no usage of forty lines in front of them."""

    def __init__(self, **options) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.register("type", Path, _path)  # what every flag with type=Path is read by

    def error(self, message: str) -> NoReturn:
        """What argparse found: said in its words, and with the flag that was probably meant."""
        message = message.removeprefix("argument ")
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message and unknown.startswith("-"):
            flag = unknown.split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.refuse([f"{message} (python {sys.argv[0]} --help lists the flags)"])

    def refuse(self, problems: list[str]) -> NoReturn:
        """Exit with all that is wrong at once. Of several processes that were started alike the first one says it."""
        if int(os.environ.get("LOCAL_RANK", "0")):
            time.sleep(5)  # a launcher ends the others when that one ends
            sys.exit(2)
        self.exit(2, "".join(f"error: {problem}\n" for problem in problems))


def _path(text: str) -> Path:
    """A path that was given. An empty one is a shell variable that was not set, and would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def write_problems(flag: str, folder: Path) -> list[str]:
    """Why `folder`, which `flag` says and which need not exist yet, cannot take files; found before any work is done."""
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
