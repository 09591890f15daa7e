"""Measure the way of the data into the model: tokenising, starting on tokens that are cached, and making batches.

    python bench/input.py --data_path dataset/pretrain_data.csv
    python bench/input.py --documents 1000000 --mb 4             # smaller

tokenising   tokenize_pretrain_data, relative to the tokenizers library alone (bench/tokenize_throughput.py); best of 3
             rounds in turns. Goal: at least 0.85
start        from the call that finds the tokens in the cache to the first batch: opening, splitting off the validation
             documents, packing all others into rows. The documents are synthetic, 130 tokens on average as in Chinese web
             text; their tokens are zeros, which take no space on the disk and are not read. Goal: 5 seconds for 10 million
loader       tokens per second that BatchLoader hands over from one thread, in batches of 32 rows of 512 tokens, from a
             memory-mapped file of 130 million random tokens. Goal: 2 million
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from bench.tokenize_throughput import compare, take_texts  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import run_script  # noqa: E402
from common.files import write_json  # noqa: E402
from data_pipeline.datasets import BatchLoader, PackedRows, Schedule  # noqa: E402
from data_pipeline.tokenize import TokenizedDataset, tokenize_pretrain_data  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402

SEQ_LEN, ROWS = 512, 32
AVERAGE = 130  # tokens of a document


def cached_dataset(folder: Path, n_documents: int, random_tokens: bool) -> TokenizedDataset:
    """Return a dataset from a cache in `folder`, in which the few documents of a file were replaced by `n_documents`."""
    source, cache = folder / "texts.txt", folder / "cache"
    tokenizer = load_tokenizer()
    if not source.exists():
        source.write_text("a text\nanother text\n", encoding="utf-8")
        os.utime(source, (0, 0))  # its hash is remembered only if the file is not of this moment
    dataset = tokenize_pretrain_data([source], tokenizer, cache)
    if len(dataset) == n_documents:
        return dataset
    data, info = Path(dataset.info["folder"]), dict(dataset.info)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.exponential(AVERAGE, n_documents), 2, None).astype(np.int64)
    arrays = {
        "offsets": np.concatenate([[0], lengths.cumsum()]),
        "n_bytes": 3 * lengths,
        "content_hashes": rng.integers(0, 2**64, n_documents, np.uint64),
    }
    n_tokens = int(arrays["offsets"][-1])
    del dataset
    for name, array in arrays.items():
        array.tofile(data / f"{name}.bin")
    with (data / "tokens.bin").open("wb") as file:
        if random_tokens:
            file.write(rng.integers(3, 6400, n_tokens).astype(np.uint16).tobytes())
        file.truncate(2 * n_tokens)
    info["files"] = {name: (data / f"{name}.bin").stat().st_size for name in info["files"]}
    write_json(data / "info.json", info | {"documents": n_documents, "tokens": n_tokens})
    return tokenize_pretrain_data([source], tokenizer, cache)


def seconds_to_start(folder: Path, n_documents: int) -> tuple[float, float]:
    """Return the seconds from opening a cached dataset to its first batch, by the clock and of CPU time."""
    cached_dataset(folder, n_documents, random_tokens=False)
    started, cpu = time.perf_counter(), time.process_time()
    dataset = cached_dataset(folder, n_documents, random_tokens=False)
    train, val = (PackedRows(dataset, documents, SEQ_LEN, seed=0) for documents in dataset.split(0.0001))
    schedule = Schedule(len(train), ROWS, len(train), seed=0)
    assert len(val) and schedule.total_steps
    next(BatchLoader(train, schedule, 0, 1, ROWS, num_workers=1).prefetch(0))
    return time.perf_counter() - started, time.process_time() - cpu


def loader_rate(folder: Path, n_documents: int, seconds: float) -> float:
    """Return the tokens per second that one thread prepares."""
    dataset = cached_dataset(folder, n_documents, random_tokens=True)
    rows = PackedRows(dataset, np.arange(len(dataset)), SEQ_LEN, seed=0)
    batches = BatchLoader(rows, Schedule(len(rows), ROWS, 100 * len(rows), seed=0), 0, 1, ROWS, 1).prefetch(0)
    next(batches)
    started, tokens = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        tokens += sum(batch.n_tokens for batch in next(batches)[0])
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, default=ROOT / "dataset" / "pretrain_data.csv", help="file with the field text")
    add("--mb", type=float, default=16, help="megabytes of text to tokenise (default: 16)")
    add("--documents", type=int, default=10_000_000, help="documents in the cache (default: 10 million)")
    add("--seconds", type=float, default=10, help="seconds for the loader (default: 10)")
    add("--rounds", type=int, default=3, help="rounds of each (default: 3)")
    args = parser.parse_args()
    rates, _ = compare(take_texts(args.data_path, int(args.mb * 1e6)), args.rounds)
    ours, library = max(rates["ours"]), max(rates["library"])
    with tempfile.TemporaryDirectory() as big, tempfile.TemporaryDirectory() as small:
        start = min(seconds_to_start(Path(big), args.documents) for _ in range(args.rounds))
        loader = loader_rate(Path(small), min(args.documents, 1_000_000), args.seconds)
    print("| | figure | goal |\n|---|---|---|")
    print(f"| tokenising, relative to the library alone ({library:.2f} MB/s) | {ours / library:.2f} | 0.85 |")
    print(
        f"| start on {args.documents:,} cached documents, s | {start[0]:.2f} (CPU {start[1]:.2f}) | 5 for 10,000,000 |"
    )
    print(f"| loader, one thread, tokens/s | {loader:,.0f} | 2,000,000 |")


if __name__ == "__main__":
    run_script(main)
