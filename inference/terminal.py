"""A conversation on the terminal: questions and commands from the user, answers printed as they come. No torch here."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jsonlines

if TYPE_CHECKING:  # a client of a server does not need torch
    from inference.generator import TokenOutput

HELP = """\
  /clear       forget the conversation
  /save FILE   append it to FILE, as one line of {"messages": [...]}
  /help        this list
  /exit        end (also: Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation; a subclass defines `reply`."""

    def __init__(self, system: str | None, history_turns: int) -> None:
        """
        Args:
            system: text of the system message, which stands before everything.
            history_turns: how many earlier questions, with their answers, are seen.
        """
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict] = []  # user and assistant in turn
        self.history_turns = history_turns
        self.help = HELP

    def reply(self, question: str) -> str:
        """Print the answer as it comes and return it. Raises ValueError, before anything is printed, if there is none."""
        raise NotImplementedError

    def ask(self, question: str) -> bool:
        """Print the answer, and add both to the conversation; or print why there is none. Return whether there is one."""
        try:
            text = self.reply(question)
        except ValueError as error:
            print(f"not answered: {error}", file=sys.stderr, flush=True)
            return False
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        return True

    def run_command(self, command: str, argument: str) -> bool:
        """Do a command that only a subclass has; return whether it was one."""
        return False

    def clear(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def record(self) -> dict:
        """Return the conversation as a row that a training stage reads."""
        return {"messages": [*self.system, *self.turns]}

    def run(self) -> None:
        """Read questions and commands until /exit or the end of the input."""
        print(f"ask something, or:\n{self.help}\n")
        while (line := read_line("> ")) is not None:
            command, _, argument = line.strip().partition(" ")
            if command in ("/exit", "/quit"):
                return
            if command == "/clear":
                self.clear()
                print("conversation cleared")
            elif command == "/save":
                self.save(argument.strip())
            elif self.run_command(command, argument.strip()):
                continue
            elif command.startswith("/") and command[1:].isalpha() and not argument:
                print(self.help if command == "/help" else f"no such command: {command}\n{self.help}")
            elif command:
                self.ask(line)

    def save(self, name: str) -> None:
        """Append the conversation to a file that 3-full_sft.py can train on."""
        if not name or not self.turns:
            print("nothing to save yet" if name else "name a file: /save FILE")
            return
        try:
            with jsonlines.open(Path(name).expanduser(), "a") as writer:
                writer.write(self.record())
        except OSError as error:
            print(f"not saved: {name}: {error.strerror}", file=sys.stderr, flush=True)
        else:
            n = len(self.turns) // 2
            print(f"appended {n} turn{'s' * (n != 1)} to {name}")


# ---- printing answers


def print_answer(outputs: Iterable[TokenOutput], max_new_tokens: int, context: int) -> tuple[str, bool]:
    """Print an answer token by token, then why it was cut off (if it was), its length and speed.

    Returns:
        the text, and whether Ctrl-C stopped it.
    """
    started, received = time.perf_counter(), 0
    finish: str | None = None

    def pieces() -> Iterator[str]:
        nonlocal received, finish
        for output in outputs:
            received, finish = received + 1, output.finish
            yield output.text

    text, stopped = print_pieces(pieces())
    end = " [stopped]" if stopped else ""
    if finish == "length" and received >= max_new_tokens:
        end = f" [cut off: --max_new_tokens {max_new_tokens}]"
    elif finish == "length":
        end = f" [cut off: the context of {context} tokens is full; --max_seq_len gives more]"
    print(f"{end}\n[{received} tokens, {received / (time.perf_counter() - started):.1f} tokens/s]\n", flush=True)
    return text, stopped


def print_pieces(pieces: Iterable[str]) -> tuple[str, bool]:
    """Print pieces of a text as they come; return all of it, and whether Ctrl-C stopped it."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            print(visible(piece), end="", flush=True)
    except KeyboardInterrupt:
        return text, True
    return text, False


def visible(text: str) -> str:
    """Return `text` with control characters as pictures (U+2400...): a model must not control the terminal."""
    return text.translate(_PICTURES)


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 65533)


# ---- the terminal itself


def use_utf8() -> None:
    """Read and write UTF-8, also where the terminal's default encoding cannot print Chinese."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Broken bytes from outside stay recognisable as such, and are refused where text is needed.
        errors = "surrogateescape" if stream is sys.stdin else "backslashreplace"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def read_line(prompt: str) -> str | None:
    """Return a line from the user, with line editing where it is available; None at the end of the input or Ctrl-C."""
    try:
        import readline  # noqa: F401  gives input() its arrow keys; not available on Windows
    except ImportError:
        pass
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return None
