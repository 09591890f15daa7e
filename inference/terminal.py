"""A chat on the terminal: questions and commands from the user, whoever answers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Protocol

HELP = """\
  /clear       forget the conversation
  /save FILE   append it to FILE, as one line of {"messages": [...]}
  /help        this list
  /exit        end (also: Ctrl-D); Ctrl-C stops an answer"""


class Chat(Protocol):
    system: list[dict]  # the system message, if there is one
    turns: list[dict]  # user and assistant in turn

    def answer(self, question: str) -> None:
        """Print the answer as it comes; both become part of the turns. ValueError, and nothing changes, if it cannot."""


def interact(chat: Chat) -> None:
    """Read questions and commands until /exit or the end of the input."""
    print(f"ask something, or:\n{HELP}\n")
    while (line := read_line("> ")) is not None:
        command, _, argument = line.strip().partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/clear":
            chat.turns.clear()
            print("forgotten")
        elif command == "/save":
            save(chat, argument.strip())
        elif command.startswith("/") and command[1:].isalpha() and not argument:
            print(HELP if command == "/help" else f"no such command: {command}\n{HELP}")
        elif command:
            try:
                chat.answer(line)
            except ValueError as error:
                print(f"not answered: {error}", file=sys.stderr, flush=True)


def save(chat: Chat, name: str) -> None:
    """Append the conversation to a file that 3-full_sft.py can train on."""
    if not name or not chat.turns:
        print("nothing to save yet" if name else "name a file: /save FILE")
        return
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": [*chat.system, *chat.turns]}, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"not saved: {name}: {error.strerror}", file=sys.stderr, flush=True)
    else:
        n = len(chat.turns) // 2
        print(f"appended {n} turn{'s' * (n != 1)} to {name}")


def use_utf8() -> None:
    """Read and write UTF-8 whatever the terminal's settings: the default elsewhere cannot print Chinese."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Broken bytes from outside stay recognisable as such, and are refused where text is needed.
        stream.reconfigure(encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else "backslashreplace")


def read_line(prompt: str) -> str | None:
    """A line from the user, with line editing where there is any; None at the end of the input or Ctrl-C."""
    try:
        import readline  # noqa: F401  gives input() its arrow keys; not there on Windows
    except ImportError:
        pass
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def visible(text: str) -> str:
    """`text` with control characters as pictures (U+2400...): a model must not steer the terminal."""
    return text.translate(_PICTURES)


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 65533)
