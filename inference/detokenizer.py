"""From tokens to text, piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Byte-level vocabularies write each byte as one visible character (GPT-2's table).
_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}


class Detokenizer:
    """Decode one answer to text, piece by piece as its tokens come.

    A token of a byte-level vocabulary is a few bytes, not always whole characters: bytes wait until their character is
    complete. Text that could be the beginning of a stop string waits until it is clear that it is not. All pieces
    together are the tokenizer's own decoding (up to a stop string). Special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Iterable[str] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        if type(self._backend.decoder).__name__ != "ByteLevel":
            raise ValueError("this tokenizer is not a byte-level BPE: its text cannot be streamed; use another one")
        self._special = frozenset(tokenizer.all_special_ids)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._waiting = ""  # complete characters that may begin a stop string
        self.stopped = False  # a stop string was found; the text ends before it

    def add(self, token: int) -> str:
        """Return the text that is certain now, often "" or one character."""
        if self.stopped or token in self._special:
            return ""
        text = self._utf8.decode(token_bytes(self._backend.id_to_token(token)))
        return self._until_stop(text) if self._stop else text

    def finish(self, *, complete: bool = True) -> str:
        """Return the rest of the text.

        complete: False if the answer was cut off: half of a character at its end is then left out. If the model itself
            ended there, it is invalid, and shown as U+FFFD.
        """
        if self.stopped:
            return ""
        rest = self._utf8.decode(b"", final=True) if complete else ""
        text, self._waiting = self._waiting + rest, ""
        return text

    def _until_stop(self, text: str) -> str:
        text = self._waiting + text
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:size]):
                    held = size
                    break
        clear = len(text) - held
        self._waiting = text[clear:]
        return text[:clear]


def token_bytes(token: str | None) -> bytes:
    """Return the bytes of a token; none for an id that is not in the vocabulary."""
    if token is None:
        return b""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # added as text, not spelled in bytes
        return token.encode("utf-8")
