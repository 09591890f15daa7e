"""Prompts that leave room for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from model.chat_format import Message, PromptTooLong, count_images, split_turns, truncate_chat, with_tools
from model.tokenizer import BOS_ID, encode_text


@dataclass(frozen=True)
class Prompt:
    """Token ids to begin with, and what was left out to make room for the answer.

    turns_seen, turns_left_out: earlier questions with their answers.
    tokens_left_out: at the beginning of a text.
    n_images: how many images the prompt has places for; those of turns that were left out are not among them.
    """

    ids: list[int]
    turns_seen: int = 0
    turns_left_out: int = 0
    tokens_left_out: int = 0
    n_images: int = 0


def chat_prompt(
    tokenizer: PreTrainedTokenizerFast,
    turns: list[Message],
    turn: list[Message],
    *,
    context: int,
    max_new_tokens: int,
    history_turns: int,
    system: str | None = None,
    tools: Sequence[dict[str, Any]] = (),
    image_ids: Sequence[int] = (),
) -> Prompt:
    """Return a question after at most `history_turns` earlier turns, or fewer if the answer would have no room.

    Args:
        turns: the dialogue so far, without its system message.
        turn: the question; behind it, perhaps, calls and what the tools returned.
        tools: functions that the model may call.
        context: maximum length of prompt and answer together. At least half of it is for the prompt.
        image_ids: what every `IMAGE` in a message becomes, see `render_chat`.

    Raises UserError if the question alone is too long, or not Unicode.
    """
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    history = split_turns(turns)[1][-history_turns:] if history_turns else []
    room = context - min(max_new_tokens, context // 2)
    messages = [*first, *(message for earlier in history for message in earlier), *turn]
    try:
        chat = truncate_chat(tokenizer, with_tools(messages, [*tools]), room, image_ids=image_ids)
    except PromptTooLong as error:
        if not tools:
            raise
        names = ", ".join(tool["name"] for tool in tools)
        raise PromptTooLong(
            f"{error}. The descriptions of the tools count, too ({names}): offer fewer of them, or raise --max_seq_len"
        ) from None
    n_images = count_images(chat.messages) if image_ids else 0
    seen = len(history) - chat.dropped_turns
    return Prompt(chat.ids, turns_seen=seen, turns_left_out=chat.dropped_turns, n_images=n_images)


def text_prompt(tokenizer: PreTrainedTokenizerFast, text: str, *, context: int, max_new_tokens: int) -> Prompt:
    """Return a text to continue: only its last tokens, if all of them would leave no room for the answer.

    Raises UserError if it is not Unicode.
    """
    ids = encode_text(tokenizer, text)
    room = max(context - 1 - min(max_new_tokens, context // 2), 1)
    return Prompt([BOS_ID, *ids[-room:]], tokens_left_out=max(0, len(ids) - room))
