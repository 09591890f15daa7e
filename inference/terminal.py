"""A conversation on the terminal: questions and commands from the user, answers printed as they come. No torch here."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonlines

from common.text import visible
from model.chat_format import IMAGE, Message
from model.chat_parser import AnswerParser, AnswerPart
from model.tokenizer import IMAGE_TOKEN

if TYPE_CHECKING:  # a client of a server does not need torch
    from inference.generator import TokenOutput

HELP = """\
  /clear       forget the conversation
  /save FILE   append it to FILE, as one line of {"messages": [...]}
  /help        this list
  /exit        end (also: Ctrl-D); Ctrl-C stops an answer"""


MAX_ROUNDS = 8  # of calls before an answer has to come
THOUGHTS_SHOWN = 100  # characters


class Chat:
    """A conversation; a subclass defines `reply`."""

    def __init__(
        self,
        system: str | None,
        history_turns: int,
        tools: Sequence[dict[str, Any]] = (),
        call_tool: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        """
        Args:
            system: text of the system message, which stands before everything.
            history_turns: how many earlier questions, with their answers, are seen.
            tools: functions that the model may call, [{"name", "description", "parameters"}].
            call_tool: runs a call {"name", "arguments"} and returns the text of the response.
        """
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []
        self.history_turns = history_turns
        self.tools, self.call_tool = list(tools), call_tool
        self.help = HELP

    def reply(self, turn: list[Message]) -> Message:
        """Print what the model answers to `turn`, as it comes, and return it. Only a complete answer has `tool_calls`.

        turn: a question; or a question, calls and what the tools returned.

        Raises ValueError, before anything is printed, if there is no answer.
        """
        raise NotImplementedError

    def ask(self, question: str) -> bool:
        """Print the answer, and add both to the conversation; or print why there is none. Return whether there is one."""
        turn: list[Message] = [{"role": "user", "content": question}]
        try:
            for round in range(MAX_ROUNDS + 1):
                answer = self.reply(turn)
                if round == MAX_ROUNDS and answer.pop("tool_calls", None):
                    print(f"[the model keeps calling tools: stopped after {MAX_ROUNDS} rounds]\n")
                turn.append(answer)
                if not answer.get("tool_calls"):
                    break
                turn += [self.run_call(call) for call in answer["tool_calls"]]
        except ValueError as error:
            print(f"not answered: {error}", file=sys.stderr, flush=True)
            return False
        self.turns += turn
        return True

    def run_call(self, call: dict[str, Any]) -> Message:
        """Run a call of the model and print the response; return it as a message."""
        assert self.call_tool is not None
        response = self.call_tool(call)
        print(f"[{visible(call['name'])} returns: {visible(response)}]\n", flush=True)
        return {"role": "tool", "content": response} | ({"tool_call_id": call["id"]} if "id" in call else {})

    def run_command(self, command: str, argument: str) -> bool:
        """Do a command that only a subclass has; return whether it was one."""
        return False

    def clear(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def record(self) -> dict:
        """Return the conversation as a row that a training stage reads."""
        return training_row(self.system, self.turns, self.tools)

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
            path = Path(name).expanduser()
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":
                        file.write(b"\n")  # the last line has no end yet
            with jsonlines.open(path, "a") as writer:
                writer.write(self.record())
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no user of the name in ~NAME
            reason = getattr(error, "strerror", None) or error
            print(f"not saved: {name}: {reason}", file=sys.stderr, flush=True)
        else:
            n = sum(message["role"] == "user" for message in self.turns)
            print(f"appended {n} turn{'s' * (n != 1)} to {name}")


def training_row(
    system: list[Message], turns: list[Message], tools: Sequence[dict[str, Any]], images: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a dialogue as a row that 3-full_sft.py, with images 9-sft_vlm.py, trains on.

    images: data URLs of what stands at every `IMAGE` in the questions.
    """
    row: dict[str, Any] = {"messages": [*system, *turns]} | ({"tools": [*tools]} if tools else {})
    if images:
        row["images"] = [*images]
        row["messages"] = [
            message | {"content": message["content"].replace(IMAGE, IMAGE_TOKEN)}
            if message["role"] == "user"
            else message
            for message in row["messages"]
        ]
    return row


# ---- printing answers


def print_answer(
    outputs: Iterable[TokenOutput], max_new_tokens: int, context: int, parser: AnswerParser | None = None
) -> tuple[Message, bool]:
    """Print an answer token by token, then why it was cut off (if it was), its length and speed.

    parser: takes thinking and calls out of the text; None: the text is no answer in a chat.

    Returns:
        the answer as a message, and whether Ctrl-C stopped it.
    """
    started, received = time.perf_counter(), 0
    finish: str | None = None

    def parts() -> Iterator[AnswerPart]:
        nonlocal received, finish
        for output in outputs:
            received, finish = received + 1, output.finish
            yield from parser.add(output.text) if parser is not None else [("content", output.text)]
        if parser is not None:
            yield from parser.finish()

    message, stopped = print_parts(parts())
    if finish != "stop":
        message.pop("tool_calls", None)  # only a complete answer calls tools
    end = " [stopped]" if stopped else ""
    if finish == "length" and received >= max_new_tokens:
        end = f" [cut off: --max_new_tokens {max_new_tokens}]"
    elif finish == "length":
        end = f" [cut off: the context of {context} tokens is full; --max_seq_len gives more]"
    print(f"{end}\n[{received} tokens, {received / (time.perf_counter() - started):.1f} tokens/s]\n", flush=True)
    return message, stopped


def print_parts(parts: Iterable[AnswerPart]) -> tuple[Message, bool]:
    """Print an answer as its parts come: text as it is, the beginning of the thoughts, and calls.

    Returns:
        the answer as a message, without calls if it was stopped; and whether Ctrl-C stopped it.
    """
    message: Message = {"role": "assistant", "content": ""}
    folded = False

    def fold() -> None:
        nonlocal folded
        if not folded and message.get("reasoning_content"):
            print(f"[thinks: {shortened(message['reasoning_content'])}]", flush=True)
            folded = True

    try:
        for name, new in parts:
            if name == "reasoning_content":
                message[name] = message.get(name, "") + new
                continue
            fold()
            if name == "content":
                message[name] += new
                print(visible(new), end="", flush=True)
            else:
                if message["content"] and name not in message:
                    print()
                message.setdefault(name, []).append(new)
                arguments = json.dumps(new["arguments"], ensure_ascii=False)
                print(visible(f"[calls {new['name']} {arguments}]"), flush=True)
        fold()
    except KeyboardInterrupt:
        message.pop("tool_calls", None)
        return message, True
    return message, False


def shortened(thoughts: str) -> str:
    """Return the beginning of a longer text in one line."""
    line = visible(" ".join(thoughts.split()))
    return line if len(line) <= THOUGHTS_SHOWN else f"{line[:THOUGHTS_SHOWN]} … {len(thoughts)} characters"


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
