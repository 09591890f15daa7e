"""Read raw text files of any size, one row at a time: JSONL, JSON, TXT, CSV (each also .gz or .zst) and Parquet.

    for record in iter_records(Path("dump.jsonl.zst"), on_bad=print):
        record.line, record.data["text"]

Memory does not grow with the file: not for a JSON array of 33 GB, a CSV field of a thousand lines or a file that is
one endless line. A row that cannot be read becomes a `BadLine` that says where and why; the rows around it are read.

To parse in several processes, take the file apart with `iter_blocks` and send each block to `parse_block`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

BLOCK_BYTES = 1 << 18  # how much is read and handed to a worker at once
MAX_LINE_BYTES = 32 << 20  # a longer row is not a row: it is a missing line end or an open quote
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
    data: dict


@dataclass(frozen=True)
class BadLine:
    """A row that could not be read, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Block:
    """A piece of a file that one worker can parse: whole lines (`bytes`, the first is number `line`) or ready rows."""

    kind: str  # "json" (a JSON object a line), "text" (a document a line) or "rows" (already parsed)
    line: int
    data: bytes | list[Record | BadLine]


class _TruncatedArchive(Exception):
    """The compressed file ends too early or is damaged; what came before line (or row) `line` was delivered."""

    line = 1

    def bad_line(self) -> BadLine:
        return BadLine(self.line, f"truncated archive: {self}; only what comes before line {self.line} could be read")


def iter_records(
    path: Path, on_bad: Callable[[BadLine], None] | None, *, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Record]:
    """Yield the rows of `path` in constant memory; rows that cannot be read go to `on_bad`.

    on_bad=None makes the first such row a UserError naming file, line and reason.
    on_bytes(n) is told how many bytes of the file (as it lies on the disk) were consumed since the last call.
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
    path = Path(path)
    kind = file_format(path)
    check_readable(path)
    if kind == ".parquet":
        yield from _rows(_parquet_rows(path, on_bytes or (lambda n: None)))
        return
    chunks = _chunks(path, on_bytes or (lambda n: None))
    if kind == ".csv":
        yield from _rows(_csv_rows(path, chunks))
        return
    if kind in (".json", ".jsonl"):
        first = next(chunks, b"")
        chunks = itertools.chain([first], chunks)
        # Some dumps named .jsonl are one array, and some named .json have an object a line: look, do not trust.
        if re.match(rb"\s*\[\s*(\{|\]|$)", first):
            yield from _rows(_array_rows(chunks))
            return
    try:
        for line, data in _line_blocks(chunks):
            if isinstance(data, BadLine):
                yield Block("rows", line, [data])
            else:
                yield Block("text" if kind == ".txt" else "json", line, data)
    except _TruncatedArchive as error:
        yield Block("rows", error.line, [error.bad_line()])


def parse_block(block: Block) -> Iterator[Record | BadLine]:
    """Yield the rows of a block, and a BadLine for each that cannot be read. Blank lines are skipped."""
    if block.kind == "rows":
        yield from block.data
        return
    for number, raw in enumerate(block.data.split(b"\n"), start=block.line):
        if not raw or raw.isspace():
            continue
        try:
            text = raw.rstrip(b"\r").decode("utf-8")
            yield Record(number, {"text": text} if block.kind == "text" else _json_object(text))
        except UnicodeDecodeError as error:
            yield BadLine(number, _utf8_reason(error))
        except _BadRow as error:
            yield BadLine(number, str(error))


def total_bytes(path: Path) -> int:
    """Size of `path` on the disk in bytes: what the numbers given to `on_bytes` add up to."""
    check_readable(Path(path))
    return Path(path).stat().st_size


def columns(path: Path) -> list[str] | None:
    """The column names of a CSV or Parquet file; None for formats without a header."""
    path = Path(path)
    kind = file_format(path)
    check_readable(path)
    if kind == ".parquet":
        return _open_parquet(path).schema_arrow.names
    if kind == ".csv":
        return _csv_header(path, _csv_reader(_csv_lines(_chunks(path, lambda n: None), [])))
    return None


def file_format(path: Path) -> str:
    """The format by the file's name, without .gz or .zst: ".jsonl", ".json", ".txt", ".csv" or ".parquet"."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return ".parquet"
    if len(suffixes) > 1 and suffixes[-1] in ARCHIVES:
        suffixes.pop()
    if suffixes and suffixes[-1] in TEXT_FORMATS:
        return suffixes[-1]
    raise UserError(
        f"{path}: cannot tell its format from its name; rename it to end in "
        ".jsonl, .json, .txt or .csv (each also with .gz or .zst after it) or .parquet"
    )


def check_readable(path: Path) -> None:
    """Raise UserError if `path` is missing, a folder, empty or not ours to read."""
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path or download the data first")
    if not path.is_file():
        raise UserError(f"{path}: not a file; name a data file inside it")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; download it again or remove it from the inputs")
    try:
        path.open("rb").close()
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; change its permissions") from None


# --- bytes -----------------------------------------------------------------------------------------------------------


def _chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the decompressed content of `path` without its byte order mark; _TruncatedArchive after the last good byte."""
    first = True
    for chunk in _decompressed(path, on_bytes):
        if first and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{path}: the file is UTF-16; save it as UTF-8")
        if first and chunk.startswith(codecs.BOM_UTF8):
            chunk = chunk[len(codecs.BOM_UTF8) :]
        if first and (advice := _other_encoding(chunk)):
            raise UserError(f"{path}: the file is {advice}")
        first = False
        if chunk:
            yield chunk
    if first:
        raise UserError(f"{path}: the archive is empty; download it again or remove it from the inputs")


def _other_encoding(chunk: bytes) -> str | None:
    """What a file is and what to do, if it is in another encoding as a whole; None for UTF-8 with some bad lines or none.

    GBK (also called GB2312 and GB18030) is what Chinese text outside of UTF-8 comes in. Its everyday characters are pairs
    of a byte from 0xB0 to 0xD7 and one from 0xA1 to 0xFE.
    """
    lines = [line for line in chunk.split(b"\n") if not line.isascii()]
    if len(lines) > 1 and not chunk.endswith(b"\n"):
        lines.pop()  # cut off anywhere, perhaps inside a character
    bad = [line for line in lines if not _is_utf8(line, whole=len(lines) > 1)]
    high = sum(byte >= 0x80 for line in bad for byte in line)
    if len(bad) <= len(lines) / 2 or high < 20:
        return None
    pairs = sum(len(pair) for line in bad for pair in _GBK_PAIRS.findall(line))
    if pairs < high / 2:
        return "not UTF-8; save it as UTF-8"
    return "not UTF-8 but GBK (GB18030); save it as UTF-8, for example with: iconv -f GB18030 -t UTF-8 OLD > NEW"


_GBK_PAIRS = re.compile(rb"[\xb0-\xd7][\xa1-\xfe]")


def _is_utf8(line: bytes, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line, final=whole)
    except UnicodeDecodeError:
        return False
    return True


def _decompressed(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the content of `path` in small pieces. A file that is no archive is a UserError."""
    read = {".gz": _gzip_pieces, ".zst": _zstd_pieces}.get(path.suffix.lower(), _plain_pieces)
    done, delivered = 0, False
    with path.open("rb") as file:
        pieces = read(file)
        while True:
            try:
                piece = next(pieces, b"")
            except (EOFError, OSError, zlib.error) as error:
                if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                    raise  # the disk, not the archive
                if not delivered:
                    raise UserError(
                        f"{path}: not a readable {path.suffix} archive ({error}); download it again"
                    ) from None
                raise _TruncatedArchive(str(error)) from None
            on_bytes(file.tell() - done)
            done = file.tell()
            if not piece:
                return
            delivered = True
            yield piece


def _plain_pieces(file) -> Iterator[bytes]:
    while piece := file.read(BLOCK_BYTES):
        yield piece


def _gzip_pieces(file) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as archive:
        while piece := archive.read1(BLOCK_BYTES):
            yield piece


def _zstd_pieces(file) -> Iterator[bytes]:
    import zstandard  # only who reads .zst pays for it

    # Not stream_reader(): it takes a truncated file for a complete one. Small bites, because one can unpack to a lot.
    frame = None
    while bite := file.read(1 << 14):
        while bite:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                piece = frame.decompress(bite)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            bite = b""
            if frame.eof:  # another frame may follow, as after `cat a.zst b.zst`
                bite, frame = frame.unused_data, None
            if piece:
                yield piece
    if frame is not None:
        raise EOFError("the file ended before the end of the compressed data")


# --- lines -----------------------------------------------------------------------------------------------------------


def _line_blocks(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | BadLine]]:
    """Cut chunks at line ends: (number of the first line, whole lines). A line that is too long is one BadLine.

    _TruncatedArchive is raised behind the last whole line.
    """
    line, parts, size, skipping = 1, [], 0, False
    damage = None
    while True:
        try:
            chunk = next(chunks, None)
        except _TruncatedArchive as error:
            chunk, damage = None, error
        if chunk is None:
            break
        if skipping:  # inside a line that was too long: wait for its end
            _, end, chunk = chunk.partition(b"\n")
            if not end:
                continue
            line, skipping = line + 1, False
        parts.append(chunk)
        size += len(chunk)
        if size < BLOCK_BYTES or (b"\n" not in chunk and size <= MAX_LINE_BYTES):
            continue
        data = b"".join(parts)
        cut = data.rfind(b"\n") + 1
        if cut:
            yield line, data[:cut]
            line += data.count(b"\n", 0, cut)
        parts, size = [data[cut:]], len(data) - cut
        if size > MAX_LINE_BYTES:
            yield line, BadLine(line, f"longer than {MAX_LINE_BYTES >> 20} MB: is a line end missing?")
            parts, size, skipping = [], 0, True
    data = b"".join(parts)
    if damage is not None:
        data = data[: data.rfind(b"\n") + 1]  # the half line at the break is not a line
    if data:
        yield line, data
    if damage is not None:
        damage.line = line + data.count(b"\n")
        raise damage


def _utf8_reason(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 at byte {error.start + 1} of the line (0x{error.object[error.start]:02x})"


# --- JSON ------------------------------------------------------------------------------------------------------------


class _BadRow(ValueError):
    """The row is not usable; the text says why."""


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _json_object(text: str) -> dict:
    """Parse one JSON object; _BadRow says what is wrong with it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRow(f"invalid JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise _BadRow("invalid JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _BadRow(f"invalid JSON: {error}") from None
    return _checked_object(value, text)


def _checked_object(value: object, source: str) -> dict:
    if not isinstance(value, dict):
        name = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        raise _BadRow(f"not an object but {name}")
    if _SURROGATE_ESCAPE.search(source):  # rare, so the second look costs nothing on the whole
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise _BadRow("half of a surrogate pair (\\ud800 to \\udfff alone), which is not a character") from None
    return value


_BLANK = re.compile(r"[ \t\r\n]*")


def _array_rows(chunks: Iterator[bytes]) -> Iterator[Record | BadLine]:
    """Yield the objects of one JSON array. After broken syntax nothing tells where a row starts: one BadLine, the end."""
    window = _Window(chunks)
    scan = json.JSONDecoder().raw_decode
    row = 0
    try:
        window.next_char()  # the "[" that brought us here
        window.pos += 1
        while (char := window.next_char()) != "]":
            row += 1
            if row > 1:
                if char != ",":
                    raise _BadRow("no comma or ] after the row before" if char else "the file ends inside the array")
                window.pos += 1
                window.next_char()
            while True:
                complete = False
                try:
                    value, end = scan(window.text, window.pos)
                    complete = end < len(window.text)  # a number at the very end might go on
                except json.JSONDecodeError as error:
                    # An error near the end of what was read so far, or an open string, may just need more text.
                    broken = not error.msg.startswith("Unterminated") and error.pos < len(window.text) - 16
                    if broken or len(window.text) - window.pos > MAX_LINE_BYTES or not window.more():
                        where = f"at character {error.pos - window.pos + 1} of the row"
                        raise _BadRow(f"invalid JSON: {error.msg} {where}") from None
                    continue
                except (RecursionError, ValueError) as error:
                    raise _BadRow(f"invalid JSON: {error}") from None
                if complete or not window.more():
                    break
            source = window.text[window.pos : end]
            window.pos = end
            try:
                source.encode("utf-8")
                yield Record(row, _checked_object(value, source))
            except UnicodeEncodeError as error:  # bytes that are not UTF-8 arrive as U+DC80 to U+DCFF
                yield BadLine(row, f"invalid UTF-8 in the row (0x{ord(source[error.start]) - 0xDC00:02x})")
            except _BadRow as error:
                yield BadLine(row, str(error))
        window.pos += 1
        row += 1
        if window.next_char():
            raise _BadRow("something follows the ] that ends the array")
    except _BadRow as error:
        yield BadLine(row, f"{error}; nothing after this row could be read")
    except _TruncatedArchive as error:
        error.line = max(row, 1)
        yield error.bad_line()


class _Window:
    """The part of a text stream that is being parsed: grows on demand, forgets what was passed."""

    def __init__(self, chunks: Iterable[bytes]):
        self.chunks = iter(chunks)
        # surrogateescape keeps a wrong byte inside its row instead of losing the file to it
        self.decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text, self.pos = "", 0

    def more(self) -> bool:
        """Read on, at least as much as is waiting already (so that retries stay linear); False at the end."""
        pieces = [self.text[self.pos :]]
        wanted, got, ended = len(pieces[0]), 0, False
        try:
            while got <= wanted and not ended:
                chunk = next(self.chunks, b"")
                ended = not chunk
                pieces.append(self.decode(chunk, final=ended))
                got += len(pieces[-1])
        finally:
            self.text, self.pos = "".join(pieces), 0
        return got > 0

    def next_char(self) -> str:
        """Skip blanks and return the character at `pos`, or "" at the end of the file."""
        while True:
            self.pos = _BLANK.match(self.text, self.pos).end()
            if self.pos < len(self.text) or not self.more():
                return self.text[self.pos : self.pos + 1]


# --- CSV and Parquet -------------------------------------------------------------------------------------------------


def _csv_lines(chunks: Iterator[bytes], damaged: list[str]) -> Iterator[str]:
    """Yield physical lines with their ends. What is wrong with a line is appended to `damaged`, once per line."""
    for _, data in _line_blocks(chunks):
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
                damaged.append(_utf8_reason(error))
                yield raw.decode("utf-8", "replace")


def _csv_reader(lines: Iterator[str]):
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's default of 128 KB is shorter than a long document
    return csv.reader(lines, strict=True)


def _csv_header(path: Path, reader) -> list[str]:
    try:
        header = next((row for row in reader if row), None)
    except (csv.Error, _TruncatedArchive) as error:
        raise UserError(
            f"{path}: the header line cannot be read ({error}); the first line must name the columns"
        ) from None
    if header is None:
        raise UserError(f"{path}: only blank lines; the first line must name the columns")
    if len(set(header)) < len(header):
        raise UserError(f"{path}: a column name stands twice in the header: {', '.join(header)}")
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
            if "unexpected end" in str(error) or "field limit" in str(error):
                reason = f"invalid CSV: a quote is left open; lines {line} to {reader.line_num} were lost to it"
            yield BadLine(line, reason)
            continue
        except _TruncatedArchive as error:
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


def _open_parquet(path: Path):
    import pyarrow  # a heavy import that only Parquet readers pay for
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({first_line}); download it again") from None


def _parquet_rows(path: Path, on_bytes: Callable[[int], None]) -> Iterator[Record | BadLine]:
    import pyarrow

    file = _open_parquet(path)
    size, n_rows = path.stat().st_size, file.metadata.num_rows
    row, told = 0, 0
    try:
        # One row group after the other, in one thread: read any other way, pyarrow's memory grows with the file.
        groups = (file.iter_batches(PARQUET_ROWS, [i], use_threads=False) for i in range(file.num_row_groups))
        for batch in itertools.chain.from_iterable(groups):
            for data in batch.to_pylist():
                row += 1
                yield Record(row, data)
            on_bytes(size * row // n_rows - told)
            told = size * row // n_rows
    except (pyarrow.ArrowException, OSError) as error:
        yield BadLine(row + 1, f"damaged Parquet: {str(error).splitlines()[0]}; nothing after this row could be read")
    on_bytes(size - told)


def _rows(rows: Iterator[Record | BadLine]) -> Iterator[Block]:
    """Group parsed rows into blocks of about BLOCK_BYTES characters."""
    batch: list[Record | BadLine] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += 50 if isinstance(row, BadLine) else _weight(row.data)
        if size >= BLOCK_BYTES:
            yield Block("rows", batch[0].line, batch)
            batch, size = [], 0
    if batch:
        yield Block("rows", batch[0].line, batch)


def _weight(value: object) -> int:
    """About how many characters a parsed value holds."""
    if isinstance(value, (str, bytes)):
        return 50 + len(value)
    if isinstance(value, dict):
        return 50 + sum(map(_weight, value.values()))
    return 50 + sum(map(_weight, value)) if isinstance(value, list) else 50
