"""Train the tokenizer: which 6,400 pieces of text the model reads and writes.

Byte-level BPE starts with the 256 bytes, so that any text can be written, and then again and again makes one token of
the two that most often stand side by side. The more bytes a token holds on average, the longer the text that fits in
the model's context and the fewer steps to learn or write it.

You need this script only for other languages or domains: the project ships the tokenizer in model/minimind_tokenizer
(its README.md has the command that made it), and a model works only with the tokenizer it was trained with.

    python train_tokenizer.py --data_path dataset/tokenizer_train.jsonl --out_dir out/tokenizer

In:  JSONL, JSON, CSV, TXT (also .gz and .zst) or Parquet of any size: texts or dialogues; source files (.py, .md)
Out: a Hugging Face tokenizer folder, and a report: its compression, a round trip through all of Unicode
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from common.cli import flag, parse_options, validate_folder
from common.errors import UserError, exit_on_sigterm, run_script
from common.files import ROOT, atomic_folder, exclusive, recover_folder
from model.tokenizer import CONTROL_TOKENS

SMALLEST_VOCAB = 3 + 256 + len(CONTROL_TOKENS)  # special tokens, bytes, control tokens
FILES = ("tokenizer_config.json", "training.json", "tokenizer.json")
KEPT_FILES = ("README.md",)  # may stand in a tokenizer folder that is replaced


@dataclass
class Options:
    data_path: list[Path] = flag(
        [ROOT / "dataset" / "tokenizer_train.jsonl"],
        "training text; a file that is named twice counts twice (default: dataset/tokenizer_train.jsonl)",
        nargs="+",
        metavar="FILE",
    )
    eval_path: list[Path] = flag(
        [],
        "files to measure compression on, beside those of --data_path; only their held-out part is read, so they "
        "may overlap with the training text (default: none)",
        nargs="*",
        metavar="FILE",
    )
    out_dir: Path = flag(ROOT / "out" / "tokenizer", "folder of the tokenizer (default: out/tokenizer)")
    vocab_size: int = flag(6400, "number of tokens", min=SMALLEST_VOCAB, max=65536)  # token caches are 16 bits wide
    text_field: str = flag(
        "text",
        "field or column with the text; rows without it are read as dialogues: messages, conversations, q and a, "
        "instruction, input and output",
    )
    held_out: float = flag(
        0.01,
        "fraction of the texts that is measured and not trained on, chosen by hash, so that a duplicate of a "
        "held-out text is held out as well",
        above=0,
        below=1,
    )
    max_bytes: float = flag(
        32e6,
        "train on a uniform sample of at most this many bytes of text; for each byte training needs about 90 bytes of "
        "memory and 2 microseconds (default: 32e6)",
        min=1,
    )
    min_frequency: int = flag(2, "minimum count of a pair of tokens that becomes a token", min=1)
    overwrite: bool = flag(False, "replace the tokenizer in --out_dir if there is one", action="store_true")

    def validate(self) -> list[str]:
        folder = self.out_dir
        if folder.resolve() == Path.cwd() or os.path.ismount(folder):
            return [f"--out_dir {folder} cannot be replaced as a whole; name another folder"]
        errors = validate_folder("--out_dir", folder) + validate_folder("--out_dir", folder.parent)
        if errors or not folder.exists():
            return errors[:1]
        others = sorted(path.name for path in folder.iterdir() if path.name not in FILES + KEPT_FILES)
        if others:
            return [f"--out_dir {folder} holds other files ({', '.join(others[:3])}); name an empty or a new folder"]
        if (folder / "tokenizer.json").exists() and not self.overwrite:
            return [
                f"--out_dir {folder} already holds a tokenizer; add --overwrite to replace it, or name another folder"
            ]
        return []


def main(argv: list[str] | None = None) -> None:
    options = parse_options(Options, __doc__.split("\n\n")[0], argv)
    exit_on_sigterm()
    busy = f"another process is training a tokenizer into {options.out_dir}: wait for it, or name another --out_dir"
    folder = Path(os.path.realpath(options.out_dir))
    with exclusive(folder.parent, folder.name, busy):
        recover_folder(folder)
        if errors := options.validate():  # again: another process may have made it since
            raise UserError(errors[0])
        train(options)


def train(options: Options) -> None:
    """Train, check and report the tokenizer; `out_dir` changes only when all of it succeeded."""
    # After the command line was read: these load transformers.
    from data_pipeline import bpe
    from data_pipeline.tokenizer_data import file_labels, read_data
    from model.tokenizer import load_tokenizer, tokenizer_hash

    sample, held_out = read_data(
        options.data_path, options.eval_path, options.text_field, options.held_out, options.max_bytes
    )
    print(
        f"training on {len(sample):,} texts, {sample.n_bytes / 1e6:,.1f} MB "
        f"(of {sample.seen:,} texts, {sample.seen_bytes / 1e6:,.1f} MB), about {sample.n_bytes * 2e-6:.0f} s",
        flush=True,
    )
    # In a thread: Python notices no Ctrl-C while code in Rust runs, and on Windows none in a wait without a limit.
    future = ThreadPoolExecutor(1).submit(bpe.train_bpe, sample, options.vocab_size, options.min_frequency)
    while not future.done():
        wait([future], timeout=0.2)
    trained = future.result()
    if trained.get_vocab_size() != options.vocab_size:
        raise UserError(
            f"the text has pairs for only {trained.get_vocab_size():,} tokens, not {options.vocab_size:,}: "
            "give more text, a smaller --vocab_size or --min_frequency 1"
        )
    training: dict = {name: getattr(options, name) for name in ("vocab_size", "min_frequency", "held_out")}
    labels = file_labels([*options.data_path, *options.eval_path])
    training["files"] = dict(Counter(map(labels.__getitem__, options.data_path)))  # name: how many, or how often
    training |= {"texts": len(sample), "bytes": sample.n_bytes}
    with atomic_folder(options.out_dir) as folder:
        # The report is about the files that others will load, not about the object in memory.
        bpe.write_tokenizer(trained, folder, training)
        tokenizer = load_tokenizer(folder)
        samples = list(bpe.unicode_samples())
        samples += [("held-out text", text) for part in held_out.values() for text in list(part.texts)[:1000]]
        if failures := bpe.round_trip_failures(tokenizer, samples):
            raise UserError(
                f"{len(failures)} of {len(samples):,} texts do not survive encoding and decoding, nothing was written; "
                f"the first: {failures[0]}"
            )
        compression = {name: bpe.measure(tokenizer, part.texts) for name, part in held_out.items() if part.texts}
        training["tokenizer_hash"] = tokenizer_hash(tokenizer)
        training["held_out_compression"] = {
            name: {**asdict(figures), "bytes_per_token": round(figures.bytes_per_token, 4)}
            for name, figures in compression.items()
        }
        bpe.write_tokenizer(trained, folder, training)
        for name in KEPT_FILES:
            if (options.out_dir / name).exists():
                shutil.copyfile(options.out_dir / name, folder / name)
    if compression:
        bpe.print_report(tokenizer, compression, len(samples))
    else:
        print("no text was held out: use a larger --held_out to measure compression")
    print(f"wrote {options.out_dir}")


if __name__ == "__main__":
    run_script(main)
