"""The tokenizer: loading and checking it, its hash, and encoding texts as texts.

    tokenizer = load_tokenizer()
    encode_text(tokenizer, "你好, a literal </s> is text")

Whatever users and data contain is encoded by `encode_text`, where a literal `<s>` or `</s>` is ordinary characters and
never the control token. Control tokens are inserted by id: see `model.chat_format`, which renders chats.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import recover_folder
from model.architecture import TOKENIZER_DIR

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
# The tags of the chat format, one id each: the last 16 of the tokenizers that we train. In a tokenizer without them, such as
# the published MiniMind-v1's, the same tags are ordinary text. Hugging Face does not count them as special tokens, so that
# decoded text shows them.
TAGS = ("think", "tools", "tool_call", "tool_response")
IMAGE_TOKEN = "<image>"
CONTROL_TOKENS = (
    *(tag for name in TAGS for tag in (f"<{name}>", f"</{name}>")),
    IMAGE_TOKEN,
    *(f"<reserved_{i}>" for i in range(7)),
)
# Text is cut here before merging; no token crosses a cut. It is Qwen2's rule, which llama.cpp knows by the name "qwen2":
# a word with the character before it, digits one by one (a number is then spelled alike wherever it stands),
# punctuation with the line end after it, line ends, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the same ids in MiniMind2 of April 2025 and MiniMind-3


def load_tokenizer(path: Path | str = TOKENIZER_DIR) -> PreTrainedTokenizerFast:
    """Load a tokenizer folder from the disk (never from the network).

    Raises UserError if the folder is not a tokenizer, or one whose special tokens are not those of a MiniMind.
    """
    path = Path(path)
    if not path.exists():
        recover_folder(path)  # a process that replaced it was killed between two renames
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path}: no tokenizer.json in it; name a tokenizer folder, or make one: train_tokenizer.py")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            json.loads((path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no {name} in it; copy the whole tokenizer folder again") from None
        except ValueError as error:
            raise UserError(f"{path / name} is damaged ({error}); copy the tokenizer folder again") from None
    from transformers import PreTrainedTokenizerFast  # takes seconds to import, and the chat format does not need it

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    check_special_tokens(tokenizer, path)
    return tokenizer


def check_special_tokens(tokenizer: PreTrainedTokenizerFast, path: Path | str = "tokenizer") -> None:
    """Raise UserError unless <unk>, <s>, </s> (or those of `CHATML`) are the ids 0, 1, 2, have their roles, and a chat
    format is there.
    """
    unk, bos, eos = CHATML if tokenizer.bos_token == CHATML[1] else (UNK, BOS, EOS)
    expected = {unk: UNK_ID, bos: BOS_ID, eos: EOS_ID}
    vocab = tokenizer.get_vocab()
    found = {token: vocab.get(token) for token in expected}
    if found != expected:
        raise UserError(f"{path}: special tokens are {found}, MiniMind needs {expected}; use another tokenizer")
    roles = {"unk": tokenizer.unk_token, "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    if roles != {"unk": unk, "bos": bos, "eos": eos}:
        raise UserError(f"{path}: the special tokens have the roles {roles}; correct its tokenizer_config.json")
    if not tokenizer.chat_template:
        raise UserError(f"{path}: no chat_template; copy the whole tokenizer folder again")


# Of the shipped tokenizer, by its hash: the hash that it had when its template did nothing for `enable_thinking: true`. What
# was trained and tokenized with that one has the same ids.
_SAME_AS = {"34a854e9aee2bbe7": "a89c8f5e716be760"}


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return 16 hex digits that change with whatever changes ids: vocabulary, merges, splitting, specials, template."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # left behind by the last call, not part of the tokenizer
        content.pop(setting, None)
    content["special_tokens"] = tokenizer.special_tokens_map
    content["chat_template"] = tokenizer.chat_template
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]
    return _SAME_AS.get(digest, digest)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the token ids of `text`, nothing added. A literal "<s>" in it is text and never becomes id 1.

    The same is true of every other added token, special or not.

    Raises UserError for text that is not Unicode (half of a surrogate pair).
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Encode each text as `encode_text` does, in parallel (several MB/s per core)."""
    try:
        encodings = _text_encoder(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    except TypeError:  # the library says only "must be str"
        for i, text in enumerate(texts):
            check_unicode(text, f"text {i}")
        raise
    return [encoding.ids for encoding in encodings]


def check_unicode(text: str, name: str) -> None:
    """Raise UserError if `text` holds half of a surrogate pair, which no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not Unicode: half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}"
        ) from None


# The setting "special tokens are text" belongs to a backend and would be seen by every other user of the tokenizer, so
# encode_text has its own copy of the backend, in which all added tokens are special. It is dropped together with its
# tokenizer.
_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, Tokenizer] = weakref.WeakKeyDictionary()
_encoders_lock = threading.Lock()


def _text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    from tokenizers import Tokenizer

    with _encoders_lock:
        encoder = _encoders.get(tokenizer)
        if encoder is None or encoder.get_vocab_size() != len(tokenizer):
            content = json.loads(tokenizer.backend_tokenizer.to_str())
            for token in content["added_tokens"]:
                token["special"] = True  # MiniMind-3's <think> is not
            encoder = Tokenizer.from_str(json.dumps(content))
            encoder.encode_special_tokens = True
            encoder.no_truncation()
            encoder.no_padding()
            _encoders[tokenizer] = encoder
        return encoder
