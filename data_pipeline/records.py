"""Read dialogues and preference pairs of every format users have into messages; tokenize_chats.py makes tokens of them.

    parse_conversation({"q": "hi", "a": "hello"})   # [{"role": "user", "content": "hi"}, {"role": "assistant", ...}]

A chat is a row of `history,q,a` (or another pair of names, see QUESTION_ANSWER), {"messages": [{"role","content"}]},
{"conversations": [{"from","value"}]} or {"instruction","input","output","history"}; a pair has a prompt, `chosen` and
`rejected`. Thinking, tools and calls are read as OpenAI, LLaMA-Factory and the original MiniMind write them, and become what
model/chat_format.py describes. Roles are read, never guessed from the place: a row in which they are unknown or out of order
is reported with its line, and nothing is trained on it.

Texts are left as they are, to the last blank.
"""

from __future__ import annotations

import ast
import contextlib
import json
from pathlib import Path

from common.errors import UserError
from data_pipeline.readers import columns, field_names, file_format
from model.chat_format import Message, check_messages, message_text, with_tools

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "function_call": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
QUESTION_ANSWER = (("q", "a"), ("question", "answer"), ("prompt", "response"), ("prompt", "completion"))
# A CSV or Parquet file needs all columns of one of these.
CHAT_COLUMNS = (*QUESTION_ANSWER, ("instruction", "output"), ("input", "output"), ("messages",), ("conversations",))
PREFERENCE_COLUMNS = (("chosen", "rejected"),)
PROMPT_COLUMNS = tuple((name,) for name in ("messages", "conversations", "prompt", "instruction", "q", "question"))
_IS_PREFERENCE = "preference pairs (chosen, rejected) are for 5-dpo_train.py"
# Types of the parts of a content, and their order in it.
_PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}
_MEDIA = ("image", "images", "image_bytes", "video", "videos", "audio", "audios")


class Malformed(UserError):
    """A row with wrong fields or roles. The text says what is wrong, for the list of bad lines."""


class WrongStage(Malformed):
    """A row that could be read as a dialogue, but whose other fields say that this is not what is to be learned."""


def parse_conversation(data: dict) -> list[Message]:
    """Return the messages of a row, ready to be rendered; raise UserError if they are not a valid chat to learn from."""
    check_stage(data)
    messages = read_messages(data)
    for message in messages:
        check_not_empty(message)
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
    messages = _prompt(data) or _with_system(data, chosen_prompt)
    if messages and messages[-1]["role"] == "assistant" and message_text(messages[-1]).strip() == chosen.strip():
        messages = messages[:-1]  # they are the dialogue with the better answer
    for given in (chosen_prompt, rejected_prompt):
        if given and _stripped(given) not in (_stripped(messages), _stripped(messages[-1:])):  # perhaps without history
            raise Malformed("the answers repeat another prompt than the row's")
    if not messages:
        raise Malformed(f"no prompt, or an empty one; the fields are {field_names(data)}")
    check_messages(messages, answered=False)
    if not message_text(messages[-1]).strip():
        raise Malformed("the prompt is empty")
    if chosen.strip() == rejected.strip():
        raise Malformed("chosen and rejected are the same")
    return messages, chosen, rejected


def parse_prompt(data: dict) -> list[Message]:
    """Return the messages of a row up to the last question; raise UserError if they do not wait for an answer.

    They are `conversations`, `messages`, `prompt` (a text or messages), or the question of a row with question and answer;
    the answer at the end, if there is one, is left out.
    """
    _check_text_only(data)
    messages = _prompt(data)
    if not messages:
        question = next((text for q, _ in QUESTION_ANSWER if (text := _text(data, q))), "")
        messages = _with_system(data, [*_history(data.get("history")), _user(question)])
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        messages = messages[:-1]
    check_messages(messages, answered=False)
    if not message_text(messages[-1]).strip():
        raise Malformed(f"no question; the fields are {field_names(data)}")
    return messages


def _prompt(data: dict) -> list[Message]:
    """Return `conversations`, `messages`, `prompt` or `instruction` + `input` as messages; [] if a row has none of them."""
    prompt = next((data[name] for name in ("conversations", "messages", "prompt") if data.get(name)), None)
    if prompt is not None and prompt is data.get("prompt") and not _is_dialogue(prompt):
        messages = [*_history(data.get("history")), _user(_text(data, "prompt"))]
    elif prompt is not None:
        messages = _dialogue(prompt)
    elif instruction := _instruction(data):
        messages = [*_history(data.get("history")), _user(instruction)]
    else:
        return []
    return _with_system(data, messages)


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
    """Raise WrongStage if the answers of a row are not what a model of text should learn to say."""
    check_answers(data)
    _check_text_only(data)


def check_answers(data: dict) -> None:
    """Raise WrongStage if the answers of a row are not all to be learned."""
    if data.get("chosen") and data.get("rejected"):
        raise WrongStage(_IS_PREFERENCE)
    if name := next((name for name in ("label", "kto_tag") if str(data.get(name)).lower() in ("false", "0")), None):
        raise WrongStage(f"{name} is false: an example of what not to answer (KTO)")


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
    """Return the messages, after the row's own `system` field if it has one, and with the row's `tools`."""
    system = _text(data, "system")
    if system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    tools = _tools(data.get("tools"))
    if tools and any(message.get("tools") for message in messages):
        raise Malformed("tools are listed twice: by the row and by a message")
    return with_tools(messages, tools)


def _stripped(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message_text(message).strip()) for message in messages]


def _is_dialogue(prompt: object) -> bool:
    """Return whether a prompt holds messages; in a CSV they are written as text, and "[1, 2]: what is it?" is just text."""
    if not isinstance(prompt, str):
        return True
    with contextlib.suppress(Malformed):
        value = parse_value(prompt, "prompt") if prompt.lstrip().startswith("[") else None
        return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    return False


def _history(value: object) -> list[Message]:
    history = parse_value(value, "history") or []
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
    value = parse_value(value, "dialogue")
    if not isinstance(value, list) or not value:
        raise Malformed("the dialogue is not a list of messages")
    messages = [_message(message) for message in value]
    first = messages[0]
    if first["role"] == "system" and not (first["content"].strip() or first.get("tools")):
        messages = messages[1:]
    for message in messages:
        check_not_empty(message)
    return messages


def check_not_empty(message: Message) -> None:
    """Raise Malformed for a message that says nothing. A tool may return nothing, and an answer may only call tools."""
    if not (
        message["content"].strip() or message["role"] == "tool" or message.get("tool_calls") or message.get("tools")
    ):
        raise Malformed(f"an empty {message['role']} message")


def _message(message: object) -> Message:
    if not isinstance(message, dict):
        raise Malformed("a message is not an object with a role and a text")
    role, content = ("role", "content") if "role" in message else ("from", "value")
    name = message.get(role)
    if not isinstance(name, str) or name not in ROLES:
        raise Malformed(f"unknown role {name!r:.80}; known are {', '.join(ROLES)}")
    found: Message = {"role": ROLES[name], "content": ""}
    calls: list[dict] = []
    parts = message.get(content)
    if name == "function_call":
        calls = _calls(parts)
    elif isinstance(parts, list) and all(isinstance(part, dict) for part in parts):  # as OpenAI's API has them
        calls = _read_parts(parts, found)
    else:
        found["content"] = _text(message, content, required="tool_calls" not in message)
    thoughts = [message[key] for key in ("reasoning_content", "reasoning") if message.get(key) is not None]
    if thoughts and (thoughts[0] or found["role"] == "assistant"):  # "" belongs to a table in which some messages think
        if not isinstance(thoughts[0], str):
            raise Malformed(f"reasoning_content is not a text: {thoughts[0]!r:.80}")
        _check_text(thoughts[0], "reasoning_content")
        found["reasoning_content"] = thoughts[0]
    if calls := calls + _calls(message.get("tool_calls") or message.get("function_call")):
        found["tool_calls"] = calls
    if tools := _tools(message.get("tools")):
        found["tools"] = tools
    return found


def _read_parts(parts: list[dict], message: Message) -> list[dict]:
    """Put a content of typed parts, thinking, texts and calls in this order, into a message; return its calls."""
    calls: list[dict] = []
    reached = 0
    for part in parts:
        kind = part.get("type")
        if kind not in _PARTS:
            raise WrongStage(f"a message has a part of type {kind}, and a model of text cannot read it")
        if _PARTS[kind] < reached:
            raise Malformed(f"a part of type {kind} behind the text or the calls of a message")
        reached = _PARTS[kind]
        key = next((key for key in ("value", kind) if key in part), "text")
        if kind == "tool_call":
            calls += _calls(part.get(key))
        else:
            field = "content" if kind == "text" else "reasoning_content"
            message[field] = message.get(field, "") + _text(part, key, required=True)
    return calls


def _calls(value: object) -> list[dict]:
    """Return calls as OpenAI writes them, with their arguments as an object.

    value: a call or a list of calls, {"name","arguments"} or OpenAI's {"function": {…}}, perhaps as JSON; so may be the
    arguments.
    """
    value = parse_value(value, "a tool call")
    calls = []
    for call in value if isinstance(value, list) else [value] if value else []:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise Malformed(f"a tool call has no name: {call!r:.80}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_value(arguments, f"the argument list of {function['name']}")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise Malformed(f"the arguments of {function['name']} are no object: {arguments!r:.80}")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tools(value: object) -> list[dict]:
    """Return the tools of a row or a message: a list of functions, bare or as OpenAI wraps them, perhaps as JSON."""
    tools = parse_value(value, "tools") or []
    if not isinstance(tools, list):
        raise Malformed("tools is not a list of functions")
    for tool in tools:
        function = (tool.get("function") or tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(f"tools is not a list of functions with a name: {tool!r:.80}")
    return tools


def _answer(data: dict, name: str) -> tuple[list[Message], str]:
    """Return the prompt that the answer under `name` repeats, if it does, and the answer."""
    value = data.get(name)
    if isinstance(value, str) and _is_dialogue(value):
        value = parse_value(value, name)
    if isinstance(value, list) and value:
        *prompt, last = _dialogue(value) or [_user("")]
    elif isinstance(value, dict):
        prompt, last = [], _message(value)
    else:
        prompt, last = [], {"role": "assistant", "content": _text(data, name, required=True)}
    if last["role"] != "assistant":
        raise Malformed(f"{name} is a {last['role']} message, not an assistant's")
    if last.get("tool_calls") or last.get("reasoning_content"):
        raise WrongStage(f"{name} thinks or calls a tool, and preference training compares texts")
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


def parse_value(value: object, name: str) -> object:
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
