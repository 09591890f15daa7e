"""From text to tokens on the disk, once: training then reads memory-mapped files and never sees a tokenizer again.

    corpus = tokenize_pretrain_data([Path("pretrain_data.csv")], load_tokenizer(), Path("out/cache"))
    train, val = corpus.split(0.01)
    corpus.document(train[0])                 # uint16 token ids: <s>, the text, </s>

A corpus is a folder of plain arrays:

    tokens.bin   uint16  all documents, one after another
    targets.bin  bool    which tokens are learned (chats only)
    offsets.bin  int64   where each document starts, and where the last ends
    n_bytes.bin  int64   UTF-8 bytes of each document's text (of a chat: of what is learned of it)
    keys.bin     uint64  hash of each document's content
    info.json            counts; it is written last: a folder without it is not a corpus
    skipped.jsonl        rows that were not used, each with file, line and reason

Its name is a hash of the content of the data, the tokenizer and the settings, so a stale one is never used. It is made
in a folder of its own and renamed when complete: a killed build leaves nothing that could be taken for a corpus.
"""

from __future__ import annotations

import array
import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.files import atomic_write, fsync_dir
from common.progress import Progress
from data_pipeline.readers import (
    BadLine,
    Block,
    check_readable,
    columns,
    file_format,
    iter_blocks,
    parse_block,
    total_bytes,
)
from data_pipeline.records import (
    CHAT_COLUMNS,
    Preference,
    check_columns,
    field_names,
    parse_conversation,
)
from model.chat_format import ANSWER_ROLE, Message, PromptTooLong, TruncatedChat, truncate_chat
from model.tokenizer import BOS_ID, EOS_ID, encode_texts, tokenizer_hash

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = 1  # of the files and of how they are made: raise it when either changes
LISTED = 10  # so many skipped rows are shown; skipped.jsonl has all of them
MAX_WITHOUT_TARGET = 0.01  # a larger share of chats in which nothing can be learned is a mistake in data or settings
STALE_SECONDS = 60  # a build's folder younger than this may not have been locked by its owner yet

DTYPES = {"tokens": np.uint16, "targets": np.bool_, "offsets": np.int64, "n_bytes": np.int64, "keys": np.uint64}


@dataclass(frozen=True)
class TokenizedDataset:
    """Documents as tokens, on the disk.

    Attributes:
        tokens: (total tokens,) uint16, all documents one after another.
        targets: (total tokens,) bool, what is learned; None: every token but the first of each document.
        offsets: (documents + 1,) int64; document i is tokens[offsets[i]:offsets[i + 1]].
        n_bytes: (documents,) int64, UTF-8 bytes of the text (of a chat: of the learned text), for bits per byte.
        keys: (documents,) uint64, hash of the content: the same for duplicates.
        fingerprint: identifies the content of the data, the tokenizer and the settings.
        info: counts, skipped rows by reason, names of the sources.
    """

    tokens: np.ndarray
    targets: np.ndarray | None
    offsets: np.ndarray
    n_bytes: np.ndarray
    keys: np.ndarray
    fingerprint: str
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    def document(self, i: int) -> np.ndarray:
        """(length,) uint16: the token ids of document `i`, a view of the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(documents,) int64: tokens of each document."""
        return np.diff(np.asarray(self.offsets))

    def split(self, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the documents for (training, validation), each ascending.

        The content of a document alone decides where it goes: duplicates stay together, and it stays there when others
        are added or the order changes. So the share is `val_fraction` on average only; but of two or more different
        documents at least one is in each part (unless val_fraction is 0).
        """
        return split_by_key(np.asarray(self.keys), val_fraction)


def split_by_key(keys: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices for (training, validation) by content hash, keys (n,) uint64: see `TokenizedDataset.split`."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: it must be at least 0 and less than 1")
    is_val = keys < np.uint64(int(val_fraction * 2**64))
    if val_fraction > 0 and not is_val.any():
        is_val = keys == keys.min()
    if is_val.all():
        is_val = keys != keys.max()
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def tokenize_pretrain_data(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    *,
    text_field: str = "text",
    num_workers: int | None = None,
    log: Callable[[str], None] = print,
) -> TokenizedDataset:
    """The texts of CSV, JSONL, TXT or Parquet files as documents `<s>`text`</s>`; from the cache if it is there.

    text_field: column or field of the text (a line of a TXT file needs none).
    num_workers: threads that encode; None: one per CPU.
    log: gets the summary.
    Rows without a text are skipped, counted and listed. Memory does not depend on the size of the files.
    Raises UserError if a file is unusable, no row has a text, or the cache cannot be written.
    """
    paths = list(map(Path, paths))
    for path in paths:
        names = columns(path)
        if names is not None and text_field not in names:
            raise UserError(
                f"{path}: no column {text_field}, this file has {', '.join(names)}; rename one of them to {text_field}"
            )
    convert = functools.partial(_encode_documents, tokenizer=tokenizer, text_field=text_field)
    return _cached("pretrain", paths, tokenizer, Path(cache_dir), {"text_field": text_field}, convert, num_workers, log)


def tokenize_chat_data(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    *,
    max_tokens: int,
    num_workers: int | None = None,
    log: Callable[[str], None] = print,
) -> TokenizedDataset:
    """Chats in any format of data_pipeline/records.py, rendered, with the assistant's texts as targets.

    max_tokens: a longer chat is cut, see `truncate_chat`; what was cut and dropped is counted in `info`.
    Other arguments as `tokenize_pretrain_data`.
    Raises UserError as that does, and if nothing can be learned from more than 1% of the sound chats.
    """
    if max_tokens < 2:
        raise UserError(f"a chat of {max_tokens} token(s) has nothing to learn; allow more")
    paths = list(map(Path, paths))
    for path in paths:
        check_columns(path, CHAT_COLUMNS)
    convert = functools.partial(_encode_chats, tokenizer=tokenizer, max_tokens=max_tokens)
    return _cached("chat", paths, tokenizer, Path(cache_dir), {"max_tokens": max_tokens}, convert, num_workers, log)


# --- chats -----------------------------------------------------------------------------------------------------------


class Unusable(Exception):
    """A sound chat from which nothing can be learned. The text is a line of the summary, without a row's details."""


TURNS_CUT, SYSTEM_CUT, ANSWER_CUT = "oldest turns left out", "system message left out", "answer cut"
QUESTION_TOO_LONG = "the last question leaves no room for an answer"
SAME_AFTER_CUT = "the answers are the same as far as there is room"


def encode_preference(
    tokenizer: PreTrainedTokenizerFast, preference: Preference, max_tokens: int
) -> tuple[list[int], list[int], list[int]]:
    """Return (prompt with the header of the answer, chosen, rejected) as token ids; prompt + either fit `max_tokens`.

    Cut as in `truncate_chat`, by the longer of the two answers; an answer ends in `</s>` unless it was cut.
    Raises Unusable if no answer fits, or the two are the same as far as they fit.
    """
    encoded = encode_texts(tokenizer, [preference.chosen, preference.rejected])
    chosen, rejected = ([*ids, EOS_ID] for ids in encoded)
    longer = preference.chosen if len(chosen) >= len(rejected) else preference.rejected
    messages = [*preference.prompt_messages, {"role": ANSWER_ROLE, "content": longer}]
    chat = _truncate(tokenizer, messages, max_tokens)
    room = max_tokens - chat.answer_start
    if chosen[:room] == rejected[:room]:
        raise Unusable(SAME_AFTER_CUT)
    return chat.ids[: chat.answer_start], chosen[:room], rejected[:room]


def _truncate(tokenizer: PreTrainedTokenizerFast, messages: list[Message], max_tokens: int) -> TruncatedChat:
    try:
        return truncate_chat(tokenizer, messages, max_tokens)
    except PromptTooLong:
        raise Unusable(QUESTION_TOO_LONG) from None


def _bytes_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> int:
    """UTF-8 bytes that `ids` stand for: in a byte-level vocabulary every character of a token is one byte."""
    return sum(map(len, tokenizer.convert_ids_to_tokens(ids)))


# --- from a block of rows to arrays ----------------------------------------------------------------------------------


@dataclass
class _Part:
    """What became of one block: arrays to append, rows to count, rows to report."""

    ids: list[bytes] = field(default_factory=list)  # uint16, a document each
    targets: list[bytes] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    n_bytes: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    n_rows: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, BadLine]] = field(default_factory=list)  # (line of the summary, the row and its reason)

    def add(self, ids: Sequence[int], content: bytes, n_bytes: int) -> None:
        self.ids.append(array.array("H", ids).tobytes())
        self.lengths.append(len(ids))
        self.n_bytes.append(n_bytes)
        self.keys.append(hashlib.blake2b(content, digest_size=8).digest())


CANNOT_READ, NO_TEXT, EMPTY, NO_CHAT = "cannot be read", "no text", "empty text", "no sound chat"


def _rows_of(block: Block, part: _Part) -> Iterator[tuple[int, dict]]:
    """(line, data) of the rows that can be read; the others are reported in `part`."""
    for row in parse_block(block):
        part.n_rows += 1
        if isinstance(row, BadLine):
            part.skipped.append((CANNOT_READ, row))
        else:
            yield row.line, row.data


def _encode_documents(block: Block, tokenizer: PreTrainedTokenizerFast, text_field: str) -> _Part:
    part = _Part()
    texts = []
    if block.kind == "text":  # a line of a TXT file
        text_field = "text"
    for line, data in _rows_of(block, part):
        text = data.get(text_field)
        if isinstance(text, str) and text.strip():
            texts.append(text)
        elif text_field not in data:
            part.skipped.append((NO_TEXT, BadLine(line, f"no {text_field}; the fields are {field_names(data)}")))
        elif text is None or isinstance(text, str):
            part.skipped.append((EMPTY, BadLine(line, f"{text_field} is empty")))
        else:
            reason = f"{text_field} is not a text but {type(text).__name__}"
            part.skipped.append((NO_TEXT, BadLine(line, reason)))
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        content = text.encode("utf-8")
        part.add([BOS_ID, *ids, EOS_ID], content, len(content))
    return part


def _encode_chats(block: Block, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> _Part:
    part = _Part()
    for line, data in _rows_of(block, part):
        try:
            messages = parse_conversation(data)
            chat = _truncate(tokenizer, messages, max_tokens)
        except UserError as reason:
            part.skipped.append((NO_CHAT, BadLine(line, str(reason))))
        except Unusable as reason:
            part.skipped.append((str(reason), BadLine(line, f"{reason} in {max_tokens} tokens")))
            part.dropped[str(reason)] += 1
        else:
            if chat.answer_cut:
                n_bytes = _bytes_of(tokenizer, chat.ids[chat.answer_start :])
            else:
                n_bytes = sum(len(m["content"].encode("utf-8")) for m in chat.messages if m["role"] == ANSWER_ROLE)
            part.add(chat.ids, json.dumps(messages).encode(), n_bytes)
            part.targets.append(bytes(chat.loss_mask))
            part.cut[TURNS_CUT] += chat.dropped_turns > 0
            part.cut[SYSTEM_CUT] += chat.dropped_system
            part.cut[ANSWER_CUT] += chat.answer_cut
    return part


# --- the cache -------------------------------------------------------------------------------------------------------


def _cached(
    kind: str,
    paths: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    settings: dict[str, Any],
    convert: Callable[[Block], _Part],
    num_workers: int | None,
    log: Callable[[str], None],
) -> TokenizedDataset:
    """The corpus from `cache_dir`, built first if it is not there."""
    if not paths:
        raise UserError("no data files given: name at least one")
    if len(tokenizer) > 1 << 16:
        raise UserError(f"a vocabulary of {len(tokenizer):,} does not fit in 16 bits: at most 65,536 are possible")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        hashes = content_hashes(paths, cache_dir)
        formats = [(file_format(path), path.suffix.lower()) for path in paths]  # the reader goes by the name
        key = [VERSION, kind, settings, tokenizer_hash(tokenizer), list(zip(formats, hashes, strict=True))]
        fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        folder = cache_dir / f"{kind}-{fingerprint}"
        corpus = _open(folder)
        if corpus is not None:
            log(f"tokens: {_counts(corpus.info)}, ready in {folder}")
            return corpus
        remove_stale_builds(cache_dir)
        _build(folder, kind, paths, settings, convert, num_workers or os.cpu_count() or 1, hashes, log)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"no space left in {cache_dir} for the tokens: free some and run this again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise UserError(
                f"cannot write tokens to {error.filename or cache_dir} ({error.strerror}): choose another folder"
            ) from None
        raise
    corpus = _open(folder)
    if corpus is None:
        raise UserError(f"{folder}: the tokens were changed by somebody else just after they were written; run again")
    return corpus


def _build(
    folder: Path,
    kind: str,
    paths: list[Path],
    settings: dict[str, Any],
    convert: Callable[[Block], _Part],
    num_workers: int,
    hashes: list[str],
    log: Callable[[str], None],
) -> None:
    """Make `folder`, complete or not at all. If another process was faster, its result is as good."""
    started = time.monotonic()
    before = [_state(path) for path in paths]
    with _temporary_folder(folder) as tmp:
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(_Writer(tmp, has_targets=kind == "chat"))
            progress = stack.enter_context(Progress("tokens", sum(map(total_bytes, paths))))
            blocks = ((path, block) for path in paths for block in iter_blocks(path, on_bytes=progress.update))
            rows: Counter[Path] = Counter()
            for path, part in _map_in_threads(convert, blocks, num_workers):
                rows[path] += part.n_rows
                writer.add(path, part)
                progress.kept = writer.documents
        for path, state in zip(paths, before, strict=True):
            if not rows[path]:
                raise UserError(f"{path}: no rows in it; download it again or remove it from the inputs")
            if _state(path) != state:
                raise UserError(f"{path}: the file changed while it was read; run again when it is complete")
        info = {
            "kind": kind,
            "settings": settings,
            "sources": [
                {"name": path.name, "bytes": path.stat().st_size, "blake2b": digest, "rows": rows[path]}
                for path, digest in zip(paths, hashes, strict=True)
            ],
            **writer.info(),
            "seconds": round(time.monotonic() - started, 2),
        }
        _check_enough(paths, info, writer.first_skipped)
        with (tmp / "info.json").open("w", encoding="utf-8") as file:
            json.dump(info, file, ensure_ascii=False, indent=2)
            file.flush()
            os.fsync(file.fileno())
        fsync_dir(tmp)
        _move_into_place(tmp, folder)
    log(_summary(info, writer.first_skipped, folder))


def _check_enough(paths: list[Path], info: dict[str, Any], first_skipped: list[str]) -> None:
    """UserError if nothing was usable, or too little of what could be read."""
    names = ", ".join(map(str, paths))
    first = f"; the first is {first_skipped[0]}" if first_skipped else ""
    n_dropped = sum(info["dropped"].values())
    if n_dropped > MAX_WITHOUT_TARGET * (info["documents"] + n_dropped):
        raise UserError(
            f"{names}: nothing can be learned from {n_dropped:,} of {info['documents'] + n_dropped:,} chats, more than "
            f"{MAX_WITHOUT_TARGET:.0%} ({_named_counts(info['dropped'])}){first}. Allow longer chats or remove these"
        )
    if not info["documents"]:
        raise UserError(
            f"{names}: no usable row: {_named_counts(info['skipped'])}{first}. Check the format of the data"
        )


class _Writer:
    """The files of a corpus, appended to part by part; nothing but counters stays in memory."""

    def __init__(self, folder: Path, has_targets: bool):
        names = [name for name in DTYPES if has_targets or name != "targets"]
        self.files = {name: (folder / f"{name}.bin").open("wb") for name in names}
        self.list = (folder / "skipped.jsonl").open("w", encoding="utf-8")
        self.documents = self.tokens = self.n_targets = self.n_bytes = 0
        self.skipped: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.first_skipped: list[str] = []
        self.files["offsets"].write(np.zeros(1, np.int64).tobytes())

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind, *exc) -> None:
        for file in (*self.files.values(), self.list):
            try:
                if kind is None:
                    file.flush()
                    os.fsync(file.fileno())
                file.close()
            except OSError:
                if kind is None:
                    raise  # else the first error is the one to tell

    def add(self, path: Path, part: _Part) -> None:
        lengths = np.array(part.lengths, np.int64)
        self.files["tokens"].write(b"".join(part.ids))
        if "targets" in self.files:
            targets = b"".join(part.targets)
            self.files["targets"].write(targets)
            self.n_targets += targets.count(1)
        self.files["offsets"].write((self.tokens + np.cumsum(lengths)).tobytes())
        self.files["n_bytes"].write(np.array(part.n_bytes, np.int64).tobytes())
        self.files["keys"].write(b"".join(part.keys))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.n_bytes += sum(part.n_bytes)
        self.dropped += part.dropped
        self.cut += part.cut
        for kind, bad in part.skipped:
            self.skipped[kind] += 1
            if len(self.first_skipped) < LISTED:
                self.first_skipped.append(f"{path.name}:{bad.line}: {bad.reason}")
            row = {"file": str(path), "line": bad.line, "reason": bad.reason}
            self.list.write(json.dumps(row, ensure_ascii=False) + "\n")

    def info(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "targets": self.n_targets if "targets" in self.files else self.tokens - self.documents,
            "bytes": self.n_bytes,
            "skipped": dict(self.skipped.most_common()),  # every row that is not in the corpus
            "dropped": dict(self.dropped.most_common()),  # of these the sound ones, without a target
            "cut": dict((+self.cut).most_common()),  # chats that are not whole
            "files": {name: os.path.getsize(file.name) for name, file in self.files.items()},
        }


def _open(folder: Path) -> TokenizedDataset | None:
    """The corpus in `folder`; None if there is none or it is not whole."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        for name, size in info["files"].items():
            if (folder / f"{name}.bin").stat().st_size != size:
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    arrays = {name: np.memmap(folder / f"{name}.bin", DTYPES[name], mode="r") for name in info["files"]}
    info["folder"] = str(folder)
    return TokenizedDataset(**{"targets": None, **arrays}, fingerprint=folder.name.rpartition("-")[2], info=info)


def _move_into_place(tmp: Path, folder: Path) -> None:
    if folder.exists() and _open(folder) is None:  # damaged: out of the way with it
        with contextlib.suppress(OSError):
            trash = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
            os.rename(folder, trash / folder.name)
            shutil.rmtree(trash, ignore_errors=True)
    try:
        os.rename(tmp, folder)
    except OSError:
        if _open(folder) is None:
            raise
        return  # another process built the same in the meantime
    fsync_dir(folder.parent)


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, locked while this process works in it, removed afterwards if it is still there."""
    tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    lock = _try_lock(tmp)
    try:
        umask = os.umask(0)  # mkdtemp makes private folders; a corpus should be as readable as any new folder
        os.umask(umask)
        tmp.chmod(0o777 & ~umask)
        yield tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_stale_builds(cache_dir: Path) -> None:
    """Remove what builds left behind that were killed. A running build holds a lock on its folder and is left alone."""
    for folder in cache_dir.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            if not folder.is_dir() or time.time() - folder.stat().st_mtime < STALE_SECONDS:
                continue
            lock = _try_lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process dies; None if it is locked or cannot be."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _map_in_threads(
    work: Callable[[Block], _Part], blocks: Iterable[tuple[Path, Block]], num_workers: int
) -> Iterator[tuple[Path, _Part]]:
    """Apply `work` to blocks in threads (the tokenizer's code runs outside of Python's lock); results keep the order.

    No more than two blocks per thread are on their way, so a slow disk on one side never fills the memory.
    """
    with _serial_tokenizers(), ThreadPoolExecutor(num_workers, thread_name_prefix="tokens") as pool:
        waiting: deque = deque()
        try:
            for path, block in blocks:
                waiting.append((path, pool.submit(work, block)))
                if len(waiting) > 2 * num_workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Each of our threads encodes alone. The library's own threads would fight with them, and could not be forked."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# --- what is in a file -----------------------------------------------------------------------------------------------


def content_hashes(paths: Sequence[Path], cache_dir: Path) -> list[str]:
    """A hash of the content of each file, remembered in `cache_dir`/hashes.json as long as the file is not touched."""
    memo = cache_dir / "hashes.json"
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
        known = known if isinstance(known, dict) else {}
    except (FileNotFoundError, ValueError):
        known = {}
    for path in paths:
        file_format(path)
        check_readable(path)
    found = {}
    todo = [path for path in paths if known.get(str(path.resolve()), [None])[0] != _state(path)]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress("hash", sum(map(total_bytes, todo)))) if todo else None
        for path in paths:
            name, state = str(path.resolve()), _state(path)
            if path not in todo:
                found[name] = known[name][1]
                continue
            digest = hashlib.blake2b(digest_size=16)
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                    progress.update(len(piece))
            found[name] = digest.hexdigest()
            # Times are coarse: a file written this very moment may be written again and look the same.
            if _state(path) == state and time.time_ns() - max(state[1:3]) > 2_000_000_000:
                known[name] = [state, found[name]]
    if todo:
        with atomic_write(memo) as file:
            json.dump(known, file, indent=1)
    return [found[str(path.resolve())] for path in paths]


def _state(path: Path) -> list[int]:
    """What changes when a file is changed: size, times of change of content and of the file's entry, its number."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


# --- words -----------------------------------------------------------------------------------------------------------


def _named_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "only blank lines"


def _counts(info: dict[str, Any]) -> str:
    noun = "chats" if info["kind"] == "chat" else "documents"
    learned = f", {info['targets'] / info['tokens']:.0%} of them learned" if info["kind"] == "chat" else ""
    return f"{info['documents']:,} {noun}, {info['tokens']:,} tokens{learned}"


def _summary(info: dict[str, Any], first_skipped: list[str], folder: Path) -> str:
    """What was made and what was skipped, as lines for people."""
    n_bytes = sum(source["bytes"] for source in info["sources"])
    rate = n_bytes / 1e6 / max(info["seconds"], 1e-9)
    lines = [f"tokens: {_counts(info)} in {info['seconds']:.1f} s, {rate:.1f} MB/s; kept in {folder}"]
    if info["cut"]:
        lines.append(f"  chats cut: {_named_counts(info['cut'])}")
    if info["skipped"]:
        total = sum(info["skipped"].values())
        lines.append(f"  rows skipped: {_named_counts(info['skipped'])}")
        lines.append(f"  the first {len(first_skipped)} of {total:,} (all are in {folder / 'skipped.jsonl'}):")
        lines += [f"    {bad}" for bad in first_skipped]
    return "\n".join(lines)
