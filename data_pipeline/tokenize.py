"""Turn text into tokens on disk, once: training then reads memory-mapped files and never sees a tokenizer again.

    dataset = tokenize_pretrain_data([Path("pretrain_data.csv")], load_tokenizer(), Path("out/cache"))
    train, val = dataset.split(0.01)
    dataset.document(train[0])                # uint16 token ids: <s>, the text, </s>

A tokenized dataset is a folder with a file NAME.bin for each array of `TokenizedDataset`, info.json (counts and sizes of
the files), and skipped.jsonl (rows that were not used, each with file, line and reason); see docs/formats.md.

The folder's name is a hash of the content of the data, the tokenizer and the settings, so it is never out of date. It is
built under another name and renamed when it is complete. Dialogues are encoded in tokenize_chats.py.
"""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import UserError, stoppable
from common.files import atomic_write, cached_folder, explain_write_errors, short_hash, write_json
from common.progress import Progress
from data_pipeline.readers import Block, columns, field_names, file_format, iter_blocks, map_blocks, parse_block
from data_pipeline.text_files import BadLine, BadLineLog, file_state, hash_files, total_bytes
from model.tokenizer import BOS_ID, EOS_ID, encode_texts, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1  # of how tokens are made: raising it makes older training states impossible to resume
STOPPED = "tokenizing was not finished; no other file was changed. The same command starts it again"
MAX_DROPPED = 0.01  # a larger share of rows that cannot be used is a mistake in data or settings

DTYPES = {
    "tokens": np.uint16,
    "loss_mask": np.bool_,
    "offsets": np.int64,
    "n_bytes": np.int64,
    "content_hashes": np.uint64,
    "n_images": np.int64,
    "image_offsets": np.int64,
    "image_bytes": np.uint8,
}
# The arrays that not every kind of dataset has.
EXTRA = {"pretrain": (), "chat": ("loss_mask",), "image": ("loss_mask", "n_images", "image_offsets", "image_bytes")}


@dataclass(frozen=True)
class TokenizedDataset:
    """Documents as tokens, on disk.

    Attributes:
        tokens: (total tokens,) uint16, all documents one after another.
        loss_mask: (total tokens,) bool, the tokens to train on; None: all but the first of each document.
        offsets: (documents + 1,) int64; document i is tokens[offsets[i]:offsets[i + 1]].
        n_bytes: (documents,) int64, UTF-8 bytes of the text (of a dialogue: of the answers), for bits per byte.
        content_hashes: (documents,) uint64, the same for duplicates.
        fingerprint: identifies the content of the data, the tokenizer and the settings.
        info: counts, skipped rows by reason, names of the sources.
        n_images: (documents,) int64, how many images each has; None: documents of this kind have none.
        image_offsets, image_bytes: (images + 1,) int64 and uint8; image i is image_bytes[offsets[i]:offsets[i + 1]].
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    offsets: np.ndarray
    n_bytes: np.ndarray
    content_hashes: np.ndarray
    fingerprint: str
    info: dict[str, Any]
    n_images: np.ndarray | None = None
    image_offsets: np.ndarray | None = None
    image_bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.content_hashes)

    def document(self, i: int) -> np.ndarray:
        """Return the token ids of document `i`, (length,) uint16: a view of the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(documents,) int64: tokens of each document."""
        return np.diff(np.asarray(self.offsets))

    @functools.cached_property
    def source_ends(self) -> np.ndarray:
        """(sources,) int64: the number of the first document after those of each source file."""
        return np.cumsum([source["documents"] for source in self.info["sources"]])

    def split(self, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the documents for (training, validation), each ascending.

        The content of a document alone decides where it belongs: duplicates stay together, and it stays there when others
        are added or the order changes. So the share is `val_fraction` on average only; but of two or more different
        documents at least one is in each part (unless val_fraction is 0).
        """
        return split_by_hash(np.asarray(self.content_hashes), val_fraction)


def split_by_hash(hashes: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return indices for (training, validation) by content hash, (n,) uint64: see `TokenizedDataset.split`."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: it must be at least 0 and less than 1")
    is_val = hashes < np.uint64(int(val_fraction * 2**64))
    if val_fraction > 0 and not is_val.any():
        is_val = hashes == hashes.min()
    if is_val.all():
        is_val = hashes != hashes.max()
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def tokenize_pretrain_data(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    *,
    text_field: str = "text",
    max_dropped: float = MAX_DROPPED,
) -> TokenizedDataset:
    """Return the texts of CSV, JSONL, TXT or Parquet files as documents `<s>`text`</s>`; from the cache if they are there.

    Rows without a text are skipped, counted and listed. Memory does not depend on the size of the files.

    Args:
        text_field: column or field of the text (a line of a TXT file needs none).
        max_dropped: largest share of rows that may be skipped, see `check_dropped`.

    Raises UserError if a file cannot be used, too many rows have no text, or the cache cannot be written.
    """
    for path in paths:
        names = columns(path)
        if names is not None and text_field not in names:
            separator = next(
                (word for mark, word in ((";", "semicolons"), ("\t", "tabs")) if mark in "".join(names)), None
            )
            advice = "name the column with --text_field; a file needs a first line with the names of its columns"
            if len(names) == 1 and separator:
                advice = f"its columns are separated by {separator}: save it with commas"
            raise UserError(f"{path}: no column {text_field}, this file has {', '.join(names)}; {advice}")
    encode = functools.partial(_encode_documents, tokenizer=tokenizer, text_field=text_field)
    return cached_dataset("pretrain", paths, tokenizer, cache_dir, {"text_field": text_field}, encode, max_dropped)


# --- from a block of rows to arrays ----------------------------------------------------------------------------------

# Why a row is skipped, after the number of such rows.
UNREADABLE, NO_TEXT, EMPTY = "unreadable", "without text", "empty"


@dataclass
class EncodedBlock:
    """The documents of one block, as arrays to append, and its rows to count and to report."""

    tokens: list[bytes] = field(default_factory=list)  # uint16, a document each
    loss_mask: list[bytes] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    n_bytes: list[int] = field(default_factory=list)
    content_hashes: list[bytes] = field(default_factory=list)
    images: list[list[bytes]] = field(default_factory=list)  # of each document
    n_rows: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, BadLine]] = field(default_factory=list)  # (why, for the summary; the row and its reason)

    def add(self, ids: Sequence[int], content: bytes, n_bytes: int) -> None:
        """Add a document: its tokens, the text that tells duplicates apart, and its length in bytes."""
        self.tokens.append(array.array("H", ids).tobytes())
        self.lengths.append(len(ids))
        self.n_bytes.append(n_bytes)
        self.content_hashes.append(hashlib.blake2b(content, digest_size=8).digest())

    def rows_of(self, block: Block) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line, data) of the rows that can be read; report the others."""
        for row in parse_block(block):
            self.n_rows += 1
            if isinstance(row, BadLine):
                self.skipped.append((UNREADABLE, row))
            else:
                yield row.line, row.data


def _encode_documents(block: Block, tokenizer: PreTrainedTokenizerFast, text_field: str) -> EncodedBlock:
    encoded = EncodedBlock()
    texts = []
    if block.kind == "text":  # a line of a TXT file
        text_field = "text"
    for line, data in encoded.rows_of(block):
        text = data.get(text_field)
        if isinstance(text, str) and text.strip():
            texts.append(text)
        elif text_field not in data:
            reason = f"no {text_field}; the fields are {field_names(data)}"
            encoded.skipped.append((NO_TEXT, BadLine(line, reason)))
        elif text is None or isinstance(text, str):
            encoded.skipped.append((EMPTY, BadLine(line, f"{text_field} is empty")))
        else:
            reason = f"{text_field} is not a text but {type(text).__name__}"
            encoded.skipped.append((NO_TEXT, BadLine(line, reason)))
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        content = text.encode("utf-8")
        encoded.add([BOS_ID, *ids, EOS_ID], content, len(content))
    return encoded


# --- the cache -------------------------------------------------------------------------------------------------------


def cached_dataset(
    kind: str,
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    settings: dict[str, Any],
    encode: Callable[[Block], EncodedBlock],
    max_dropped: float,
) -> TokenizedDataset:
    """Return the dataset from `cache_dir`, built first if it is not there; print a summary.

    Args:
        kind: one of `EXTRA`: which arrays there are.
        settings: all that `encode` depends on beside the tokenizer.
        max_dropped: see `check_dropped`. The tokens are kept whatever it is, so that trying another one costs nothing.
    """
    if not paths:
        raise UserError("no data files given: name at least one")
    if len(tokenizer) > 1 << 16:
        raise UserError(f"a vocabulary of {len(tokenizer):,} does not fit in 16 bits: at most 65,536 are possible")
    with explain_write_errors(cache_dir), stoppable(STOPPED):
        cache_dir.mkdir(parents=True, exist_ok=True)
        formats = [(file_format(path), path.suffix.lower()) for path in paths]  # the reader depends on the name
        hashes = hash_files(paths, cache_dir)
        key = [VERSION, kind, settings, tokenizer_hash(tokenizer), list(zip(formats, hashes, strict=True))]
        folder = cache_dir / f"{kind}-{short_hash(key)}"
        facts = {"settings": settings, "vocab_size": len(tokenizer), "tokenizer": tokenizer_hash(tokenizer)}
        build = functools.partial(_build, kind=kind, paths=paths, hashes=hashes, encode=encode, facts=facts)
        dataset, built = cached_folder(folder, open_dataset, build, "tokenizing")
        info = dataset.info
        print(_summary(info, built))
        check_dropped(paths, info["skipped"], info["documents"], info["first_skipped"], info["incomplete"], max_dropped)
        return dataset


def _build(
    folder: Path, kind: str, paths: Sequence[Path], hashes: Sequence[str], encode: Callable[[Block], EncodedBlock],
    facts: dict[str, Any],
) -> None:  # fmt: skip
    """Write the arrays and info.json into `folder`; `facts` are added to the latter."""
    started = time.monotonic()
    before = [file_state(path) for path in paths]
    rows: Counter[Path] = Counter()
    documents: Counter[Path] = Counter()
    with contextlib.ExitStack() as stack:
        writer = _ArrayWriter(folder, kind, stack)
        progress = stack.enter_context(Progress("tokens", sum(map(total_bytes, paths))))
        blocks = ((path, block) for path in paths for block in iter_blocks(path, on_bytes=progress.update))
        for path, encoded in _encode_in_threads(encode, blocks):
            rows[path] += encoded.n_rows
            documents[path] += len(encoded.lengths)
            writer.add(path, encoded)
            progress.kept = writer.documents
    for path, state in zip(paths, before, strict=True):
        if not rows[path]:
            raise UserError(f"{path}: no rows in it; download it again or remove it from the inputs")
        if file_state(path) != state:
            raise UserError(f"{path}: the file changed while it was read; run again when it is complete")
    sources = [
        {"name": path.name, "bytes": state[0], "rows": rows[path], "documents": documents[path], "blake2b": digest}
        for path, state, digest in zip(paths, before, hashes, strict=True)
    ]
    seconds = round(time.monotonic() - started, 2)
    if not writer.documents:
        names, skipped = ", ".join(map(str, paths)), writer.skipped_rows
        first = f"; the first is {skipped.first[0]}" if skipped.count else ""
        raise UserError(f"{names}: no usable row: {_numbers(writer.skipped)}{first}. Check the format of the data")
    write_json(folder / "info.json", {"kind": kind, "sources": sources, **writer.info(), "seconds": seconds} | facts)


def check_dropped(
    paths: Sequence[Path],
    skipped: Mapping[str, int],
    n_used: int,
    first: Sequence[str],
    incomplete: Sequence[str],
    max_dropped: float,
) -> None:
    """Raise UserError if more than the share `max_dropped` of the rows cannot be used, or the end of a file is lost.

    Args:
        skipped: reason -> how many rows cannot be used, beside `n_used` that can.
        first: some of them, "file:line: reason".
        incomplete: the same for each file whose end was not read, so that nobody knows how many rows were lost.
    """
    n_skipped = sum(skipped.values())
    n_rows = n_used + n_skipped
    enough = -(-100 * n_skipped // n_rows) / 100
    if incomplete and max_dropped < 1:
        raise UserError(
            f"{'; '.join(incomplete)}. Repair the file or download it again; max_dropped=1 trains on what was read"
        )
    if n_skipped / n_rows > max_dropped:
        longer = "allow longer ones with --max_seq_len, " if "too long" in " ".join(skipped) else ""
        raise UserError(
            f"{', '.join(map(str, paths))}: {n_skipped:,} of {n_rows:,} rows cannot be used, more than "
            f"max_dropped={max_dropped:g} allows ({_numbers(skipped)}). The first: {'; '.join(first[:3])}. Correct or "
            f"remove such rows, {longer}or train on the others with max_dropped={enough}"
        )


class _ArrayWriter:
    """The files of a dataset, appended to block by block; only counters stay in memory."""

    def __init__(self, folder: Path, kind: str, stack: contextlib.ExitStack) -> None:
        left_out = {name for extra in EXTRA.values() for name in extra} - set(EXTRA[kind])
        names = [name for name in DTYPES if name not in left_out]
        self.files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names}
        listed = stack.enter_context(atomic_write(folder / "skipped.jsonl"))
        self.skipped_rows = BadLineLog(listed)
        self.documents = self.tokens = self.n_targets = self.n_bytes = self.images = self.image_bytes = 0
        self.skipped: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        for name in {"offsets", "image_offsets"} & self.files.keys():
            self.files[name].write(np.zeros(1, np.int64).tobytes())

    def add(self, path: Path, encoded: EncodedBlock) -> None:
        """Write the documents of a block behind those before, and count what was skipped in it."""
        lengths = np.array(encoded.lengths, np.int64)
        self.files["tokens"].write(b"".join(encoded.tokens))
        if "loss_mask" in self.files:
            loss_mask = b"".join(encoded.loss_mask)
            self.files["loss_mask"].write(loss_mask)
            self.n_targets += loss_mask.count(1)
        self.files["offsets"].write((self.tokens + np.cumsum(lengths)).tobytes())
        self.files["n_bytes"].write(np.array(encoded.n_bytes, np.int64).tobytes())
        self.files["content_hashes"].write(b"".join(encoded.content_hashes))
        if "n_images" in self.files:
            self._add_images(encoded.images)
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.n_bytes += sum(encoded.n_bytes)
        self.cut += encoded.cut
        for kind, bad in encoded.skipped:
            self.skipped[kind] += 1
            self.skipped_rows.add(path, bad)

    def _add_images(self, documents: list[list[bytes]]) -> None:
        images = [image for document in documents for image in document]
        sizes = np.array([len(image) for image in images], np.int64)
        self.files["n_images"].write(np.array([len(document) for document in documents], np.int64).tobytes())
        self.files["image_offsets"].write((self.image_bytes + np.cumsum(sizes)).tobytes())
        self.files["image_bytes"].write(b"".join(images))
        self.images += len(images)
        self.image_bytes += int(sizes.sum())

    def info(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "targets": self.n_targets if "loss_mask" in self.files else self.tokens - self.documents,
            "bytes": self.n_bytes,
            **({"images": self.images} if "n_images" in self.files else {}),
            "skipped": dict(self.skipped.most_common()),  # rows that are not in the dataset
            "first_skipped": self.skipped_rows.first,
            "incomplete": self.skipped_rows.incomplete,
            "cut": dict(self.cut.most_common()),  # dialogues that are not complete
            "files": {name: os.path.getsize(file.name) for name, file in self.files.items()},
        }


def open_dataset(folder: Path) -> TokenizedDataset | None:
    """Return the dataset in `folder`; None if there is none, it is damaged, or an earlier version wrote it."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if not info.keys() >= {"first_skipped", "incomplete", "vocab_size"}:
            return None
        if not all("documents" in source for source in info["sources"][1:]):
            return None
        arrays: dict[str, Any] = {"loss_mask": None}
        for name, size in info["files"].items():
            path = folder / f"{name}.bin"  # an empty file, as that of images where there are none, cannot be mapped
            arrays[name] = np.memmap(path, DTYPES[name], mode="r") if size else np.fromfile(path, DTYPES[name])
            if arrays[name].nbytes != size:
                return None
        info["folder"] = str(folder)
        dataset = TokenizedDataset(**arrays, fingerprint=folder.name.rpartition("-")[2], info=info)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    begin, end = int(dataset.offsets[0]), int(dataset.offsets[-1])
    sound = (begin, end) == (0, len(dataset.tokens)) and len(dataset.offsets) == len(dataset) + 1
    return dataset if sound and dataset.lengths.min() > 1 else None


def _encode_in_threads(
    encode: Callable[[Block], EncodedBlock], blocks: Iterable[tuple[Path, Block]]
) -> Iterator[tuple[Path, EncodedBlock]]:
    """Apply `encode` to blocks in threads: the tokenizer's code runs outside of Python's lock.

    Each of our threads encodes alone. The library's own threads would compete with them, and could not be forked.
    """
    name, n_threads = "TOKENIZERS_PARALLELISM", os.cpu_count() or 1
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        with ThreadPoolExecutor(n_threads, thread_name_prefix="tokens") as pool:
            yield from map_blocks(pool, encode, blocks, n_threads)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


# --- summary ---------------------------------------------------------------------------------------------------------


def _numbers(counts: Mapping[str, int]) -> str:
    """Return "3 unreadable, 1 empty"."""
    return ", ".join(f"{n:,} {what}" for what, n in counts.items()) or "only blank lines"


def _counts(info: dict[str, Any]) -> str:
    is_chat = info["kind"] != "pretrain"
    noun = "dialogues" if is_chat else "documents"
    noun += f" with {info['images']:,} images" if "images" in info else ""
    trained = f", {info['targets'] / info['tokens']:.0%} of them are trained on" if is_chat else ""
    return f"{info['documents']:,} {noun}, {info['tokens']:,} tokens{trained}"


def _summary(info: dict[str, Any], built: bool) -> str:
    """Return the lines that say what was tokenized and what was skipped, with some of the rows if it was just built."""
    folder, first, n_skipped = Path(info["folder"]), info["first_skipped"], sum(info["skipped"].values())
    n_bytes = sum(source["bytes"] for source in info["sources"])
    rate = n_bytes / 1e6 / max(info["seconds"], 1e-9)
    how = f" in {info['seconds']:.1f} s, {rate:.1f} MB/s; kept in" if built else ", ready in"
    lines = [f"tokens: {_counts(info)}{how} {folder}"]
    if info["cut"]:
        lines.append(f"  too long: {_numbers(info['cut'])}")
    if n_skipped:
        lines.append(f"  skipped: {_numbers(info['skipped'])} (all are in {folder / 'skipped.jsonl'})")
    if n_skipped and built:
        lines.append(f"  the first {len(first)} of {n_skipped:,}:")
        lines += [f"    {bad}" for bad in first]
    return "\n".join(lines)
