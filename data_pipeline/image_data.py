"""Put dialogues and the images they are about into one Parquet file, which is all that training needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from common.errors import UserError
from common.files import atomic_write
from common.progress import Progress
from data_pipeline.cleaning import UNCHANGED, ConvertedBlock, Summary, convert_block, writing
from data_pipeline.image_records import IMAGE_COLUMNS, parse_image_row
from data_pipeline.readers import Block, iter_blocks, map_blocks, parse_block
from model.chat_format import IMAGE
from model.tokenizer import IMAGE_TOKEN

ROWS_AT_ONCE = 16  # in one thread: a row may have many megabytes of images
GROUP_BYTES = 16 << 20  # of images in a row group, which is what a reader holds in memory


def convert_images(inputs: list[Path], output: Path, image_dir: Path | None, num_workers: int) -> Summary:
    """Write the rows of `inputs` (data_pipeline/image_records.py) to one Parquet file: conversations, image_bytes.

    Rows that cannot be used, because of the dialogue or an image, are skipped, counted, and listed beside the output. The
    bytes of the images stay as they are. Memory does not depend on the size of the data.

    Args:
        image_dir: folder of the images that rows name; None: that of each input.
        num_workers: threads that read and check images.

    Raises UserError if an input is unusable, the output cannot be written, or no row is valid.
    """
    n_threads = max(num_workers, 1)
    with (
        writing(inputs, IMAGE_COLUMNS, [output], UNCHANGED) as summary,
        Progress("vlm", summary.n_bytes) as progress,
        ThreadPoolExecutor(n_threads, thread_name_prefix="images") as pool,
        atomic_write(output, "wb") as file,
        _ParquetFile(file) as writer,
    ):
        blocks = (
            (path, (path, some))
            for path in inputs
            for block in iter_blocks(path, on_bytes=progress.update)
            for some in _cut(block)
        )
        for path, result in map_blocks(pool, partial(_convert, image_dir=image_dir), blocks, n_threads):
            summary.add(path, result)
            for row in result.rows:
                writer.add(row)
            summary.kept += len(result.rows)
            progress.kept = summary.kept
        if not summary.kept:
            names = ", ".join(map(str, inputs))
            raise UserError(f"no valid rows in {names}{summary.first_bad_hint()}. Check the format; {UNCHANGED}")
    summary.written.append(f"wrote {output}: {summary.kept:,} rows, {output.stat().st_size / 1e6:,.1f} MB")
    return summary


def _cut(block: Block) -> Iterator[Block]:
    rows = list(parse_block(block))
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        yield Block("rows", rows[begin].line, rows[begin : begin + ROWS_AT_ONCE])


def _convert(source: tuple[Path, Block], image_dir: Path | None) -> ConvertedBlock:
    path, block = source

    def convert(data: dict) -> dict:
        messages, images = parse_image_row(data, image_dir or path.parent)
        messages = [message | {"content": message["content"].replace(IMAGE, IMAGE_TOKEN)} for message in messages]
        return {"conversations": json.dumps(messages, ensure_ascii=False), "image_bytes": images}

    return convert_block(block, convert)


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
