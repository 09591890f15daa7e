"""Put dialogues and the images they are about into one Parquet file, which is all that training needs."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.errors import UserError, stoppable
from common.files import atomic_write, delete_leftovers, exclusive, explain_write_errors
from common.progress import Progress
from data_pipeline.cleaning import UNCHANGED, Summary, rejects_file
from data_pipeline.image_records import IMAGE_COLUMNS, parse_image_row
from data_pipeline.images import BadImage
from data_pipeline.readers import Block, iter_blocks, map_blocks, parse_block
from data_pipeline.records import check_columns
from data_pipeline.text_files import BadLine, total_bytes
from model.chat_format import IMAGE
from model.tokenizer import IMAGE_TOKEN

ROWS_AT_ONCE = 16  # in one thread: a row may have many megabytes of images
GROUP_BYTES = 16 << 20  # of images in a row group, which is what a reader holds in memory


@dataclass
class _Rows:
    """The result of one block: rows to write, and rows to report as (line of the summary, the row and its reason)."""

    rows: list[dict] = field(default_factory=list)
    bad: list[tuple[str, BadLine]] = field(default_factory=list)


def convert_images(inputs: list[Path], output: Path, image_dir: Path | None, num_workers: int) -> Summary:
    """Write the rows of `inputs` (data_pipeline/image_records.py) to one Parquet file: conversations, image_bytes.

    Rows that cannot be used, because of the dialogue or an image, are skipped, counted, and listed beside the output. The
    bytes of the images stay as they are. Memory does not depend on the size of the data.

    Args:
        image_dir: folder of the images that rows name; None: that of each input.
        num_workers: threads that read and check images.

    Raises UserError if an input is unusable, the output cannot be written, or no row is valid.
    """
    for path in inputs:
        check_columns(path, IMAGE_COLUMNS)
        if os.path.realpath(path) == os.path.realpath(output):
            raise UserError(f"{path} is both input and output: choose another --output")
    summary = Summary(n_bytes=sum(map(total_bytes, inputs)))
    started = time.monotonic()
    busy = f"another process is writing {output}: wait for it, or choose another --output"
    with contextlib.ExitStack() as stack:
        stack.enter_context(explain_write_errors(output.parent, "another --out_dir", f"; {UNCHANGED}"))
        stack.enter_context(stoppable(UNCHANGED))
        rejects = output.with_suffix(".rejects.jsonl")
        if stack.enter_context(exclusive(output.parent, output.name, busy)):
            delete_leftovers(rejects.parent, rejects.name)
        stack.enter_context(rejects_file(rejects, summary))
        progress = stack.enter_context(Progress("vlm", summary.n_bytes))
        blocks = (
            (path, some)
            for path in inputs
            for block in iter_blocks(path, on_bytes=progress.update)
            for some in _cut(block)
        )
        pool = ThreadPoolExecutor(max(num_workers, 1), thread_name_prefix="images")
        convert = partial(_convert, image_dir=image_dir)
        with pool, atomic_write(output, "wb", encoding=None) as file, _ParquetFile(file) as writer:
            work = ((path, (path, block)) for path, block in blocks)
            for path, result in map_blocks(pool, convert, work, max(num_workers, 1)):
                for kind, bad in result.bad:
                    summary.dropped[kind] += 1
                    summary.bad.add(path, bad)
                for row in result.rows:
                    writer.add(row)
                summary.kept += len(result.rows)
                progress.kept = summary.kept
            if not summary.kept:
                first = f"; the first is {summary.bad.first[0]}" if summary.bad.count else ""
                raise UserError(f"no valid rows in {', '.join(map(str, inputs))}{first}. Check the format; {UNCHANGED}")
    summary.seconds = time.monotonic() - started
    summary.written.append(f"wrote {output}: {summary.kept:,} rows, {output.stat().st_size / 1e6:,.1f} MB")
    return summary


def _cut(block: Block) -> Iterator[Block]:
    rows = list(parse_block(block))
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        yield Block("rows", rows[begin].line, rows[begin : begin + ROWS_AT_ONCE])


def _convert(source: tuple[Path, Block], image_dir: Path | None) -> _Rows:
    path, block = source
    result = _Rows()
    for row in parse_block(block):
        if isinstance(row, BadLine):
            result.bad.append(("cannot be read", row))
            continue
        try:
            messages, images = parse_image_row(row.data, image_dir or path.parent)
        except BadImage as reason:
            result.bad.append(("bad image", BadLine(row.line, str(reason))))
        except UserError as reason:
            result.bad.append(("wrong fields or roles", BadLine(row.line, str(reason))))
        else:
            messages = [message | {"content": message["content"].replace(IMAGE, IMAGE_TOKEN)} for message in messages]
            result.rows.append({"conversations": json.dumps(messages, ensure_ascii=False), "image_bytes": images})
    return result


class _ParquetFile:
    """Write rows in groups of about GROUP_BYTES."""

    def __init__(self, file) -> None:
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        self.pyarrow = pyarrow
        columns = {"conversations": pyarrow.string(), "image_bytes": pyarrow.list_(pyarrow.binary())}
        self.schema = pyarrow.schema(columns)
        self.writer = ParquetWriter(file, self.schema, compression="zstd")
        self.rows: list[dict] = []
        self.size = 0

    def __enter__(self) -> _ParquetFile:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._flush()
        self.writer.close()

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.size += sum(map(len, row["image_bytes"])) + len(row["conversations"])
        if self.size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(self.pyarrow.Table.from_pylist(self.rows, self.schema))
        self.rows, self.size = [], 0
