"""The chat format: roles and their order, the template, rendering to token ids, cutting what is too long.

    ids, loss_mask = render_chat(tokenizer, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    prompt = truncate_chat(tokenizer, [*dialogue, {"role": "user", "content": "and now?"}], max_tokens=512).ids

A chat is `<s>user\\n…</s>\\n<s>assistant\\n…</s>\\n`, with the system message in front of it as bare text. It may list
tools; an answer may begin with its thinking and end with tool calls; and what a tool returns is a message, too:

    {"role": "system", "content": "…", "tools": [{"name", "description", "parameters"}]}  …\\n<tools>{"name": …}</tools>
    {"role": "assistant", "content": "…", "reasoning_content": "…"}                       <think>…</think>…
    {"role": "assistant", "content": "…", "tool_calls": [{"name", "arguments"}]}          …<tool_call>{"name": …}</tool_call>
    {"role": "tool", "content": "…"}                                                      <tool_response>…</tool_response>

Tools and calls may also be wrapped as OpenAI does, {"type": "function", "function": {…}}. The tokenizers of later MiniMinds
differ a little: see `chat_style.py`. Data readers, training, the server and the web page all use this module, which imports
neither torch nor transformers. `chat_parser.py` reads the answers that a model generates.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import UserError
from model.chat_style import chat_style
from model.tokenizer import BOS_ID, EOS_ID, check_unicode, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]  # {"role", "content"}, and perhaps tools, reasoning_content or tool_calls

START, END = "", "the end"
CALLS = "tool_calls"  # in the grammar: an answer that calls tools
# The grammar: which roles may follow a role. Everything that depends on the order of messages uses this table.
FOLLOWED_BY: dict[str, tuple[str, ...]] = {
    START: ("system", "user"),
    "system": ("user",),
    "user": ("assistant", END),
    "assistant": ("user", END),
    CALLS: ("tool", END),
    "tool": ("tool", "assistant", END),
}
ROLES = tuple(role for role in FOLLOWED_BY if role not in (START, CALLS))
SYSTEM_ROLE = "system"  # its text stands alone, without <s>, header and </s>, unless `ChatStyle.system_header`
TURN_ROLE = "user"  # a turn is a message of this role and all that follow, up to the next one
IMAGE = "\ufffc"  # stands for an image in a question, where a model sees: U+FFFC, "object replacement character"
ANSWER_ROLE = "assistant"  # what the model writes: the content of these messages is trained on
OPTIONAL_FIELDS = {"tools": SYSTEM_ROLE, "reasoning_content": ANSWER_ROLE, "tool_calls": ANSWER_ROLE}
TOOL_FIELDS = ("name", "description", "parameters")  # what the model sees of a tool

# The same text as render_chat, for transformers, vLLM and llama.cpp. Two things differ from the published template: the
# header of the next answer depends on add_generation_prompt, and a role out of order is an error instead of dropped.
# {% generation %} marks what is trained on. What tojson returns is never joined with "+": Jinja without transformers would
# write the other text as HTML then.
CHAT_TEMPLATE = (
    f"{{% set followed_by = { ({role: [n for n in after if n != END] for role, after in FOLLOWED_BY.items()})!r} %}}"
    "{% set ns = namespace(last='') %}"
    "{% set system = messages[0] if messages and messages[0]['role'] == 'system' else {'content': ''} %}"
    "{% set tools = tools or system['tools'] %}"
    "{{ system['content'] or '' }}"
    "{% if tools %}"
    "{{ ('\n' if system['content'] else '') + '<tools>' }}"
    "{% for tool in tools %}{% set tool = tool['function'] or tool %}"
    "{{ ('' if loop.first else '\n') + '{\"name\": ' }}{{ tool['name'] | tojson }}"
    "{% if tool['description'] %}{{ ', \"description\": ' }}{{ tool['description'] | tojson }}{% endif %}"
    "{% if tool['parameters'] %}{{ ', \"parameters\": ' }}{{ tool['parameters'] | tojson }}{% endif %}"
    "{{ '}' }}"
    "{% endfor %}"
    "{{ '</tools>' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% set role = message['role'] %}{% set content = message['content'] or '' %}"
    "{% if role not in followed_by[ns.last] %}"
    "{{ raise_exception('roles out of order: ' + role + ' cannot follow ' + (ns.last or 'the start')) }}"
    "{% endif %}"
    "{% if role == 'user' %}{{ '<s>user\n' + content + '</s>\n' }}"
    "{% elif role == 'tool' %}{{ '<s>tool\n<tool_response>' + content + '</tool_response></s>\n' }}"
    "{% elif role == 'assistant' %}{{ '<s>assistant\n' }}{% generation %}"
    "{% if message['reasoning_content'] is string %}{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ content }}"
    "{% for call in message['tool_calls'] or [] %}{% set call = call['function'] or call %}"
    "{{ '<tool_call>{\"name\": ' }}{{ call['name'] | tojson }}{{ ', \"arguments\": ' }}"
    "{{ call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}{{ '}</tool_call>' }}"
    "{% endfor %}"
    "{{ '</s>' }}{% endgeneration %}{{ '\n' }}"
    "{% endif %}"
    "{% set ns.last = 'tool_calls' if message['tool_calls'] else role %}"
    "{% endfor %}"
    "{% if add_generation_prompt and 'assistant' in followed_by[ns.last] %}{{ '<s>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is true %}{{ '<think>' }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    "{% endif %}"
)


class PromptTooLong(UserError):
    """The part of a chat that must stay, its last question, does not fit."""


def check_messages(messages: list[Message], *, answered: bool | None = None) -> None:
    """Raise UserError, naming the index of the message, unless the roles follow the grammar and all fields are sound.

    answered: True: the last message must be an answer; False: it must wait for one; None: either.
    """
    roles: list[str] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or not isinstance(message.get("content"), str):
            raise UserError(f"messages[{i}] is not an object with a role and a text as content: {message!r:.80}")
        if message["role"] not in ROLES:
            raise UserError(f"messages[{i}] has the unknown role {message['role']!r}; use {' or '.join(ROLES)}")
        _check_fields(message, f"messages[{i}] ({message['role']})")
        roles.append(CALLS if message.get("tool_calls") else message["role"])
    steps = itertools.pairwise([START, *roles, END])
    wrong = next((i for i, (role, following) in enumerate(steps) if _role(following) not in FOLLOWED_BY[role]), None)
    asking = [role for role, following in FOLLOWED_BY.items() if ANSWER_ROLE in following]
    if wrong is not None:
        found, where = roles[: wrong + 1], f"messages[{wrong}]"
        expected = [role for role in FOLLOWED_BY[roles[wrong - 1] if wrong else START] if role != END]
    elif answered is not None and answered != (_role(roles[-1]) == ANSWER_ROLE):
        found, where, expected = roles, "the last", [ANSWER_ROLE] if answered else asking
    else:
        return
    shown = ("... " if len(found) > 8 else "") + " ".join(found[-8:]) if found else "no messages"
    why = "; a tool message must follow an answer with tool_calls" if found[-1:] == ["tool"] else ""
    raise UserError(f"roles out of order: {shown}; {where} must be {' or '.join(expected)}{why}")


def _role(kind: str) -> str:
    return ANSWER_ROLE if kind == CALLS else kind


def _check_fields(message: Message, where: str) -> None:
    for field, role in OPTIONAL_FIELDS.items():
        if message.get(field) and message["role"] != role:
            raise UserError(f"{where} has {field}, and only {role} messages may")
    if not isinstance(message.get("reasoning_content"), str | None):
        raise UserError(f"{where}: reasoning_content is not a text: {message['reasoning_content']!r:.80}")
    for field, needed in (("tools", {"name": str}), ("tool_calls", {"name": str, "arguments": dict})):
        listed = message.get(field) or []
        for item in listed if isinstance(listed, list) else [str(listed)]:
            function = _function(item)
            if not all(isinstance(function.get(name), kind) for name, kind in needed.items()):
                names = " and ".join(f"{name} ({kind.__name__})" for name, kind in needed.items())
                raise UserError(f"{where}: {field} is not a list of functions with {names}: {item!r:.80}")
    try:
        check_unicode(message_text(message), where)
    except (TypeError, RecursionError):
        raise UserError(f"{where}: its tools or arguments cannot be written as JSON") from None


def _function(item: object) -> dict[str, Any]:
    """Return what is in OpenAI's wrapping {"type": "function", "function": {…}}, or the item itself."""
    function = (item.get("function") or item) if isinstance(item, dict) else {}
    return function if isinstance(function, dict) else {}


def message_parts(message: Message) -> list[str]:
    """Return the text of a message in pieces: texts at even places, perhaps empty, and tags at odd ones."""
    content = message["content"]
    if message["role"] == "tool":
        return ["", "<tool_response>", content, "</tool_response>", ""]
    if tools := message.get("tools"):
        functions = [
            {name: function[name] for name in TOOL_FIELDS if name == "name" or function.get(name)}
            for function in map(_function, tools)
        ]
        return [content and content + "\n", "<tools>", "\n".join(map(_json, functions)), "</tools>", ""]
    parts = [content]
    if message.get("reasoning_content") is not None:
        parts = ["", "<think>", message["reasoning_content"], "</think>", content]
    for call in message.get("tool_calls") or []:
        function = {name: _function(call)[name] for name in ("name", "arguments")}
        parts += ["<tool_call>", _json(function), "</tool_call>", ""]
    return parts


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # as transformers' tojson


def message_text(message: Message) -> str:
    """Return the text of a message with its tags, without the header of its role."""
    return "".join(message_parts(message))


def with_tools(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Return the messages with these tools (if any) in the system message; there is one then."""
    if not tools:
        return messages
    has_system = bool(messages) and messages[0]["role"] == SYSTEM_ROLE
    system = messages[0] if has_system else {"role": SYSTEM_ROLE, "content": ""}
    return [{**system, "tools": tools}, *messages[has_system:]]


def split_turns(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the messages before the first turn (a system message, or none), and the turns of a valid chat."""
    starts = [i for i, message in enumerate(messages) if message["role"] == TURN_ROLE]
    first = starts[0] if starts else len(messages)
    return messages[:first], [messages[i:j] for i, j in itertools.pairwise([*starts, len(messages)])]


def count_images(messages: list[Message]) -> int:
    """Return how many images stand in the questions of a chat."""
    return sum(message["content"].count(IMAGE) for message in messages if message["role"] == TURN_ROLE)


def with_images(text: str, n: int) -> str:
    """Return a question with the places of `n` images in front, each on a line of its own, as models are trained."""
    return f"{IMAGE}\n" * n + text.replace(IMAGE, "")


def render_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    enable_thinking: bool | None = None,
    image_ids: Sequence[int] = (),
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a chat, and which of them are trained on: each answer with its closing `</s>`.

    Thinking and calls are parts of an answer; what tools return is not trained on. Each piece is encoded alone. So the mask
    is exact, the content of a message cannot pose as a control token, and an answer has the same ids in training as the
    model has to produce when it is asked. These are also the ids of `tokenizer.apply_chat_template`, with two exceptions
    beside literal control tokens: where an answer begins with a blank line, the template merges the line end of the header
    with it ("\\n\\n" is one token) or leaves it out, and MiniMind-3's takes what an answer has in <think> as its thinking.

    Args:
        add_generation_prompt: end with the header of the next answer (not if the chat ends with an answer).
        continue_final_message: leave out the end of the last message if it is an answer, so that the model continues it.
        enable_thinking: True: the next answer begins with thinking: <think> stands before it. False: it shall not think: an
            empty <think></think> stands there. None: as the model likes.
        image_ids: what every `IMAGE` in a message becomes; none: `IMAGE` is a character like any other.

    Raises UserError for messages out of order, and for thinking and tools that the tokenizer's template writes otherwise.
    """
    check_messages(messages)
    rendered = _render_messages(tokenizer, messages, add_generation_prompt, enable_thinking, image_ids)
    if continue_final_message and rendered[-1].answer:
        rendered[-1] = _Rendered(rendered[-1].prefix, rendered[-1].answer[:-1], [])
    return _join(rendered)


@dataclass(frozen=True)
class TruncatedChat:
    """A rendered chat of limited length.

    Attributes:
        ids: token ids.
        loss_mask: which of them are trained on.
        answer_start: index in `ids` where the last answer begins, or will begin.
        messages: the messages that are left.
        dropped_turns: how many of the oldest turns were left out.
        dropped_system: the system message was left out, or that of the template.
        answer_cut: the last answer does not end in `</s>`, because it was cut.
    """

    ids: list[int]
    loss_mask: list[bool]
    answer_start: int
    messages: list[Message]
    dropped_turns: int = 0
    dropped_system: bool = False
    answer_cut: bool = False


def truncate_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    max_tokens: int,
    *,
    enable_thinking: bool | None = None,
    image_ids: Sequence[int] = (),
) -> TruncatedChat:
    """Render a chat in at most `max_tokens` tokens, cut at turn boundaries: the oldest turns are left out first.

    A chat that waits for an answer ends with the header of that answer; it keeps its system message. A chat that is
    answered loses its system message if the last turn does not fit beside it (unless that lists tools), and then the end of
    its last answer: no `</s>` is trained on there, because the answer does not end there.

    enable_thinking, image_ids: as in `render_chat`.
    Raises PromptTooLong if the last question (with a system message that stays) does not fit, or leaves no room for a single
    token of the answer that is there.
    """
    check_messages(messages)
    answered = messages[-1]["role"] == ANSWER_ROLE
    system, turns = split_turns(messages)
    rendered = iter(_render_messages(tokenizer, messages, True, enable_thinking, image_ids))
    system_ids = next(rendered).prefix
    *older, last = [[next(rendered) for _ in turn] for turn in turns]
    last += rendered  # the header of the next answer
    last_ids, last_mask = _join(last)
    # The line end after the last answer is not trained on: it is cut without further notice.
    needed = len(last_ids) - len(last[-1].suffix)
    prompt_len = needed - len(last[-1].answer)

    keeps_system = not answered or bool(system and system[0].get("tools"))
    n_question = prompt_len + len(system_ids) * keeps_system
    limit = max_tokens - 1 if answered else max_tokens
    if n_question > limit:
        both = system_ids and keeps_system
        what = "the system message and the last question have" if both else "the last question has"
        raise PromptTooLong(f"{what} {n_question} tokens, and {limit} is the limit: shorten it")
    room = max_tokens - needed
    dropped_system = not keeps_system and bool(system or system_ids) and len(system_ids) > room
    if dropped_system:
        system, system_ids = [], []
    room -= len(system_ids)
    answer_cut = room < 0
    ids, loss_mask = last_ids, last_mask
    kept = 1
    for turn in reversed(older):
        turn_ids, turn_mask = _join(turn)
        room -= len(turn_ids)
        if room < 0:
            break
        ids, loss_mask = turn_ids + ids, turn_mask + loss_mask
        kept += 1
    ids, loss_mask = system_ids + ids, [False] * len(system_ids) + loss_mask
    return TruncatedChat(
        ids=ids[:max_tokens],
        loss_mask=loss_mask[:max_tokens],
        answer_start=len(ids) - len(last_ids) + prompt_len,
        messages=[*system, *(message for turn in turns[-kept:] for message in turn)],
        dropped_turns=len(turns) - kept,
        dropped_system=dropped_system,
        answer_cut=answer_cut,
    )


class _Rendered(NamedTuple):
    """Token ids of a message; only those of `answer` are trained on."""

    prefix: list[int]
    answer: list[int]
    suffix: list[int]


def _render_messages(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    add_generation_prompt: bool,
    enable_thinking: bool | None,
    image_ids: Sequence[int],
) -> list[_Rendered]:
    """Render the system message of a valid chat (or what stands in its place, perhaps nothing), each other message, and
    the header of the next answer if it is asked for and one may follow.
    """
    style = chat_style(tokenizer)
    bare_roles = (ANSWER_ROLE,) if style.system_header else (ANSWER_ROLE, SYSTEM_ROLE)
    parts_of = [message_parts(message) for message in messages]
    if not style.tags and any(len(parts) > 1 for parts in parts_of):
        raise UserError(
            f"the chat template in {tokenizer.name_or_path or 'the tokenizer'} writes thinking, tools and calls in another "
            "way than this toolkit; use a tokenizer of train_tokenizer.py for such dialogues"
        )
    for message, parts in zip(messages, parts_of, strict=True):
        if message["role"] not in bare_roles:  # an answer is encoded alone, without its header
            parts[0] = f"{message['role']}\n{parts[0]}"
    pieces = [
        text.split(IMAGE) if image_ids and message["role"] == TURN_ROLE else [text]
        for message, parts in zip(messages, parts_of, strict=True)
        for text in parts[::2]
    ]
    newline, *encoded = _encode(tokenizer, [["\n"], *pieces], image_ids)
    texts = iter(encoded)
    rendered = []
    if messages[0]["role"] != SYSTEM_ROLE:
        rendered.append(_Rendered([*style.default_system], [], []))
    for message, parts in zip(messages, parts_of, strict=True):
        ids = [*next(texts)]
        for tag in parts[1::2]:
            ids += [*style.tags[tag], *next(texts)]
        if message["role"] == ANSWER_ROLE:
            rendered.append(_Rendered([*style.answer_header], [*ids, EOS_ID], newline))
        elif message["role"] in bare_roles:
            rendered.append(_Rendered(ids, [], []))
        else:
            rendered.append(_Rendered([BOS_ID, *ids, EOS_ID, *newline], [], []))
    if add_generation_prompt and ANSWER_ROLE in FOLLOWED_BY[messages[-1]["role"]]:
        prompts = {None: style.generation_prompt, False: style.no_thinking_prompt, True: style.thinking_prompt}
        prompt = prompts[enable_thinking]
        rendered.append(_Rendered([*prompt], [], []))
    return rendered


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[list[str]], image_ids: Sequence[int]) -> list[list[int]]:
    """Encode texts that are given in pieces, with `image_ids` between the pieces; each piece is encoded alone."""
    ids = iter(encode_texts(tokenizer, list(itertools.chain.from_iterable(texts))))
    encoded = []
    for pieces in texts:
        first, *others = (next(ids) for _ in pieces)
        encoded.append([*first, *(i for other in others for i in (*image_ids, *other))])
    return encoded


def _join(rendered: list[_Rendered]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    loss_mask: list[bool] = []
    for prefix, answer, suffix in rendered:
        ids += prefix + answer + suffix
        loss_mask += [False] * len(prefix) + [True] * len(answer) + [False] * len(suffix)
    return ids, loss_mask
