"""Turn dialogues and preference pairs into tokens, cut to a length; only the answers are trained on."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from common.errors import UserError, stoppable
from data_pipeline.image_records import IMAGE_COLUMNS, parse_image_row
from data_pipeline.images import BadImage
from data_pipeline.readers import Block, Record, iter_records
from data_pipeline.records import CHAT_COLUMNS, Malformed, WrongStage, check_columns, parse_conversation
from data_pipeline.text_files import BadLine, BadLineLog
from data_pipeline.tokenize import (
    MAX_DROPPED,
    STOPPED,
    EncodedBlock,
    TokenizedDataset,
    cached_dataset,
    check_dropped,
)
from model.chat_format import (
    ANSWER_ROLE,
    Message,
    PromptTooLong,
    TruncatedChat,
    count_images,
    message_text,
    truncate_chat,
)
from model.chat_style import chat_style
from model.tokenizer import EOS_ID, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What was cut, after the number of dialogues.
TURNS_CUT, SYSTEM_CUT, ANSWER_CUT = "without the oldest turns", "without the system message", "with a cut answer"
# Lines of the summary for rows that raised an error.
NOT_USED = {WrongStage: "not for this stage", BadImage: "with a bad image", UserError: "not a valid dialogue"}
QUESTION_TOO_LONG = "too long: the last question leaves no room for an answer"
SAME_AFTER_CUT = "too long: the answers are the same as far as there is room"


class NothingToTrainOn(Exception):
    """No token of a valid dialogue can be trained on.

    reason: a line of the summary, without details of the row; detail: what follows it in the list of bad lines.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


Kept = TypeVar("Kept")


@stoppable(STOPPED)
def collect_rows(
    paths: Sequence[Path],
    make: Callable[[Record], Kept],
    name: str,
    invalid: str,
    max_dropped: float,
) -> list[Kept]:
    """Return what `make` makes of the rows of all files; count and list the rows that cannot be used.

    For data that people wrote, of which there is little: it is kept in memory.

    Args:
        make: raises UserError for a row that is not valid, NothingToTrainOn for one that is and cannot be used.
        name: of what is made, for messages.
        invalid: line of the summary for rows that cannot be read or are not valid.

    Raises UserError if a file has no usable row, or more than the share `max_dropped` of the rows cannot be used (see
    `check_dropped`).
    """
    kept: list[Kept] = []
    bad = BadLineLog()
    unused: Counter[str] = Counter()
    for path in paths:
        before = len(kept)
        for row in iter_records(path, functools.partial(bad.add, path)):
            try:
                kept.append(make(row))
            except NothingToTrainOn as error:
                unused[str(error)] += 1
                bad.add(path, BadLine(row.line, f"{error}{error.detail}"))
            except UserError as error:
                bad.add(path, BadLine(row.line, str(error)))
        if len(kept) == before:
            first = next((f" ({shown})" for shown in bad.first if shown.startswith(f"{path}:")), "")
            raise UserError(f"{path}: no usable {name} in it{first}")
    print(f"{len(kept):,} {name}s, {bad.count:,} unusable rows", *bad.shown(), sep="\n  ")
    skipped = {invalid: bad.count - unused.total()} | unused
    skipped = {reason: count for reason, count in skipped.items() if count}
    check_dropped(paths, skipped, len(kept), bad.first, bad.incomplete, max_dropped)
    return kept


def tokenize_chat_data(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    *,
    max_tokens: int,
    image_ids: Sequence[int] = (),
    max_dropped: float = MAX_DROPPED,
) -> TokenizedDataset:
    """Return dialogues in any format of data_pipeline/records.py as documents, with a loss mask over the answers.

    Args:
        max_tokens: a longer dialogue is cut, see `truncate_chat`; what was cut and skipped is counted in `info`.
        image_ids: the tokens that stand for an image, for dialogues about images (data_pipeline/image_records.py). The rows
            hold their images: a file that is only named could change, and the cache would not know.

    Other arguments and errors as `tokenize_pretrain_data`.
    """
    if max_tokens < 2:
        raise UserError(f"a dialogue of {max_tokens} token(s) has nothing to train on; allow more")
    chat_style(tokenizer)  # a template that is unknown is not the fault of the rows
    for path in paths:
        check_columns(path, IMAGE_COLUMNS if image_ids else CHAT_COLUMNS)
    encode = functools.partial(_encode_chats, tokenizer=tokenizer, max_tokens=max_tokens, image_ids=image_ids)
    settings = {"max_tokens": max_tokens} | ({"image_ids": list(image_ids)} if image_ids else {})
    kind = "image" if image_ids else "chat"
    return cached_dataset(kind, paths, tokenizer, cache_dir, settings, encode, max_dropped)


def encode_preference(
    tokenizer: PreTrainedTokenizerFast, prompt: list[Message], chosen: str, rejected: str, max_tokens: int
) -> tuple[list[int], list[int], list[int]]:
    """Return (prompt with the header of the answer, chosen, rejected) as token ids; prompt + either fit `max_tokens`.

    Cut as in `truncate_chat`, by the longer of the two answers; an answer ends in `</s>` unless it was cut.
    Raises NothingToTrainOn if no answer fits, or the two are the same as far as they fit.
    """
    answers = [[*ids, EOS_ID] for ids in encode_texts(tokenizer, [chosen, rejected])]
    longer = chosen if len(answers[0]) >= len(answers[1]) else rejected
    messages = [*prompt, {"role": ANSWER_ROLE, "content": longer}]
    chat = _truncate(tokenizer, messages, max_tokens)
    room = max_tokens - chat.answer_start
    if answers[0][:room] == answers[1][:room]:
        raise NothingToTrainOn(SAME_AFTER_CUT, f" in {max_tokens} tokens")
    return chat.ids[: chat.answer_start], answers[0][:room], answers[1][:room]


def _truncate(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], max_tokens: int, image_ids: Sequence[int] = ()
) -> TruncatedChat:
    try:
        return truncate_chat(tokenizer, messages, max_tokens, image_ids=image_ids)
    except PromptTooLong:
        raise NothingToTrainOn(QUESTION_TOO_LONG, f" in {max_tokens} tokens") from None


def _encode_chats(
    block: Block, tokenizer: PreTrainedTokenizerFast, max_tokens: int, image_ids: Sequence[int]
) -> EncodedBlock:
    encoded = EncodedBlock()
    for line, data in encoded.rows_of(block):
        images: list[bytes] = []
        try:
            if image_ids:
                messages, images = parse_image_row(data, None)
            else:
                messages = parse_conversation(data)
            chat = _truncate(tokenizer, messages, max_tokens, image_ids)
            if image_ids:
                _check_places(chat, image_ids)
        except NothingToTrainOn as reason:
            encoded.skipped.append((str(reason), BadLine(line, f"{reason}{reason.detail}")))
            continue
        except UserError as reason:
            kind = next(kind for error, kind in NOT_USED.items() if isinstance(reason, error))
            encoded.skipped.append((kind, BadLine(line, str(reason))))
            continue
        content: object = messages  # what makes it a duplicate of another dialogue
        if image_ids:
            images = images[len(images) - count_images(chat.messages) :]  # those of the oldest turns were cut with them
            encoded.images.append(images)
            content = [messages, [hashlib.sha256(image).hexdigest() for image in images]]
        encoded.add(chat.ids, json.dumps(content).encode(), _answer_bytes(tokenizer, chat))
        encoded.loss_mask.append(bytes(chat.loss_mask))
        encoded.cut.update({TURNS_CUT: chat.dropped_turns > 0, SYSTEM_CUT: chat.dropped_system})
        encoded.cut[ANSWER_CUT] += chat.answer_cut
    return encoded


def _check_places(chat: TruncatedChat, image_ids: Sequence[int]) -> None:
    """Raise UserError if text happens to have the tokens that stand for an image."""
    n, pattern = len(image_ids), list(image_ids)
    found, at = 0, 0
    while at + n <= len(chat.ids):
        here = chat.ids[at : at + n] == pattern
        found, at = found + here, at + (n if here else 1)
    places = count_images(chat.messages)
    stray = len(set(pattern)) == 1 and chat.ids.count(pattern[0]) != places * n
    if found != places or stray:
        raise Malformed("a text has the tokens that stand for an image")


def _answer_bytes(tokenizer: PreTrainedTokenizerFast, chat: TruncatedChat) -> int:
    """Return the UTF-8 bytes of the answers that are trained on."""
    answers = [message_text(message) for message in chat.messages if message["role"] == ANSWER_ROLE]
    if chat.answer_cut:  # the last one; in a byte-level vocabulary every character of a token is one byte
        cut = tokenizer.convert_ids_to_tokens(chat.ids[chat.answer_start :])
        return sum(map(len, cut)) + sum(len(answer.encode("utf-8")) for answer in answers[:-1])
    return sum(len(answer.encode("utf-8")) for answer in answers)


def show_sample(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print one document with its target tokens in green (in a log without colours: between » and «)."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[32m", "\033[0m") if colour else ("»", "«")
    tokens = dataset.document(0)
    loss_mask = dataset.loss_mask[: len(tokens)] if dataset.loss_mask is not None else np.arange(len(tokens)) > 0
    print(f"--- the first sample; the model learns the text {'in green' if colour else 'between » and «'}:")
    pairs = zip(tokens.tolist(), loss_mask.tolist(), strict=True)
    for learned, group in itertools.groupby(pairs, lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        print(f"{on}{text}{off}" if learned else text, end="")
    print("\n---")
