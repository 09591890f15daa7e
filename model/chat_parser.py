"""Read a generated answer: split its text into thinking, content and tool calls. The inverse of `chat_format`.

    thinking, content, calls = parse_answer('<think>A sum.</think><tool_call>{"name": "add", "arguments": {}}</tool_call>')

`AnswerParser` does the same piece by piece, for an answer that is shown while it is written. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from model.tokenizer import check_unicode

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
# A piece of an answer: a field of a message, and what is new in it: a text, or one whole call.
AnswerPart = tuple[str, Any]


class ParsedAnswer(NamedTuple):
    """An answer in the fields of a message.

    thinking: the text between <think> and </think>, or up to the end where the answer was cut; None: it did not think.
    content: all other text. A call that is malformed or cut is a part of it, with its tags.
    calls: [{"name": …, "arguments": {…}}].
    """

    thinking: str | None
    content: str
    calls: list[dict[str, Any]]

    @property
    def malformed(self) -> bool:
        """Return whether a call could not be read."""
        return TOOL_CALL in self.content or END_TOOL_CALL in self.content

    def message(self) -> dict[str, Any]:
        """Return the answer as a message for `chat_format`."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thinking is not None:
            message["reasoning_content"] = self.thinking
        return message | ({"tool_calls": self.calls} if self.calls else {})


def parse_answer(text: str, *, calls: bool = True, unfinished: bool = False) -> ParsedAnswer:
    """Return the thinking, the content and the calls of an answer. Whatever the model wrote, this is no error.

    Args:
        calls: as for `AnswerParser`.
        unfinished: more will follow: leave out what may become a tag or a call.
    """
    parser = AnswerParser(calls=calls)
    thoughts: str | None = None
    content: str = ""
    found = []
    for field, new in [*parser.add(text), *([] if unfinished else parser.finish())]:
        if field == "reasoning_content":
            thoughts = (thoughts or "") + new
        elif field == "content":
            content += new
        else:
            found.append(new)
    return ParsedAnswer(thoughts, content, found)


class AnswerParser:
    """Split an answer as its text comes. A tag may come in pieces: what could be the beginning of one waits.

    A call is read when it is complete, because only then is it certain that it is one. A tag inside a JSON string is text.
    White space before the thinking, between calls and after them is dropped; other text in these places is content.
    """

    def __init__(self, *, thinking: bool = False, calls: bool = True) -> None:
        """
        Args:
            thinking: the prompt ends in <think>, so that the answer begins with its thoughts.
            calls: False: no tools were offered, and what looks like a call is content.
        """
        self._text = ""  # not yet read
        self._calls = calls
        self._inside = THINK if thinking else None  # the tag that is open; "": none, and the thinking is over
        self._after_call = False

    @property
    def thinking(self) -> bool:
        """Return whether the text so far ends within the thoughts."""
        return self._inside == THINK

    def add(self, text: str) -> list[AnswerPart]:
        """Return what is certain now as pairs of a field and what is new in it: a text (perhaps empty), or a whole call."""
        self._text += text
        return [*self._parse(final=False)]

    def finish(self) -> list[AnswerPart]:
        """Return the rest, after the last text."""
        return [*self._parse(final=True)]

    def _parse(self, final: bool) -> Iterator[AnswerPart]:
        while True:
            if self._inside is None:  # at the start
                rest = self._text.lstrip()
                if rest.startswith(THINK):
                    self._inside, self._text = THINK, rest[len(THINK) :]
                    yield "reasoning_content", ""
                elif THINK.startswith(rest) and not final:
                    return
                else:
                    self._inside = ""
            elif self._inside == THINK:
                new, closed = self._until(END_THINK, final)
                if new:
                    yield "reasoning_content", new
                if not closed:
                    return
                self._inside = ""
            elif self._inside == TOOL_CALL:
                call, end = self._read_call(final)
                if end is None:
                    return
                self._inside, self._text = "", self._text[end:]
                self._after_call = call is not None
                yield ("content", TOOL_CALL) if call is None else ("tool_calls", call)
            elif not self._calls:
                new, self._text = self._text, ""
                if new:
                    yield "content", new
                return
            else:
                new, opened = self._until(TOOL_CALL, final)
                if self._after_call and not new.strip():
                    if not (opened or final):
                        self._text = new + self._text  # white space: it depends on what follows
                    new = ""
                if new:
                    self._after_call = False
                    yield "content", new
                if not opened:
                    return
                self._inside = TOOL_CALL

    def _until(self, tag: str, final: bool) -> tuple[str, bool]:
        """Take the text up to a tag and the tag; without one, what cannot be the beginning of it. Return whether it came."""
        new, found, rest = self._text.partition(tag)
        if not found and not final:
            sizes = range(min(len(tag) - 1, len(new)), 0, -1)
            held = next((size for size in sizes if new.endswith(tag[:size])), 0)
            new, rest = new[: len(new) - held], new[len(new) - held :]
        self._text = rest
        return new, bool(found)

    def _read_call(self, final: bool) -> tuple[dict[str, Any] | None, int | None]:
        """Return the call at the start of the text and its end; (None, 0): malformed; (None, None): perhaps unfinished."""
        start = self._text.find(END_TOOL_CALL)
        while start >= 0:
            body = self._text[:start]
            call = parse_call(body)
            if call is not None:
                return call, start + len(END_TOOL_CALL)
            if re.sub(r"\\.", "", body, flags=re.DOTALL).count('"') % 2 == 0:
                return None, 0
            start = self._text.find(END_TOOL_CALL, start + 1)  # that one was inside a string
        return None, (0 if final else None)


def parse_call(text: str) -> dict[str, Any] | None:
    """Return a call `{"name": …, "arguments": {…}}` that is written as JSON; None if it is malformed."""
    try:
        call = json.loads(text, parse_constant=_refuse)
        check_unicode(json.dumps(call, ensure_ascii=False, allow_nan=False), "")  # half of a surrogate pair, 1e999
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not call.get("name") or not isinstance(call["name"], str):
        return None
    arguments = call.get("arguments")
    return {"name": call["name"], "arguments": arguments} if isinstance(arguments, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
