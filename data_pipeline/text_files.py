"""Data files as bytes, in constant memory: decompressed, checked for their encoding, cut at line ends, hashed."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import jsonlines

from common.errors import UserError
from common.files import atomic_write
from common.progress import Progress

BLOCK_BYTES = 1 << 18  # read, and handed to a worker, at once
MAX_LINE_BYTES = 32 << 20  # a longer row is no row: a line end is missing, or a quote is left open


@dataclass(frozen=True)
class BadLine:
    """A row that cannot be used, and why."""

    line: int
    reason: str
    rest_lost: bool = False  # nobody knows how many rows after it were lost with it


class BadLineLog:
    """Count the rows that cannot be used, keep the first ones to show, and write all of them to a JSONL file, if any."""

    LISTED = 10

    def __init__(self, file: IO[str] | None = None) -> None:
        self.count = 0
        self.first: list[str] = []  # "file:line: reason"
        self.incomplete: list[str] = []  # the same, for each file of which the rest was lost
        self.writer = jsonlines.Writer(file) if file is not None else None

    def add(self, path: Path, bad: BadLine) -> None:
        """Count a bad line, and list it if it is one of the first."""
        self.count += 1
        shown = f"{path}:{bad.line}: {bad.reason}"
        if len(self.first) < self.LISTED:
            self.first.append(shown)
        if bad.rest_lost:
            self.incomplete.append(shown)
        if self.writer is not None:
            self.writer.write({"file": str(path), "line": bad.line, "reason": bad.reason})

    def shown(self) -> list[str]:
        """Return the lines to print: the first rows, and how many more there are."""
        more = self.count - len(self.first)
        return [*self.first, *([f"and {more:,} more"] if more else [])]


class TruncatedArchive(Exception):
    """The compressed file ends too early or is damaged; what came before line (or row) `line` was delivered."""

    line = 1

    def bad_line(self) -> BadLine:
        reason = f"truncated archive: {self}; only what comes before line {self.line} was read, the rest is lost"
        return BadLine(self.line, reason, rest_lost=True)


def total_bytes(path: Path) -> int:
    """Return the size of `path` on the disk in bytes: what the numbers given to `on_bytes` add up to."""
    check_readable(path)
    return path.stat().st_size


def check_readable(path: Path) -> None:
    """Raise UserError if `path` is missing, a folder, empty or not ours to read."""
    if not path.exists():
        what = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise UserError(f"{path}: {what}; check the path or download the data first")
    if not path.is_file():
        raise UserError(f"{path}: not a file; name a data file inside it")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; download it again or remove it from the inputs")
    try:
        path.open("rb").close()
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; change its permissions") from None


def hash_files(paths: Sequence[Path], cache_dir: Path) -> list[str]:
    """Return a hash of the content of each file, remembered in `cache_dir`/hashes.json as long as the file is unchanged."""
    memo = cache_dir / "hashes.json"
    try:
        known = {name: [state, str(digest)] for name, (state, digest) in json.loads(memo.read_bytes()).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):  # none yet, or not one of ours
        known = {}
    for path in paths:
        check_readable(path)
    names = [str(path.resolve()) for path in paths]
    todo = {n: path for n, path in zip(names, paths, strict=True) if known.get(n, [None])[0] != file_state(path)}
    found = {name: known[name][1] for name in names if name not in todo}
    if not todo:
        return [found[name] for name in names]
    with Progress("hash", sum(map(total_bytes, todo.values()))) as progress:
        for name, path in todo.items():
            state = file_state(path)
            digest = hashlib.blake2b(digest_size=16)
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                    progress.update(len(piece))
            found[name] = digest.hexdigest()
            # Times are coarse: a file written this very moment may be written again and look the same.
            if file_state(path) == state and time.time_ns() - max(state[1:3]) > 2_000_000_000:
                known[name] = [state, found[name]]
    with atomic_write(memo) as memo_file:
        json.dump(known, memo_file, indent=1)
    return [found[name] for name in names]


def file_state(path: Path) -> list[int]:
    """Return what changes with a file: its size, when its content and its entry changed, its number."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read_chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the decompressed content of `path` without its byte order mark.

    Raises UserError for a file that is not UTF-8 as a whole, and TruncatedArchive after the last good byte.
    """
    first = True
    for chunk in _decompressed(path, on_bytes):
        if first:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
            other = (advice for start, advice in _FORMATS.items() if chunk.startswith(start))
            if advice := next(other, None) or _other_encoding(chunk):
                raise UserError(f"{path}: the file is {advice}")
        first = False
        if chunk:
            yield chunk
    if first:
        raise UserError(f"{path}: the archive is empty; download it again or remove it from the inputs")


def line_blocks(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | BadLine]]:
    """Cut chunks at line ends; yield (number of the first line, whole lines). A line that is too long is one BadLine.

    TruncatedArchive is raised behind the last whole line.
    """
    line, parts, size, skipping = 1, list[bytes](), 0, False
    damage = None
    try:
        for chunk in chunks:
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
    except TruncatedArchive as error:
        damage = error
    data = b"".join(parts)
    if damage is not None:
        data = data[: data.rfind(b"\n") + 1]  # the line at the break is incomplete
    if data:
        yield line, data
    if damage is not None:
        damage.line = line + data.count(b"\n")
        raise damage


def utf8_reason(error: UnicodeDecodeError) -> str:
    """Return where a line is not UTF-8."""
    return f"invalid UTF-8 at byte {error.start + 1} of the line (0x{error.object[error.start]:02x})"


_FORMATS = {
    b"PK\x03\x04": "an Excel workbook or a ZIP archive; save the sheet as CSV in UTF-8, or unpack the archive",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as CSV or text in UTF-8",
    b"\x1f\x8b": "compressed with gzip; rename it to end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; rename it to end in .zst",
    b"PAR1": "Parquet; rename it to end in .parquet",
}


def _other_encoding(chunk: bytes) -> str | None:
    """Return what the file is and what to do, if it is in another encoding as a whole; None for UTF-8, bad lines or not.

    GBK (also called GB2312 and GB18030) is the usual encoding of Chinese text that is not UTF-8. Its everyday characters
    are pairs of a byte from 0xB0 to 0xD7 and one from 0xA1 to 0xFE.
    """
    encoding = json.detect_encoding(chunk)  # by its byte order mark, or by the NULs among the first bytes
    marked = encoding in ("utf-16", "utf-32")
    if marked or (not encoding.startswith("utf-8") and chunk.count(0) > len(chunk) / 4):
        return f"{encoding[:6].upper()}; save it as UTF-8"
    lines = [line for line in chunk.split(b"\n") if not line.isascii()]
    if len(lines) > 1 and not chunk.endswith(b"\n"):
        lines.pop()  # cut off anywhere, perhaps inside a character
    bad = [line for line in lines if not _is_utf8(line, whole=len(lines) > 1)]
    high = sum(byte >= 0x80 for line in bad for byte in line)
    if len(bad) <= len(lines) / 2 or high < 20:
        return None
    pairs = sum(len(pair) for line in bad for pair in re.findall(rb"[\xb0-\xd7][\xa1-\xfe]", line))
    if pairs < high / 2:
        return "not UTF-8; save it as UTF-8"
    return "not UTF-8 but GBK (GB18030); save it as UTF-8, for example with: iconv -f GB18030 -t UTF-8 OLD > NEW"


def _is_utf8(line: bytes, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line, final=whole)
    except UnicodeDecodeError:
        return False
    return True


def _decompressed(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the content of `path` in small pieces. A file that is no archive is a UserError."""
    read = {".gz": _gzip_pieces, ".zst": _zstd_pieces}.get(path.suffix.lower(), _plain_pieces)
    done, delivered = 0, 0
    with path.open("rb") as file:
        try:
            for piece in read(file):
                on_bytes(file.tell() - done)
                done, delivered = file.tell(), delivered + len(piece)
                yield piece
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            if delivered:
                raise TruncatedArchive(f"{error} after {delivered / 1e6:,.1f} MB of text") from None
            raise UserError(f"{path}: not a readable {path.suffix} archive ({error}); download it again") from None
        on_bytes(file.tell() - done)


def _plain_pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(BLOCK_BYTES):
        yield piece


def _gzip_pieces(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as archive:
        while piece := archive.read1(BLOCK_BYTES):
            yield piece


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    import zstandard  # only .zst files need it

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
