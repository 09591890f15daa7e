"""From text to token ids and back: the tokenizer, the chat format, and which tokens of a chat are trained on.

    tokenizer = load_tokenizer()
    encode_text(tokenizer, "你好, a literal </s> is text")
    ids, loss_mask = render_chat(tokenizer, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])

A chat is `<s>user\\n…</s>\\n<s>assistant\\n…</s>\\n`, a system message in front of it as bare text.

Text is text: whatever users and data contain is encoded by `encode_text`, where a literal `<s>` or `</s>` is five bytes
like any other and never the control token. Control tokens are put in by id, and only here.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.files import recover_folder

TOKENIZER_DIR = Path(__file__).resolve().parent / "minimind_tokenizer"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

# The same text as render_chat, for transformers, vLLM and llama.cpp. Two things differ from the published template:
# the header of an answer to come depends on add_generation_prompt, and a role out of order is an error, not dropped.
CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('roles must be: perhaps system, then user and assistant in turn; found ' + message['role']) }}"
    "{% endif %}"
    "{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt and turns and turns[-1]['role'] == 'user' %}{{ '<s>assistant\\n' }}{% endif %}"
)


def load_tokenizer(path: Path | str = TOKENIZER_DIR) -> PreTrainedTokenizerFast:
    """Load a tokenizer folder from the disk (never from the network).

    Raises ValueError if the folder is not a tokenizer, or one whose <unk>, <s>, </s> are not the ids 0, 1, 2.
    """
    path = Path(path)
    if not path.exists():
        recover_folder(path)  # a process that replaced it was killed between two renames
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: no tokenizer.json in it; name a tokenizer folder, or make one: train_tokenizer.py")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            json.loads((path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no {name} in it; copy the whole tokenizer folder again") from None
        except ValueError as error:
            raise ValueError(f"{path / name} is damaged ({error}); copy the tokenizer folder again") from None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    check_special_tokens(tokenizer, path)
    return tokenizer


def check_special_tokens(tokenizer: PreTrainedTokenizerFast, path: Path | str = "tokenizer") -> None:
    """Raise ValueError unless <unk>, <s>, </s> are the ids 0, 1, 2, have their roles, and a chat format is there."""
    expected = {UNK: UNK_ID, BOS: BOS_ID, EOS: EOS_ID}
    vocab = tokenizer.get_vocab()
    found = {token: vocab.get(token) for token in expected}
    if found != expected:
        raise ValueError(f"{path}: special tokens are {found}, MiniMind needs {expected}; use another tokenizer")
    roles = {"unk": tokenizer.unk_token, "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    if roles != {"unk": UNK, "bos": BOS, "eos": EOS}:
        raise ValueError(f"{path}: the special tokens have the roles {roles}; correct its tokenizer_config.json")
    if not tokenizer.chat_template:
        raise ValueError(f"{path}: no chat_template; copy the whole tokenizer folder again")


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hex digits that change with anything that changes ids: vocabulary, merges, splitting, specials, chat format."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # left behind by the last call, not part of the tokenizer
        content.pop(setting, None)
    content["special_tokens"] = tokenizer.special_tokens_map
    content["chat_template"] = tokenizer.chat_template
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of `text`, nothing added. A literal "<s>" in it is text and never becomes id 1.

    Raises ValueError for text that is not Unicode (half of a surrogate pair).
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """`encode_text` of each, in parallel at the rate of the library (several MB/s per core)."""
    try:
        encodings = _text_encoder(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    except TypeError:  # the library says only "must be str"
        for i, text in enumerate(texts):
            _check_unicode(text, f"text {i}")
        raise
    return [encoding.ids for encoding in encodings]


def render_chat(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them are training targets: every assistant text with its closing `</s>`.

    messages: {"role", "content"}: perhaps one system message, then user and assistant in turn.
    add_generation_prompt: end with the header of the answer to come (not if the chat ends with an answer).

    Each piece is encoded alone, so the mask comes from knowing what is what, the content of a message cannot pose as a
    control token, and an answer has the ids in training that the model has to produce when it is asked. These are also
    the ids of `tokenizer.apply_chat_template`, with one exception beside literal control tokens: where an answer begins
    with a blank line, the template glues the line end of the header to it ("\\n\\n" is one token).

    Raises ValueError naming the index of a message that is out of order or not a text.
    """
    check_messages(messages)
    pieces = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role != "assistant":
            pieces.append(content if role == "system" else f"user\n{content}")
        else:
            pieces += ["assistant\n", content]
    if add_generation_prompt and messages[-1]["role"] == "user":
        pieces.append("assistant\n")
    *encoded, newline = encode_texts(tokenizer, [*pieces, "\n"])
    encoded = iter(encoded)

    ids: list[int] = []
    loss_mask: list[bool] = []

    def add(new_ids: list[int], target: bool = False) -> None:
        ids.extend(new_ids)
        loss_mask.extend([target] * len(new_ids))

    for message in messages:
        if message["role"] == "system":
            add(next(encoded))
            continue
        add([BOS_ID, *next(encoded)])
        if message["role"] == "assistant":
            add([*next(encoded), EOS_ID], target=True)
        else:
            add([EOS_ID])
        add(newline)
    for header in encoded:  # of the answer to come
        add([BOS_ID, *header])
    return ids, loss_mask


def check_messages(messages: list[dict]) -> None:
    """Raise ValueError, naming the index, unless: perhaps a system message, then user and assistant in turn."""
    if not messages:
        raise ValueError("no messages: a chat needs at least one of the user")
    expected = "user"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} is not an object with a role and a text as content: {message!r:.80}")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {i} has the unknown role {role!r}: use system, user or assistant")
        _check_unicode(content, f"message {i} ({role})")
        if role == "system":
            if i > 0:
                raise ValueError(f"message {i} is a system message: only the first may be one")
            continue
        if role != expected:
            before = f"after {messages[i - 1]['role']}" if i else "at the start"
            raise ValueError(f"message {i} is of {role} {before}, where {expected} should speak")
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] == "system":
        raise ValueError("message 0 is a system message, and none of the user follows")


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not Unicode: half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}"
        ) from None


# The setting "special tokens are text" belongs to a backend and would be seen by every other user of the tokenizer, so
# encode_text has its own copy of the backend. It is dropped together with its tokenizer.
_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, Tokenizer] = weakref.WeakKeyDictionary()
_encoders_lock = threading.Lock()


def _text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    with _encoders_lock:
        encoder = _encoders.get(tokenizer)
        if encoder is None or encoder.get_vocab_size() != len(tokenizer):
            encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            encoder.encode_special_tokens = True
            encoder.no_truncation()
            encoder.no_padding()
            _encoders[tokenizer] = encoder
        return encoder
