"""Read dialogues and preference pairs of every format users have into messages; tokenize_chats.py makes tokens of them.

    parse_conversation({"q": "hi", "a": "hello"})   # [{"role": "user", "content": "hi"}, {"role": "assistant", ...}]

A chat is a row of `history,q,a` (or another pair of names, see QUESTION_ANSWER), {"messages": [{"role","content"}]},
{"conversations": [{"from","value"}]} or {"instruction","input","output","history"}; a pair has a prompt, `chosen` and
`rejected`. Roles are read, never guessed from the place: a row in which they are unknown or out of order is reported with
its line, and nothing is trained on it.

Texts are left as they are, to the last blank.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from data_pipeline.readers import columns, field_names, file_format, iter_records
from data_pipeline.text_files import BadLine
from model.chat_format import Message, check_messages

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
QUESTION_ANSWER = (("q", "a"), ("question", "answer"), ("prompt", "response"), ("prompt", "completion"))
# A CSV or Parquet file needs all columns of one of these.
CHAT_COLUMNS = (*QUESTION_ANSWER, ("instruction", "output"), ("input", "output"), ("messages",), ("conversations",))
PREFERENCE_COLUMNS = (("chosen", "rejected"),)
_IS_PREFERENCE = "preference pairs (chosen, rejected) are for 5-dpo_train.py"
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Malformed(UserError):
    """A row with wrong fields or roles. The text says what is wrong, for the list of bad lines."""


class WrongStage(Malformed):
    """A row that could be read as a dialogue, but whose other fields say that this is not what is to be learned."""


@dataclass(frozen=True)
class Preference:
    """Two different answers to one prompt: an optional system message, then user and assistant in turn, the user last."""

    line: int
    prompt_messages: list[Message]
    chosen: str
    rejected: str


def iter_preferences(path: Path, on_bad: Callable[[BadLine], None]) -> Iterator[Preference]:
    """Yield the preference pairs of `path` in constant memory; rows that are not a valid pair go to `on_bad`.

    Raises UserError for a file that is missing, empty, of an unknown format or without the columns of a pair.
    """
    check_columns(path, PREFERENCE_COLUMNS)
    for record in iter_records(path, on_bad):
        try:
            yield Preference(record.line, *parse_preference(record.data))
        except UserError as reason:
            on_bad(BadLine(record.line, str(reason)))


def parse_conversation(data: dict) -> list[Message]:
    """Return the messages of a row, ready to be rendered; raise UserError if they are not a valid chat to learn from."""
    check_stage(data)
    messages = read_messages(data)
    for message in messages:
        if not message["content"].strip():
            raise Malformed(f"an empty {message['role']} message")
    check_messages(messages, answered=True)
    return messages


def parse_preference(data: dict) -> tuple[list[Message], str, str]:
    """Return (prompt, chosen, rejected) of a row; raise UserError if it is not a valid pair.

    The prompt is `conversations`, `messages`, `prompt` (a text or messages) or `instruction` + `input`; the answers are
    texts, messages, or whole dialogues that repeat the prompt.
    """
    _check_text_only(data)
    chosen_prompt, chosen = _answer(data, "chosen")
    rejected_prompt, rejected = _answer(data, "rejected")
    prompt = next((data[name] for name in ("conversations", "messages", "prompt") if data.get(name)), None)
    if prompt is not None and prompt is data.get("prompt") and not _is_dialogue(prompt):
        messages = [_user(_text(data, "prompt"))]
    elif prompt is not None:
        messages = _dialogue(prompt)
    elif instruction := _instruction(data):
        messages = [*_history(data.get("history")), _user(instruction)]
    else:
        messages = chosen_prompt
    messages = _with_system(data, messages)
    for given in (chosen_prompt, rejected_prompt):
        if given and _stripped(given) != _stripped(messages):
            raise Malformed("the answers repeat another prompt than the row's")
    check_messages(messages, answered=False)
    if not messages[-1]["content"].strip():
        raise Malformed("the prompt is empty")
    if chosen.strip() == rejected.strip():
        raise Malformed("chosen and rejected are the same")
    return messages, chosen, rejected


def read_messages(data: dict) -> list[Message]:
    """Return the messages of a row as they are: their order is unchecked, and the last q and a may be empty."""
    dialogue = data.get("messages") or data.get("conversations")
    if dialogue:
        return _with_system(data, _dialogue(dialogue))
    if names := next((names for names in QUESTION_ANSWER if data.keys() >= set(names)), None):
        question, answer = (_text(data, name) for name in names)
    elif "output" in data:
        question, answer = _instruction(data), _text(data, "output")
    else:
        raise Malformed(f"no question and answer; the fields are {field_names(data)}")
    turns = [*_history(data.get("history")), _user(question), {"role": "assistant", "content": answer}]
    return _with_system(data, turns)


def check_stage(data: dict) -> None:
    """Raise WrongStage if the answers of a row are not what a model should learn to say."""
    if data.get("chosen") and data.get("rejected"):
        raise WrongStage(_IS_PREFERENCE)
    if name := next((name for name in ("label", "kto_tag") if str(data.get(name)).lower() in ("false", "0")), None):
        raise WrongStage(f"{name} is false: an example of what not to answer (KTO)")
    _check_text_only(data)


def _check_text_only(data: dict) -> None:
    if name := next((name for name in _MEDIA if data.get(name) and data[name] != "[]"), None):
        raise WrongStage(
            f"it has {name}, and a model of text would learn the text that stands for them: see 9-sft_vlm.py"
        )


def text_of(data: dict, name: str, required: bool = False) -> str:
    """Return the stripped text under `name`; "" for null, and for a missing field that is not required."""
    return _text(data, name, required).strip()


def check_columns(path: Path, needed: tuple[tuple[str, ...], ...]) -> None:
    """Raise UserError if `path` has a header with none of the `needed` sets of columns; plain text has only `text`."""
    sets = " or ".join(",".join(names) for names in needed)
    if file_format(path) == ".txt" and ("text",) not in needed:
        raise UserError(f"{path}: plain text has no fields, but {sets} is needed; use .jsonl, .csv or .parquet")
    found = columns(path)
    if found is not None and not any(set(names) <= set(found) for names in needed):
        advice = (
            _IS_PREFERENCE
            if set(*PREFERENCE_COLUMNS) <= set(found)
            else "name a file that has them, or rename its columns"
        )
        raise UserError(f"{path}: needs the columns {sets}, but this file has {', '.join(found)}; {advice}")


# --- fields ----------------------------------------------------------------------------------------------------------


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _with_system(data: dict, messages: list[Message]) -> list[Message]:
    """Return the messages, after the row's own `system` field if it has one."""
    system = _text(data, "system")
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def _stripped(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _is_dialogue(prompt: object) -> bool:
    """Return whether a prompt holds messages; in a CSV they are written as text, and "[1, 2]: what is it?" is just text."""
    if not isinstance(prompt, str):
        return True
    with contextlib.suppress(Malformed):
        value = parse_list(prompt, "prompt") if prompt.lstrip().startswith("[") else None
        return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    return False


def _history(value: object) -> list[Message]:
    history = parse_list(value, "history") or []
    messages = []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise Malformed("the history is not a list of [question, answer] pairs")
        if not all(text.strip() for text in turn):
            raise Malformed("an empty turn in the history")
        _check_text("".join(turn), "history")
        messages += [_user(turn[0]), {"role": "assistant", "content": turn[1]}]
    return messages


def _dialogue(value: object) -> list[Message]:
    """Return messages with the roles of this project; an empty system message is left out.

    value: [{"role","content"}] or [{"from","value"}].
    """
    value = parse_list(value, "dialogue")
    if not isinstance(value, list) or not value:
        raise Malformed("the dialogue is not a list of messages")
    messages = [_message(message) for message in value]
    for i, message in enumerate(messages):
        if not message["content"].strip() and (message["role"] != "system" or i > 0):
            raise Malformed(f"an empty {message['role']} message")
    return messages if messages[0]["content"].strip() else messages[1:]


def _message(message: object) -> Message:
    if not isinstance(message, dict):
        raise Malformed("a message is not an object with a role and a text")
    role, content = ("role", "content") if "role" in message else ("from", "value")
    name = message.get(role)
    if not isinstance(name, str) or name not in ROLES:
        raise Malformed(f"unknown role {name!r:.80}; known are {', '.join(ROLES)}")
    parts = message.get(content)
    if isinstance(parts, list) and all(isinstance(part, dict) for part in parts):  # as OpenAI's API has them
        if other := next((part.get("type") for part in parts if part.get("type") != "text"), None):
            raise WrongStage(f"a message has a part of type {other}, and a model of text cannot read it")
        message = {content: "".join(_text(part, "text", required=True) for part in parts)}
    return {"role": ROLES[name], "content": _text(message, content, required=True)}


def _answer(data: dict, name: str) -> tuple[list[Message], str]:
    """Return the prompt that the answer under `name` repeats, if it does, and the answer."""
    value = data.get(name)
    if isinstance(value, str) and _is_dialogue(value):
        value = parse_list(value, name)
    if isinstance(value, list) and value:
        *prompt, last = _dialogue(value) or [_user("")]
    elif isinstance(value, dict):
        prompt, last = [], _message(value)
    else:
        prompt, last = [], {"role": "assistant", "content": _text(data, name, required=True)}
    if last["role"] != "assistant":
        raise Malformed(f"{name} is a {last['role']} message, not an assistant's")
    if not last["content"].strip():
        raise Malformed(f"{name} is empty")
    return prompt, last["content"]


def _instruction(data: dict) -> str:
    return "\n".join(part for part in (text_of(data, "instruction"), text_of(data, "input")) if part)


def _text(data: dict, name: str, required: bool = False) -> str:
    if required and name not in data:
        raise Malformed(f"no {name}; the fields are {field_names(data)}")
    value = data.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"{name} is not a text but {type(value).__name__}")
    _check_text(value, name)
    return value


def _check_text(text: str, name: str) -> None:
    if "\0" in text:
        raise Malformed(f"a NUL character in {name}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # the reader looks at its rows, but a text may hold JSON with escapes of its own
        raise Malformed(f"half of a surrogate pair in {name}, which is not a character") from None


def parse_list(value: object, name: str) -> object:
    """Return a list, given as it is, as JSON, or (in files of the original MiniMind) as a Python literal."""
    if isinstance(value, float) and value != value:  # pandas writes an empty field as NaN
        return None
    if not isinstance(value, str):
        return value or None
    if value.strip().lower() in ("", "nan", "none", "null"):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value)
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise Malformed(f"{name} is neither JSON nor a Python list") from None
