"""Read the texts a tokenizer is trained on and measured with: a uniform sample, and a held-out part of every file."""

from __future__ import annotations

import hashlib
import heapq
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.progress import Progress
from data_pipeline.readers import field_names, iter_records
from data_pipeline.records import CHAT_COLUMNS, Malformed, read_messages
from data_pipeline.text_files import BadLine, BadLineLog, check_readable, total_bytes
from model.chat_format import message_parts

SOURCE_SUFFIXES = {".py", ".md", ".sh"}
MEASURED_BYTES = 16_000_000  # of held-out text per file: enough for four digits


def row_text(data: dict[str, Any], text_field: str = "text") -> str:
    """Return the text of a row: a field, or all messages of a dialogue, one a line. Malformed if there is none."""
    if text_field in data:
        text = data[text_field]
        if not isinstance(text, str):
            raise Malformed(f"{text_field} is not a text but {type(text).__name__}")
    elif any(data.keys() >= set(names) for names in CHAT_COLUMNS):
        pieces = (piece for message in read_messages(data) for piece in message_parts(message)[::2])  # without tags
        text = "\n".join(piece for piece in pieces if piece)
    else:
        raise Malformed(f"no field {text_field!r}; the fields are {field_names(data)}: use --text_field")
    if not text.strip():
        raise Malformed("the text is empty")
    return text


def is_held_out(text: str, fraction: float) -> bool:
    """Return whether `text` is measured instead of trained on: a pure function of the text, the same in every file."""
    return _uniform(text, b"held out") < fraction


def _uniform(text: str, purpose: bytes) -> float:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big") / 2**64


class Sample:
    """A uniform sample of at most `max_bytes` of the texts that are added, in memory of that size.

    The texts with the smallest hashes stay, so the sample does not depend on their order.
    """

    def __init__(self, max_bytes: float):
        self.max_bytes, self.n_bytes, self.seen_bytes, self.seen = max_bytes, 0, 0, 0
        self.heap: list[tuple[float, int, str]] = []  # the largest hash on top

    def add(self, text: str) -> None:
        """Count a text, and keep it if it belongs to the sample."""
        size = len(text.encode("utf-8"))
        self.seen += 1
        self.seen_bytes += size
        self.n_bytes += size
        heapq.heappush(self.heap, (-_uniform(text, b"sample"), size, text))
        while self.n_bytes > self.max_bytes and len(self.heap) > 1:
            self.n_bytes -= heapq.heappop(self.heap)[1]

    def __iter__(self) -> Iterator[str]:
        return (text for _, _, text in self.heap)

    def __len__(self) -> int:
        return len(self.heap)


def read_texts(
    path: Path, text_field: str, on_bad: Callable[[BadLine], object], on_bytes: Callable[[int], None]
) -> Iterator[str]:
    """Yield the texts of a file; rows without one go to `on_bad`. UserError for a file that cannot be read."""
    if path.suffix.lower() in SOURCE_SUFFIXES:
        check_readable(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: invalid UTF-8 at byte {error.start + 1}; save it as UTF-8") from None
        on_bytes(path.stat().st_size)
        yield from re.findall(r"(?s).+?(?:\n{3,}|$)", text)  # functions and classes: two blank lines between them
        return
    for record in iter_records(path, on_bad, on_bytes=on_bytes):
        try:
            text = row_text(record.data, text_field)
        except Malformed as error:
            on_bad(BadLine(record.line, str(error)))
        else:
            yield text


class HeldOut:
    """The different held-out texts of one file, up to MEASURED_BYTES."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}
        self.n_bytes = 0

    def add(self, text: str) -> None:
        """Keep a text for the measurement, until there are enough."""
        if self.n_bytes < MEASURED_BYTES and text not in self.texts:
            self.texts[text] = None
            self.n_bytes += len(text.encode("utf-8"))


def read_data(
    data_path: Sequence[Path], eval_path: Sequence[Path], text_field: str, held_out: float, max_bytes: float
) -> tuple[Sample, dict[str, HeldOut]]:
    """Read all files once; return the texts to train on, and by file name the texts to measure."""
    sample = Sample(max_bytes)
    measured: dict[str, HeldOut] = {}
    skipped = BadLineLog()
    read_before: set[Path] = set()
    labels = file_labels([*data_path, *eval_path])
    with Progress("reading", sum(map(total_bytes, [*data_path, *eval_path]))) as progress:
        for number, path in enumerate([*data_path, *eval_path]):
            trained = number < len(data_path)
            measured_here = measured.setdefault(labels[path], HeldOut())
            bad = BadLineLog()
            # The bad lines of a file that is named twice are reported once.
            logs = [bad] if path in read_before else [bad, skipped]

            def on_bad(line: BadLine, path: Path = path, logs: list[BadLineLog] = logs) -> None:
                for log in logs:
                    log.add(path, line)

            n_texts = 0
            for text in read_texts(path, text_field, on_bad, progress.update):
                n_texts += 1
                if is_held_out(text, held_out):
                    measured_here.add(text)
                elif trained:
                    sample.add(text)
                    progress.kept = sample.seen
            if bad.incomplete:
                raise UserError(f"{bad.incomplete[0]}. Repair the file or download it again")
            if not n_texts:
                raise UserError(
                    f"{bad.first[0] if bad.count else f'{path}: no text in it'}; no row of it could be used"
                )
            read_before.add(path)
    if skipped.count:
        print(f"skipped {skipped.count:,} rows without usable text:", *skipped.shown(), sep="\n  ", file=sys.stderr)
    if not len(sample):
        raise UserError(f"nothing left to train on: --held_out {held_out} took every text; use a smaller fraction")
    return sample, measured


def file_labels(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the names that files are reported by: with their folder where two have the same name.

    Source files are many and small, so they count together.
    """
    names = Counter(path.name for path in set(paths))
    return {
        path: f"*{path.suffix.lower()}" if path.suffix.lower() in SOURCE_SUFFIXES
        else path.name if names[path.name] == 1
        else f"{path.absolute().parent.name}/{path.name}"
        for path in paths
    }  # fmt: skip
