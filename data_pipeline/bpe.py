"""Train a byte-level BPE tokenizer, write it as a Hugging Face folder, and measure what it can do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model.chat_format import CHAT_TEMPLATE
from model.tokenizer import (
    BOS,
    BOS_ID,
    CONTROL_TOKENS,
    EOS,
    EOS_ID,
    SPLIT,
    UNK,
    UNK_ID,
    encode_text,
    encode_texts,
    tokenizer_hash,
)

MAX_TOKEN_BYTES = 18  # 6 Chinese characters: no boilerplate sentence of the training data becomes a token


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int = 2, split: str = SPLIT) -> Tokenizer:
    """Train byte-level BPE on `texts`. The result depends on which texts there are, not on their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in CONTROL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, training: dict) -> None:
    """Write a complete Hugging Face tokenizer folder; `training` describes how it was made."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": UNK,  # libraries want one; we mask padding and never look at its id
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    contents = {"tokenizer_config.json": config, "training.json": training}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8", newline="\n")


# --- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compression:
    """Sizes of some texts in bytes, characters and tokens."""

    texts: int
    n_bytes: int
    chars: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / max(self.tokens, 1)

    @property
    def chars_per_token(self) -> float:
        return self.chars / max(self.tokens, 1)


def measure(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Compression:
    """Count bytes, characters and tokens of `texts`."""
    texts = list(texts)
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    tokens = sum(map(len, encode_texts(tokenizer, texts)))
    return Compression(len(texts), n_bytes, sum(map(len, texts)), tokens)


def unicode_samples() -> Iterator[tuple[str, str]]:
    """Yield (description, text): all characters of Unicode, 256 in a text, and control tokens written as text."""
    for first in range(0, sys.maxunicode, 256):
        if not 0xD800 <= first <= 0xDFFF:  # halves of surrogate pairs are no characters
            yield f"U+{first:04X} to U+{first + 255:04X}", "".join(map(chr, range(first, first + 256)))
    yield "control tokens as text", f"{UNK}{BOS} a {EOS}\n{BOS}user\n{EOS}" + " ".join(CONTROL_TOKENS)


def round_trip_failures(tokenizer: PreTrainedTokenizerFast, samples: Iterable[tuple[str, str]]) -> list[str]:
    """Return descriptions of the texts that decoding does not give back exactly, or that become a control token."""
    failures = []
    control = {UNK_ID, BOS_ID, EOS_ID, *tokenizer.get_added_vocab().values()}
    for name, text in samples:
        ids = encode_text(tokenizer, text)
        if control & set(ids):
            failures.append(f"{name}: text became a control token")
        elif (back := tokenizer.decode(ids)) != text:
            failures.append(f"{name}: {text[:20]!r} came back as {back[:20]!r}")
    return failures


def longest_tokens(tokenizer: PreTrainedTokenizerFast, count: int = 20) -> list[str]:
    """Return the learned tokens with most characters, decoded."""
    learned = set(range(len(tokenizer))) - set(tokenizer.get_added_vocab().values())
    tokens = [str(tokenizer.decode([i])) for i in learned]
    return sorted(tokens, key=lambda token: (-len(token), token))[:count]


def print_report(tokenizer: PreTrainedTokenizerFast, compression: dict[str, Compression], n_samples: int) -> None:
    """Print the vocabulary, the compression by file and the longest tokens."""
    special = ", ".join(f"{token}={tokenizer.convert_tokens_to_ids(token)}" for token in (UNK, BOS, EOS))
    n_tags = len(set(CONTROL_TOKENS) & set(tokenizer.get_added_vocab()))
    print(f"vocabulary      {len(tokenizer):,} tokens, {special}, {n_tags} tags, hash {tokenizer_hash(tokenizer)}")
    width = max(map(len, compression))
    print(f"held-out text   {'':<{width}}  {'texts':>8}  {'bytes':>11}  bytes/token  chars/token")
    for name, figures in compression.items():
        print(
            f"                {name:<{width}}  {figures.texts:>8,}  {figures.n_bytes:>11,}  "
            f"{figures.bytes_per_token:>11.3f}  {figures.chars_per_token:>11.3f}"
        )
    print(f"round trip      {n_samples:,} samples of all 17 Unicode planes come back unchanged")
    print("longest tokens  " + " ".join(map(repr, longest_tokens(tokenizer))))
