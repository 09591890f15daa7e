"""Measure how fast text becomes tokens on disk, compared with the best that the tokenizers library can do.

    python bench/tokenize_throughput.py --data_path dataset/pretrain_data.csv

ours       tokenize_pretrain_data: read and parse the file, encode, hash, write and sync the arrays
library    one call of its encode_batch_fast on texts that are already in memory; the result is discarded

The two take turns, and the best round of each counts: other work on the machine disturbs single rounds.
"""

from __future__ import annotations

import csv
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer  # noqa: E402

from common.cli import Parser  # noqa: E402
from common.errors import run_script  # noqa: E402
from data_pipeline.readers import iter_records  # noqa: E402
from data_pipeline.tokenize import tokenize_pretrain_data  # noqa: E402
from model.tokenizer import TOKENIZER_DIR, load_tokenizer  # noqa: E402


def take_texts(path: Path, n_bytes: int) -> list[str]:
    """Return the first texts of `path`, `n_bytes` of UTF-8 in all."""
    texts: list[str] = []
    for record in iter_records(path, lambda bad: None):
        if n_bytes <= 0:
            break
        text = record.data.get("text")
        if isinstance(text, str) and text.strip():
            texts.append(text)
            n_bytes -= len(text.encode())
    return texts


def compare(texts: list[str], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return MB/s by the clock, and CPU seconds per MB of all threads, of ours and of the library, in every round."""
    n_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = load_tokenizer()
    library = Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    rates: dict[str, list[float]] = {"ours": [], "library": []}
    costs: dict[str, list[float]] = {"ours": [], "library": []}

    def measure(name: str, work: Callable[[], object]) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        work()
        costs[name].append((time.process_time() - cpu) / (n_bytes / 1e6))
        rates[name].append(n_bytes / 1e6 / (time.perf_counter() - started))

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.csv"
        with source.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
        for i in range(rounds):
            cache = Path(folder) / str(i)
            measure("ours", functools.partial(tokenize_pretrain_data, [source], tokenizer, cache))
            measure("library", functools.partial(library.encode_batch_fast, texts, add_special_tokens=False))
    return rates, costs


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, default=ROOT / "dataset" / "pretrain_data.csv", help="file with the field text")
    add("--mb", type=float, default=16, help="megabytes of text to use (default: 16)")
    add("--rounds", type=int, default=3, help="rounds of each (default: 3)")
    args = parser.parse_args()
    texts = take_texts(args.data_path, int(args.mb * 1e6))
    rates, costs = compare(texts, args.rounds)
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} texts, {n_bytes / 1e6:.1f} MB, {os.cpu_count()} CPUs, {args.rounds} rounds")
    print("| tokenising | best MB/s | ratio | CPU seconds per MB, least | ratio |")
    print("|---|---|---|---|---|")
    for name in rates:
        rate, cost = max(rates[name]), min(costs[name])
        ratios = rate / max(rates["library"]), cost / min(costs["library"])
        print(f"| {name} | {rate:.2f} | {ratios[0]:.2f} | {cost:.3f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    run_script(main)
