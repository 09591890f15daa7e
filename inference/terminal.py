"""A chat on the terminal: questions and commands from the user, whoever answers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Protocol

from inference.options import read_line

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
