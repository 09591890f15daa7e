"""Find out how the chat templates of the published tokenizers differ, by rendering a few chats with each of them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from model.tokenizer import TAGS, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ChatStyle:
    """Describe how a tokenizer's chat template differs from those of other published tokenizers.

    Attributes:
        system_header: the system message is written with <s>, header and </s> like any other.
        default_system: token ids of the system message that is written in front of a chat without one; perhaps none.
        answer_header: token ids in front of an answer; a template may write more than the role, as an empty <think>.
        generation_prompt: token ids in front of the answer that is asked for.
        no_thinking_prompt: the same for an answer without thinking.
        thinking_prompt: the same for an answer that begins with thinking.
        tags: token ids of <think>, </think>, <tools> and so on; none if the template writes thinking and tools otherwise.
    """

    system_header: bool
    default_system: tuple[int, ...]
    answer_header: tuple[int, ...]
    generation_prompt: tuple[int, ...]
    no_thinking_prompt: tuple[int, ...]
    thinking_prompt: tuple[int, ...]
    tags: dict[str, tuple[int, ...]]


_styles: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, tuple[object, ChatStyle]] = weakref.WeakKeyDictionary()


def chat_style(tokenizer: PreTrainedTokenizerFast) -> ChatStyle:
    """Return the style of the tokenizer's chat template, found out once by rendering a few chats with it.

    Raises UserError if the template writes anything that `model.chat_format.render_chat` would not.
    """
    template, style = _styles.get(tokenizer, (None, None))
    if style is None or template != tokenizer.chat_template:
        try:
            style = _read_style(tokenizer)
        except Exception as error:  # the template is a program: it can raise anything
            raise UserError(
                f"the chat template in {tokenizer.name_or_path or 'the tokenizer'} is not one that this toolkit can "
                f"render ({str(error):.300}); use the tokenizer of a MiniMind"
            ) from error
        _styles[tokenizer] = tokenizer.chat_template, style
    return style


# White space at their ends shows whether a template removes it. (MiniMind-3's does, but only line ends before answers.)
_PROBES = {"system": "\n SYSTEM-7301 \n", "user": "\n USER-7302 \n", "assistant": " ASSISTANT-7303 \n"}


def _read_style(tokenizer: PreTrainedTokenizerFast) -> ChatStyle:
    """Read the style off short chats; raise an exception if longer ones are not written in the same way."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token

    def render(*roles: str, **options: Any) -> str:
        messages = [{"role": role, "content": _PROBES[role]} for role in roles]
        prompt = roles[-1] != "assistant"
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **options))

    def split(text: str, separator: str, n: int) -> list[str]:
        parts = text.split(separator)
        if len(parts) != n:
            raise ValueError(f"in {text!r}, {separator!r} occurs {len(parts) - 1} times instead of {n - 1}")
        return parts

    header = f"{bos}assistant\n"
    question = f"{bos}user\n{_PROBES['user']}{eos}\n{header}"
    answer = f"{_PROBES['assistant']}{eos}\n"
    default, prompt = split(render("user"), question, 2)
    system = split(render("system", "user"), question, 2)[0]
    before_answer = split(split(render("user", "assistant", "user"), question, 3)[1], answer, 2)[0]
    with_header = f"{bos}system\n{_PROBES['system']}{eos}\n"

    if system not in (_PROBES["system"], with_header):
        raise ValueError(f"the system message is written as {system!r}")
    turn = question + before_answer + answer
    for roles, expected in (
        (("user", "assistant"), default + turn),
        (("system", "user", "assistant", "user", "assistant", "user"), system + turn + turn + question + prompt),
    ):
        if render(*roles) != expected:
            raise ValueError(f"{', '.join(roles)}: {render(*roles)!r} instead of {expected!r}")

    def encode(text: str) -> tuple[int, ...]:
        """Return the token ids of one of the template's own texts: what is a control token in it becomes one."""
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    tags = _tags(tokenizer)
    no_thinking = encode(header + split(render("user", enable_thinking=False), question, 2)[1])
    thinking = encode(header + split(render("user", enable_thinking=True), question, 2)[1])
    if no_thinking == thinking == encode(header + prompt) and tags:  # of a time when no model thought
        no_thinking += tags["<think>"] + tags["</think>"]
        thinking += tags["<think>"]
    return ChatStyle(
        system == with_header,
        encode(default),
        encode(header + before_answer),
        encode(header + prompt),
        no_thinking,
        thinking,
        tags,
    )


# A chat with tools, thinking and calls, and its text in the chat format.
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
_TOOL_PROBE: list[dict[str, Any]] = [
    {"role": "system", "content": "system", "tools": [_TOOL, _TOOL]},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "words", "reasoning_content": "thought", "tool_calls": [_CALL, _CALL]},
    {"role": "tool", "content": "one"},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "answer", "reasoning_content": ""},
]
_WRITTEN_TOOL = '{"name": "f", "description": "d", "parameters": {"type": "object"}}'
_WRITTEN_CALL = '<tool_call>{"name": "f", "arguments": {"x": "1"}}</tool_call>'
_TOOL_TEXT = (
    f"system\n<tools>{_WRITTEN_TOOL}\n{_WRITTEN_TOOL}</tools><s>user\nquestion</s>\n"
    f"<s>assistant\n<think>thought</think>words{_WRITTEN_CALL * 2}</s>\n<s>tool\n<tool_response>one</tool_response></s>\n"
    "<s>tool\n<tool_response>two</tool_response></s>\n<s>assistant\n<think></think>answer</s>\n"
)


def _tags(tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[int, ...]]:
    """Return the token ids of the tags: those of their text where they are no control tokens.

    A template that knows no tools and no thinking, as the first ones, leaves them to `model.chat_format`; for one that
    writes them otherwise, as Qwen's, there are no tags.
    """
    template = str(tokenizer.chat_template)
    if any(word in template for word in ("tool", "think")):
        try:
            found = tokenizer.apply_chat_template(_TOOL_PROBE, tools=[_TOOL, _TOOL], tokenize=False)
        except Exception:  # the template is a program: it can raise anything
            return {}
        if found != _TOOL_TEXT:
            return {}
    added = tokenizer.get_added_vocab()
    names = [tag for name in TAGS for tag in (f"<{name}>", f"</{name}>")]
    return {tag: (added[tag],) if tag in added else tuple(encode_text(tokenizer, tag)) for tag in names}
