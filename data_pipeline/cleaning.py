"""Turn raw dumps into the files the training stages read: choose the rows, write them, drop duplicates.

A stage of cleaning is a function from one raw row to one `Row` of output; it raises `Filtered` for a valid row that
the options do not want, and `UserError` for a row with wrong fields or roles. `clean` runs it over files of any size in
several processes. The output has the order of the input, however many processes there are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from common.cli import flag
from common.errors import UserError, stoppable
from common.files import atomic_write, delete_leftovers, exclusive, explain_write_errors
from common.progress import Progress
from data_pipeline.dedupe import KeySet, content_key
from data_pipeline.images import BadImage
from data_pipeline.near_duplicates import band_keys, contained_question
from data_pipeline.readers import Block, iter_blocks, map_blocks, parse_block
from data_pipeline.records import (
    CHAT_COLUMNS,
    PREFERENCE_COLUMNS,
    Malformed,
    check_columns,
    check_stage,
    parse_preference,
    read_messages,
    text_of,
)
from data_pipeline.text_files import BadLine, BadLineLog, total_bytes
from model.chat_format import Message, check_messages, message_parts, split_turns

BYTES_PER_WORKER = 4 << 20  # below this a process costs more to start than it saves


@dataclass(frozen=True)
class CleaningOptions:
    """The rows to keep. Lengths are in characters; 0 switches a limit off."""

    max_chars: int | None = flag(512, "longest text, question or answer in characters; 0: any", min=0)
    min_chars: int = flag(1, "pretrain: shortest text in characters", min=0)
    min_q_chars: int = flag(2, "sft: shortest question in characters (default: 2; original: 10)", min=0)
    min_a_chars: int = flag(1, "sft: shortest answer in characters (default: 1; original: 5)", min=0)
    min_chinese_ratio: float = flag(
        0.0,
        "smallest share of Chinese characters in each text (default: 0, because any more drops all English; "
        "original for sft: 0.9)",
        metavar="0..1",
        min=0,
        max=1,
    )
    history: str = flag(
        "keep",
        "sft: keep: dialogues go to sft_data.csv beside the single turns (default); drop: only their last turn "
        "is kept, in sft_data_single.csv; only: sft_data.csv gets nothing but dialogues",
        choices=["keep", "drop", "only"],
    )
    dedupe: bool = flag(True, "drop exact duplicates (default: yes)")
    near_dedupe: bool = flag(False, "also drop documents that are almost the same as an earlier one, by MinHash")
    questions: tuple[str, ...] = ()  # of an exam; rows that contain one are dropped and listed


class Filtered(Exception):
    """A valid row that the options leave out. The text is a line of the summary, so it has no details of the row."""


class ExamQuestion(UserError):
    """A row that contains a question of an exam."""


@dataclass(frozen=True)
class Row:
    """One line of output, its text for comparing, and the indices in `Stage.outputs` of the files that it goes to."""

    line: str
    text: str
    outputs: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Stage:
    """A kind of training data: `convert` makes a line of a raw row; the files start with `header`, end with `footer`."""

    name: str
    convert: Callable[[dict, CleaningOptions], Row]
    outputs: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]  # a CSV or Parquet file needs all columns of one of these
    header: str
    separator: str = "\n"
    footer: str = "\n"


# --- rows ------------------------------------------------------------------------------------------------------------


def pretrain_row(data: dict, options: CleaningOptions) -> Row:
    """Return a line of a CSV with the column `text`, from {"text"}."""
    text = text_of(data, "text", required=True)
    if len(text) < max(options.min_chars, 1):
        raise Filtered(f"shorter than {max(options.min_chars, 1)} characters")
    _check_length(text, "", options)
    _check_chinese(text, "", options)
    return Row(_csv_field(text), text)


def sft_row(data: dict, options: CleaningOptions) -> Row:
    """Return a line of a CSV with the columns `history,q,a`, from a dialogue in any format of data_pipeline/records.py.

    Output 0 holds single turns and output 1 dialogues, by `options.history`:
    "keep": 0 gets the rows without a history, 1 gets all;
    "drop": 0 gets all, their history left out;
    "only": 0 gets the rows without a history, 1 those with one.
    """
    *history, (question, answer) = _turns(data)
    if options.history == "drop":
        history = []
    if len(question) < max(options.min_q_chars, 1):
        raise Filtered(f"question shorter than {max(options.min_q_chars, 1)} characters")
    if len(answer) < max(options.min_a_chars, 1):
        raise Filtered(f"answer shorter than {max(options.min_a_chars, 1)} characters")
    for name, text in (("question", question), ("answer", answer)):
        _check_length(text, name, options)
        _check_chinese(text, name, options)
    line = ",".join(map(_csv_field, (json.dumps(history, ensure_ascii=False), question, answer)))
    text = "\n".join(itertools.chain(*history, (question, answer)))
    if history:
        return Row(line, text, (1,))
    return Row(line, text, (0, 1) if options.history == "keep" else (0,))


def dpo_row(data: dict, options: CleaningOptions) -> Row:
    """Return an object of a JSON list, from a prompt with a chosen and a rejected answer (`parse_preference`)."""
    prompt, chosen, rejected = parse_preference(data)
    if _has_more_than_text(prompt):
        raise Malformed("tools or thinking in the prompt: train on this file itself")
    messages = [(message["role"], message["content"].strip()) for message in prompt]
    chosen, rejected = chosen.strip(), rejected.strip()
    for name, text in (("question", messages[-1][1]), ("answer", chosen), ("answer", rejected)):
        _check_length(text, name, options)
        _check_chinese(text, name, options)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    row = {
        "conversations": [{"from": names[role], "value": text} for role, text in messages],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }
    return Row(json.dumps(row, ensure_ascii=False), "\n".join([*(text for _, text in messages), chosen, rejected]))


STAGES = {
    "pretrain": Stage("pretrain", pretrain_row, ("pretrain_data.csv",), (("text",),), "text\n"),
    "sft": Stage(
        "sft",
        sft_row,
        ("sft_data_single.csv", "sft_data.csv"),
        CHAT_COLUMNS,
        "history,q,a\n",
    ),
    "dpo": Stage("dpo", dpo_row, ("dpo/train_data.json",), PREFERENCE_COLUMNS, "[\n", separator=",\n", footer="\n]\n"),
}


def chinese_ratio(text: str) -> float:
    """Return the share of CJK ideographs (U+4E00 to U+9FFF) among all characters of `text`, 0.0 to 1.0."""
    return len(_CHINESE.findall(text)) / max(len(text), 1)


_CHINESE = re.compile("[\u4e00-\u9fff]")


def _turns(data: dict) -> list[tuple[str, str]]:
    """Return the (question, answer) turns of an SFT row, in order, stripped."""
    check_stage(data)
    messages = read_messages(data)
    check_messages(messages, answered=True)
    if messages[0]["role"] == "system" or _has_more_than_text(messages):
        raise Malformed(
            "a system message, tools or thinking, for which history,q,a has no place: train on this file itself"
        )
    return [(question["content"].strip(), answer["content"].strip()) for question, answer in split_turns(messages)[1]]


def _has_more_than_text(messages: list[Message]) -> bool:
    return any(len(message_parts(message)) > 1 for message in messages)


def _check_length(text: str, name: str, options: CleaningOptions) -> None:
    if options.max_chars and len(text) > options.max_chars:
        raise Filtered(f"{name} longer than {options.max_chars} characters".strip())


def _check_chinese(text: str, name: str, options: CleaningOptions) -> None:
    if options.min_chinese_ratio and chinese_ratio(text) < options.min_chinese_ratio:
        raise Filtered(f"{name} less than {options.min_chinese_ratio:.0%} Chinese".strip())


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


# --- pipeline --------------------------------------------------------------------------------------------------------


@dataclass
class ConvertedBlock:
    """The result of one block: rows to write, rows to count, rows to report."""

    rows: list[Any] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, BadLine]] = field(default_factory=list)  # (line of the summary, the row and its reason)


@dataclass
class Summary:
    """Counts of one stage."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: BadLineLog = field(default_factory=BadLineLog)
    rejects: Path | None = None  # where all bad lines are listed
    written: list[str] = field(default_factory=list)  # a line about each output file
    n_bytes: int = 0
    seconds: float = 0.0

    def drop(self, path: Path, kind: str, bad: BadLine) -> None:
        """Count and list a row that cannot be used; `kind` is its line of the summary."""
        self.dropped[kind] += 1
        self.bad.add(path, bad)

    def add(self, path: Path, block: ConvertedBlock) -> None:
        """Count and list the rows of a block that are not to be written."""
        self.dropped += block.filtered
        for kind, bad in block.bad:
            self.drop(path, kind, bad)

    def first_bad_hint(self) -> str:
        """Return "; the first bad line is ..." for the end of an error message; nothing if no line was bad."""
        return f"; the first bad line is {self.bad.first[0]}" if self.bad.count else ""


# Lines of the summary for rows that raised an error.
_BAD_ROWS = {
    BadImage: "bad image", ExamQuestion: "contains a question of the exam", UserError: "wrong fields or roles",
}  # fmt: skip


def convert_block(block: Block, convert: Callable[[dict], Any]) -> ConvertedBlock:
    """Convert the rows of one block; `convert` raises UserError or Filtered for those that are not to be written."""
    result = ConvertedBlock()
    for row in parse_block(block):
        if isinstance(row, BadLine):
            result.bad.append(("cannot be read", row))
            continue
        try:
            result.rows.append(convert(row.data))
        except Filtered as reason:
            result.filtered[str(reason)] += 1
        except UserError as reason:
            kind = next(kind for error, kind in _BAD_ROWS.items() if isinstance(reason, error))
            result.bad.append((kind, BadLine(row.line, str(reason))))
    return result


def clean_block(block: Block, stage: str, options: CleaningOptions) -> ConvertedBlock:
    """Convert rows to (line, key, band keys, outputs). A pure function: this is what worker processes run."""

    def convert(data: dict) -> tuple[bytes, bytes, list[bytes], tuple[int, ...]]:
        row = STAGES[stage].convert(data, options)
        if options.questions and (question := contained_question(row.text, options.questions)) is not None:
            raise ExamQuestion(f"contains: {question:.200}")
        near = band_keys(row.text) if options.near_dedupe else []
        return row.line.encode("utf-8"), content_key(row.line), near, row.outputs

    return convert_block(block, convert)


@contextlib.contextmanager
def writing(
    inputs: Sequence[Path], columns: tuple[tuple[str, ...], ...], outputs: Sequence[Path], note: str
) -> Iterator[Summary]:
    """Check the inputs before hours of work, and be the only process that writes `outputs` for the block.

    Yields the summary, whose bad lines are listed in a file beside the last output.

    Args:
        columns: an input with a header needs all columns of one of these.
        note: says what there is if the block is stopped, or the disk is full.
    """
    for path in inputs:
        check_columns(path, columns)
        if any(os.path.realpath(path) == os.path.realpath(output) for output in outputs):
            raise UserError(f"{path} is both input and output: choose another --out_dir")
        if next(iter_blocks(path), None) is None:
            raise UserError(f"{path}: no rows in it; download it again or remove it from the inputs")
    summary = Summary(n_bytes=sum(map(total_bytes, inputs)))
    started = time.monotonic()
    folder, name, rejects = outputs[0].parent, outputs[0].name, outputs[-1].with_suffix(".rejects.jsonl")
    busy = f"another process is writing {outputs[0]}: wait for it, or choose another --out_dir"
    with (
        explain_write_errors(folder, "another --out_dir", f"; {note}"),
        stoppable(note),
        exclusive(folder, name, busy) as is_locked,
    ):
        for path in [*outputs[1:], rejects] if is_locked else []:
            delete_leftovers(path.parent, path.name)  # of a process that was killed
        with _rejects_file(rejects, summary):
            yield summary
    summary.seconds = time.monotonic() - started


def clean(stage: Stage, inputs: list[Path], out_dir: Path, options: CleaningOptions, num_workers: int) -> Summary:
    """Clean `inputs` into the files of `stage` in `out_dir`, with memory that does not depend on their size.

    Output files are replaced only when the whole stage succeeded; rows that cannot be read are listed in a file of rejects.
    num_workers: processes that parse and convert; 0 or 1 does it all in this one.
    Raises UserError if an input is unusable, the output cannot be written, or no row is valid.
    """
    outputs = [out_dir / name for name in stage.outputs]
    with contextlib.ExitStack() as stack:
        summary = stack.enter_context(writing(inputs, stage.columns, outputs, UNCHANGED))
        files = [stack.enter_context(_output_file(path, stage, summary)) for path in outputs]
        seen = stack.enter_context(KeySet(out_dir)) if options.dedupe else None
        seen_bands = stack.enter_context(KeySet(out_dir)) if options.near_dedupe else None
        progress = stack.enter_context(Progress(stage.name, summary.n_bytes))
        blocks = ((path, block) for path in inputs for block in iter_blocks(path, on_bytes=progress.update))
        workers = min(num_workers, 1 + summary.n_bytes // BYTES_PER_WORKER)
        for path, result in _clean_blocks(partial(clean_block, stage=stage.name, options=options), blocks, workers):
            summary.add(path, result)
            for line, key, near, targets in result.rows:
                if seen is not None and not seen.add(key):
                    summary.dropped["duplicate"] += 1
                    continue
                if seen_bands is not None and sum(map(seen_bands.add, near)) < len(near):
                    summary.dropped["near duplicate"] += 1
                    continue
                summary.kept += 1
                for target in targets:
                    files[target].add(line)
            progress.kept = summary.kept
    if not summary.kept:
        counts = (
            ", ".join(f"{count:,} {reason}" for reason, count in summary.dropped.most_common()) or "only blank lines"
        )
        listed = f" (all: {summary.rejects})" if summary.bad.count else ""
        raise UserError(
            f"no valid rows in {', '.join(map(str, inputs))}: {counts}{summary.first_bad_hint()}{listed}. Check the format "
            f"or loosen the filters; {UNCHANGED}"
        )
    return summary


UNCHANGED = "earlier output files are unchanged"


class _NothingToWrite(Exception):
    """Leave atomic_write without a rename."""


class _Output:
    """An output file while it is being written."""

    def __init__(self, file: IO[bytes], stage: Stage):
        self.file, self.rows = file, 0
        self.before = stage.header.encode()
        self.separator = stage.separator.encode()

    def add(self, line: bytes) -> None:
        self.file.write(self.before)
        self.file.write(line)
        self.before = self.separator
        self.rows += 1


@contextlib.contextmanager
def _output_file(path: Path, stage: Stage, summary: Summary) -> Iterator[_Output]:
    """Yield a file that replaces `path` in the end, unless it has no rows."""
    with contextlib.suppress(_NothingToWrite), atomic_write(path, "wb") as file:
        output = _Output(file, stage)
        yield output
        old = path.exists()
        if not output.rows:
            summary.written.append(f"no rows for {path}" + (": left as it was" if old else ""))
            raise _NothingToWrite
        file.write(stage.footer.encode())
        summary.written.append(f"{'replaced' if old else 'wrote'} {path}: {output.rows:,} rows")


@contextlib.contextmanager
def _rejects_file(path: Path, summary: Summary) -> Iterator[None]:
    """Let `summary.bad` write to `path`, which exists afterwards only if there were bad lines."""
    with contextlib.suppress(_NothingToWrite), atomic_write(path) as file:
        summary.bad = BadLineLog(file)
        yield
        if not summary.bad.count:
            path.unlink(missing_ok=True)  # one of an earlier run would mislead
            raise _NothingToWrite
        summary.rejects = path


def _clean_blocks(
    work: Callable[[Block], ConvertedBlock], blocks: Iterable[tuple[Path, Block]], workers: int
) -> Iterator[tuple[Path, ConvertedBlock]]:
    """Apply `work` to blocks in `workers` processes; results come in the order of the blocks."""
    if workers <= 1:
        yield from ((path, work(block)) for path, block in blocks)
        return
    # spawn: the same on every system, and no worker starts as a copy of a process that has threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from map_blocks(pool, work, blocks, workers)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps because the memory was full: use a smaller --num_workers"
            ) from None


def _start_worker() -> None:
    # Signals of a terminal or a launcher are for the main process, which then ends its workers. Python waits for ever for
    # one that was killed while it sent a result.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the main process is killed: the worker would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def summary_table(name: str, summary: Summary) -> str:
    """Return a table of the rows that were kept and dropped (by reason), and the files that were written."""
    total = summary.kept + summary.dropped.total()
    rows = [("rows read", total), ("kept", summary.kept)]
    rows += [(f"dropped: {reason}", count) for reason, count in summary.dropped.most_common()]
    width = max(len(what) for what, _ in rows)
    rate = summary.n_bytes / 1e6 / max(summary.seconds, 1e-9)
    lines = [f"{name}: {summary.n_bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s, {rate:.1f} MB/s"]
    lines += [f"  {what:<{width}}  {count:>13,}  {count / total:6.1%}" for what, count in rows]
    if summary.bad.count:
        lines += [f"  bad lines ({len(summary.bad.first)} of {summary.bad.count:,}; all are in {summary.rejects}):"]
        lines += [f"    {bad}" for bad in summary.bad.first]
    lines += [f"  {line}" for line in summary.written]
    return "\n".join(lines)
