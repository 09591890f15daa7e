"""Read raw text files of any size, one row at a time: JSONL, JSON, TXT, CSV (each also .gz or .zst) and Parquet.

    for record in iter_records(Path("dump.jsonl.zst"), on_bad=print):
        record.line, record.data["text"]

Memory does not grow with the file: not for a JSON array of 33 GB, a CSV field of a thousand lines or a file that is
one endless line. A row that cannot be read becomes a `BadLine` that says where and why; the rows around it are read.

To parse in several workers, cut the file with `iter_blocks` and send each block to `parse_block`.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import data_pipeline.text_files as text_files
from common.errors import UserError, first_line
from data_pipeline.text_files import BadLine, TruncatedArchive, check_readable, line_blocks, read_chunks, utf8_reason

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

PARQUET_ROWS = 64  # rows decoded at once: few, because one may be a whole book
TEXT_FORMATS = (".jsonl", ".json", ".txt", ".csv")
ARCHIVES = (".gz", ".zst")


@dataclass(frozen=True)
class Record:
    """One row of a raw file.

    `line` counts from 1: the physical line where the row starts, or the row number in a Parquet file or JSON array.
    `data` is the JSON object, the CSV row (column -> string), the Parquet row, or {"text": line} for TXT.
    """

    line: int
    data: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A piece of a file that one worker can parse: whole lines (`bytes`, the first is number `line`) or ready rows."""

    kind: str  # "json" (a JSON object a line), "text" (a document a line) or "rows" (already parsed)
    line: int
    data: bytes | list[Record | BadLine]


def iter_records(
    path: Path, on_bad: Callable[[BadLine], object] | None, *, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Record]:
    """Yield the rows of `path` in constant memory; rows that cannot be read go to `on_bad`.

    on_bad=None makes the first such row a UserError naming file, line and reason.
    on_bytes(n) gets how many bytes of the file (as it lies on the disk) were consumed since the last call.
    Raises UserError for a file that is missing, empty or of an unknown format.
    """
    empty = True
    for block in iter_blocks(path, on_bytes=on_bytes):
        for row in parse_block(block):
            empty = False
            if isinstance(row, Record):
                yield row
            elif on_bad is not None:
                on_bad(row)
            else:
                raise UserError(f"{path}, line {row.line}: {row.reason}")
    if empty:
        raise UserError(f"{path}: no rows in it; download it again or remove it from the inputs")


def iter_blocks(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> Iterator[Block]:
    """Cut `path` into blocks for `parse_block`, in order. Arguments and errors as `iter_records`."""
    kind = file_format(path)
    check_readable(path)
    if kind == ".parquet":
        yield from _rows(_parquet_rows(path, on_bytes or (lambda n: None)))
        return
    chunks = read_chunks(path, on_bytes or (lambda n: None))
    if kind == ".csv":
        yield from _rows(_csv_rows(path, chunks))
        return
    if kind in (".json", ".jsonl"):
        first = next(chunks, b"")
        chunks = itertools.chain([first], chunks)
        # Some dumps named .jsonl are one array, and some named .json have an object a line: the content decides.
        if re.match(rb"\s*\[\s*(\{|\]|$)", first):
            yield from _rows(_array_rows(chunks))
            return
    try:
        for line, data in line_blocks(chunks):
            if isinstance(data, BadLine):
                yield Block("rows", line, [data])
            else:
                yield Block("text" if kind == ".txt" else "json", line, data)
    except TruncatedArchive as error:
        yield Block("rows", error.line, [error.bad_line()])


def parse_block(block: Block) -> Iterator[Record | BadLine]:
    """Yield the rows of a block, and a BadLine for each that cannot be read. Blank lines are skipped."""
    if isinstance(block.data, list):
        yield from block.data
        return
    for number, raw in enumerate(block.data.split(b"\n"), start=block.line):
        if not raw or raw.isspace():
            continue
        try:
            text = raw.rstrip(b"\r").decode("utf-8")
            yield Record(number, {"text": text} if block.kind == "text" else _json_object(text))
        except UnicodeDecodeError as error:
            yield BadLine(number, utf8_reason(error))
        except _BadRow as error:
            yield BadLine(number, str(error))


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_blocks(
    pool: Executor, work: Callable[[Item], Result], blocks: Iterable[tuple[Path, Item]], num_workers: int
) -> Iterator[tuple[Path, Result]]:
    """Apply `work` to blocks in the workers of `pool`; yield (file, result) in the order of the blocks.

    At most two blocks per worker are waiting, so a slow disk on one side never fills the memory.
    """
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


def columns(path: Path) -> list[str] | None:
    """Return the column names of a CSV or Parquet file; None for formats without a header."""
    kind = file_format(path)
    check_readable(path)
    if kind == ".parquet":
        return _open_parquet(path).schema_arrow.names
    if kind == ".csv":
        return _csv_header(path, _csv_reader(_csv_lines(read_chunks(path, lambda n: None), [])))
    return None


def file_format(path: Path) -> str:
    """Return the format by the file's name, without .gz or .zst: ".jsonl", ".json", ".txt", ".csv" or ".parquet"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return ".parquet"
    if len(suffixes) > 1 and suffixes[-1] in ARCHIVES:
        suffixes.pop()
    if suffixes and suffixes[-1] in TEXT_FORMATS:
        return suffixes[-1]
    if suffixes and suffixes[-1] in (".xlsx", ".xls"):
        raise UserError(f"{path}: an Excel workbook is not read; save its sheet as CSV in UTF-8")
    if suffixes and suffixes[-1] == ".tsv":
        raise UserError(f"{path}: tabs as separators are not read; save it as CSV with commas")
    raise UserError(
        f"{path}: cannot tell its format from its name; rename it to end in "
        ".jsonl, .json, .txt or .csv (each also with .gz or .zst after it) or .parquet"
    )


def field_names(data: dict[str, Any]) -> str:
    """Return the first names of the fields of a row, for messages."""
    return ", ".join(map(str, list(data)[:8])) or "none"


# --- JSON ------------------------------------------------------------------------------------------------------------


class _BadRow(ValueError):
    """The row cannot be used; the text says why."""


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _json_object(text: str) -> dict[str, Any]:
    """Parse one JSON object; _BadRow says what is wrong with it."""
    try:
        value = _checked_object(json.loads(text))
    except json.JSONDecodeError as error:
        raise _BadRow(f"invalid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except RecursionError:
        raise _BadRow("invalid JSON: nested too deeply") from None
    except _BadRow:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise _BadRow(f"invalid JSON: {error}") from None
    if _SURROGATE_ESCAPE.search(text):  # rare, so the second look costs nothing on the whole
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise _BadRow("half of a surrogate pair (\\ud800 to \\udfff alone), which is not a character") from None
    return value


def _checked_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        name = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        raise _BadRow(f"not an object but {name}")
    return value


# ijson stops at a byte that is not UTF-8. It gets this noncharacter instead, which no text has, so only a row is lost.
_WRONG_BYTE = "\ufdd0"
codecs.register_error("mark", lambda error: (_WRONG_BYTE, error.end))  # type: ignore[attr-defined]


def _array_rows(chunks: Iterator[bytes]) -> Iterator[Record | BadLine]:
    """Yield the objects of one JSON array. After broken syntax nothing shows where a row starts: one BadLine, the end."""
    import ijson  # only arrays need it

    items = ijson.sendable_list()
    parser = ijson.items_coro(items, "item")
    decode = codecs.getincrementaldecoder("utf-8")("mark").decode
    row, waiting, broken, held = 0, 0, "", ""
    try:
        for chunk in itertools.chain(chunks, [b""]):
            digits = sys.get_int_max_str_digits()
            sys.set_int_max_str_digits(0)  # ijson's C code crashes on an integer that is over the limit
            try:
                text = held + decode(chunk, final=not chunk)
                whole = _WHOLE_ESCAPES.match(text) if chunk else None
                end = whole.end() if whole else len(text)
                text, held = _mark_lone_surrogates(text[:end]), text[end:]
                if text:
                    parser.send(text.encode())
                if not chunk:
                    parser.close()
            except (ijson.JSONError, ValueError) as error:
                message = error.args[0] if isinstance(error, ijson.JSONError) else error
                message = message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
                broken = f"invalid JSON: {message.splitlines()[0].rstrip('.')}"
                if "NaN" in text or "Infinity" in text:
                    broken += " (NaN and Infinity are not JSON: write null)"
            finally:
                sys.set_int_max_str_digits(digits)
            waiting = 0 if items else waiting + len(chunk)
            for value in items:
                row += 1
                try:
                    yield Record(row, _checked_object(_plain(value)))
                except _BadRow as error:
                    yield BadLine(row, str(error))
                except RecursionError:
                    yield BadLine(row, "invalid JSON: nested too deeply")
            items.clear()
            if waiting > text_files.MAX_LINE_BYTES:
                broken = f"longer than {text_files.MAX_LINE_BYTES >> 20} MB"
            if broken:
                yield BadLine(row + 1, f"{broken}; nothing after this row could be read", rest_lost=True)
                return
    except TruncatedArchive as error:
        error.line = row + 1
        yield error.bad_line()


# Text up to an escape that may continue in the next chunk: \\uXXXX, or the first half of a surrogate pair.
_WHOLE_ESCAPES = re.compile(r"(?:[^\\]++|\\(?:[^u]|u[dD][89abAB]..(?=.{6})|u(?![dD][89abAB]).{4}))*+", re.DOTALL)
_SURROGATES = re.compile(
    r"\\[^u]|\\u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|(\\u[dD][89a-fA-F][\da-fA-F]{2})"
)


def _mark_lone_surrogates(text: str) -> str:
    """Return JSON in which half of a surrogate pair is marked as a wrong byte: ijson would turn it into "?"."""
    if "\\ud" not in text and "\\uD" not in text:
        return text
    return _SURROGATES.sub(lambda found: _WRONG_BYTE if found[1] else found[0], text)


def _plain(value: Any) -> Any:
    """Return a value of ijson as json.loads would; _BadRow if a byte or character of it was not Unicode."""
    if isinstance(value, str):
        if _WRONG_BYTE in value:
            raise _BadRow("invalid UTF-8, or half of a surrogate pair, in the row")
        return value
    if isinstance(value, dict):
        return {_plain(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(_plain, value))
    return float(value) if isinstance(value, Decimal) else value


# --- CSV and Parquet -------------------------------------------------------------------------------------------------


def _csv_lines(chunks: Iterator[bytes], damaged: list[str]) -> Iterator[str]:
    """Yield physical lines with their ends. What is wrong with a line is appended to `damaged`, once per line."""
    for _, data in line_blocks(chunks):
        if isinstance(data, BadLine):
            damaged.append(data.reason)
            yield "\n"
            continue
        start = 0
        while start < len(data):
            end = data.find(b"\n", start) + 1 or len(data)
            raw, start = data[start:end], end
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                damaged.append(utf8_reason(error))
                yield raw.decode("utf-8", "replace")


def _csv_reader(lines: Iterator[str]) -> Any:
    csv.field_size_limit(text_files.MAX_LINE_BYTES)  # the module's default of 128 KB is shorter than a long document
    return csv.reader(lines, strict=True)


def _csv_header(path: Path, reader: Any) -> list[str]:
    try:
        header = next((row for row in reader if row), None)
    except (csv.Error, TruncatedArchive) as error:
        raise UserError(
            f"{path}: the header line cannot be read ({error}); the first line must name the columns"
        ) from None
    if header is None:
        raise UserError(f"{path}: only blank lines; the first line must name the columns")
    if len(set(header)) < len(header):
        raise UserError(f"{path}: a column name occurs twice in the header: {', '.join(header)}")
    return header


def _csv_rows(path: Path, chunks: Iterator[bytes]) -> Iterator[Record | BadLine]:
    damaged: list[str] = []
    reader = _csv_reader(_csv_lines(chunks, damaged))
    header = _csv_header(path, reader)
    if damaged:
        raise UserError(f"{path}, line 1: {damaged[0]}; the first line must name the columns")
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            damaged.clear()
            reason = f"invalid CSV: {error}"
            left_open = "unexpected end" in str(error) or "field limit" in str(error)
            if left_open:
                reason = f"invalid CSV: a quote is left open; lines {line} to {reader.line_num} were lost to it"
            yield BadLine(line, reason, rest_lost=left_open)
            continue
        except TruncatedArchive as error:
            yield error.bad_line()
            return
        if row is None:
            return
        if damaged:
            yield BadLine(line, damaged[0])
            damaged.clear()
        elif not row:
            continue
        elif len(row) != len(header):
            yield BadLine(line, f"{len(row)} fields where the header has {len(header)}")
        elif any("\0" in field for field in row):
            yield BadLine(line, "a NUL byte in the row")
        else:
            yield Record(line, dict(zip(header, row, strict=True)))


def _open_parquet(path: Path) -> ParquetFile:
    import pyarrow  # a heavy import that only Parquet files need
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=text_files.BLOCK_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)}); download it again") from None


def _parquet_rows(path: Path, on_bytes: Callable[[int], None]) -> Iterator[Record | BadLine]:
    import pyarrow

    file = _open_parquet(path)
    size, n_rows = path.stat().st_size, file.metadata.num_rows
    row, reported = 0, 0
    try:
        # One row group after the other, in one thread: read any other way, pyarrow's memory grows with the file.
        groups = (file.iter_batches(PARQUET_ROWS, [i], use_threads=False) for i in range(file.num_row_groups))
        for batch in itertools.chain.from_iterable(groups):
            for data in batch.to_pylist():
                row += 1
                yield Record(row, _without_nulls(data))
            on_bytes(size * row // n_rows - reported)
            reported = size * row // n_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"damaged Parquet: {first_line(error)}; nothing after this row could be read"
        yield BadLine(row + 1, reason, rest_lost=True)
    on_bytes(size - reported)


def _without_nulls(value: Any, drop: bool = False) -> Any:
    """Return a value of Parquet; arguments and schemas of tools without the fields that only those of other rows have.

    In Parquet an object has the fields of all rows: what a row does not have is null.
    """
    if isinstance(value, dict):
        fields = ((name, field) for name, field in value.items() if not (drop and field is None))
        return {name: _without_nulls(field, drop or name in ("arguments", "tools")) for name, field in fields}
    return [_without_nulls(item, drop) for item in value] if isinstance(value, list) else value


def _rows(rows: Iterator[Record | BadLine]) -> Iterator[Block]:
    """Group parsed rows into blocks of about BLOCK_BYTES characters."""
    batch: list[Record | BadLine] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += 50 if isinstance(row, BadLine) else _size(row.data)
        if size >= text_files.BLOCK_BYTES:
            yield Block("rows", batch[0].line, batch)
            batch, size = [], 0
    if batch:
        yield Block("rows", batch[0].line, batch)


def _size(value: object) -> int:
    """Return about how many characters a parsed value holds."""
    if isinstance(value, (str, bytes)):
        return 50 + len(value)
    if isinstance(value, dict):
        return 50 + sum(map(_size, value.values()))
    return 50 + sum(map(_size, value)) if isinstance(value, list) else 50
