"""Train the tokenizer: which 6,400 pieces of text the model reads and writes.

Byte-level BPE starts with the 256 bytes, so that any text can be written, and then again and again makes one token of
the two that most often stand side by side. The more bytes a token holds on average, the longer the text that fits in
the model's context and the fewer steps to learn or write it.

You need this script only for other languages or domains: the project ships the tokenizer in model/minimind_tokenizer
(its README.md has the command that made it), and a model works only with the tokenizer it was trained with.

    python train_tokenizer.py --data_path dataset/tokenizer_train.jsonl --out_dir out/tokenizer

In:  JSONL, JSON, CSV, TXT (also .gz and .zst) or Parquet of any size: texts or dialogues; source files (.py, .md)
Out: a Hugging Face tokenizer folder, and a report of what it can do
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import argparse
import hashlib
import heapq
import json
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from common.cli import Parser, validate_folder
from common.errors import UserError, run_script
from common.files import fsync_dir
from common.progress import Progress
from data_pipeline.readers import BadLine, check_readable, iter_records, total_bytes
from model.chat_format import CHAT_TEMPLATE
from model.tokenizer import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    UNK,
    UNK_ID,
    encode_text,
    encode_texts,
    load_tokenizer,
    tokenizer_hash,
)

ROOT = Path(__file__).resolve().parent
SMALLEST_VOCAB = 3 + 256  # the special tokens and the bytes

# How text is cut before merging; no token crosses a cut. It is Qwen2's rule, which llama.cpp knows by the name "qwen2":
# a word with the character before it, digits one by one (a number is then spelled alike wherever it stands),
# punctuation with the line end after it, line ends, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_TOKEN_BYTES = 18  # 6 Chinese characters: no boilerplate sentence of the training data becomes a token

SOURCE_SUFFIXES = {".py", ".md", ".sh"}
FILES = ("tokenizer_config.json", "training.json", "tokenizer.json")  # the last completes it
KEPT_FILES = {"README.md"}  # may stand in a tokenizer folder that is replaced
MEASURED_BYTES = 16_000_000  # of held-out text per file: enough for four digits


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data_path", nargs="+", type=Path, metavar="FILE", default=[ROOT / "dataset" / "tokenizer_train.jsonl"],
        help="training text; a file that is named twice counts twice (default: dataset/tokenizer_train.jsonl)",
    )  # fmt: skip
    parser.add_argument(
        "--eval_path", nargs="*", type=Path, metavar="FILE", default=[],
        help="files to measure compression on, beside those of --data_path; only their held-out part is read, so they "
        "may overlap with the training text (default: none)",
    )  # fmt: skip
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "tokenizer", help="default: out/tokenizer")
    parser.add_argument("--vocab_size", type=int, default=6400, help="number of tokens (default: 6400)")
    parser.add_argument(
        "--text_field", default="text",
        help="field or column with the text; rows without it are read as dialogues: messages, conversations, q and a, "
        "instruction, input and output (default: text)",
    )  # fmt: skip
    parser.add_argument(
        "--held_out", type=float, default=0.01,
        help="fraction of the texts that is measured and not trained on, chosen by hash, so that a duplicate of a "
        "held-out text is held out as well (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--max_bytes", type=float, default=32e6,
        help="train on a uniform sample of at most so many bytes of text; for each byte training "
        "needs about 90 bytes of memory and 2 microseconds (default: 32e6)",
    )  # fmt: skip
    parser.add_argument(
        "--min_frequency", type=int, default=2, help="a pair must occur so often to become a token (default: 2)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in --out_dir if there is one")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise one UserError with everything that is wrong, before any work."""
    errors = []
    if not SMALLEST_VOCAB <= args.vocab_size <= 65536:  # token caches are 16 bits wide
        errors.append(f"--vocab_size {args.vocab_size} is not between {SMALLEST_VOCAB} and 65536")
    if not 0 < args.held_out < 1:
        errors.append(f"--held_out {args.held_out} is not between 0 and 1")
    if args.max_bytes < 1:
        errors.append(f"--max_bytes {args.max_bytes:g} is less than 1")
    if args.min_frequency < 1:
        errors.append(f"--min_frequency {args.min_frequency} is less than 1")
    errors += _out_dir_problems(args.out_dir, args.overwrite)
    if errors:
        raise UserError("; ".join(errors))


def _out_dir_problems(out_dir: Path, overwrite: bool) -> list[str]:
    errors = validate_folder("--out_dir", out_dir) + validate_folder("--out_dir", out_dir.parent)
    if errors or not out_dir.exists():
        return errors[:1]
    others = sorted(path.name for path in out_dir.iterdir() if path.name not in {*FILES, *KEPT_FILES})
    if others:
        return [f"--out_dir {out_dir} holds other files ({', '.join(others[:3])}); name an empty or a new folder"]
    if (out_dir / "tokenizer.json").exists() and not overwrite:
        return [f"--out_dir {out_dir} already holds a tokenizer; add --overwrite to replace it, or name another folder"]
    return []


# --- text ------------------------------------------------------------------------------------------------------------


class NoText(ValueError):
    """The row has no text where it should; says what it has."""


def row_text(data: dict, text_field: str = "text") -> str:
    """The text of one row: a field, or all that is said in a dialogue, one message a line. NoText if there is none."""
    if text_field in data:
        text = data[text_field]
        if not isinstance(text, str):
            raise NoText(f"{text_field} is not a text but {type(text).__name__}")
    else:
        text = "\n".join(part for part in _dialogue_texts(data, text_field) if part)
    if not text.strip():
        raise NoText("the text is empty")
    return text


def _dialogue_texts(data: dict, text_field: str) -> Iterator[str]:
    turns = data.get("messages") or data.get("conversations")
    if isinstance(turns, list):
        for turn in turns:
            text = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
            if not isinstance(text, str):
                raise NoText("a message of the dialogue has no text")
            yield text
        return
    names = [name for name in ("instruction", "input", "output", "q", "a") if name in data]
    if not names:
        raise NoText(f"no field {text_field!r}; the fields are {', '.join(map(str, list(data)[:8]))}: use --text_field")
    history = data.get("history")
    for turn in history if isinstance(history, list) else []:
        yield from (text for text in turn if isinstance(text, str))
    yield from (data[name] for name in names if isinstance(data[name], str))


def is_held_out(text: str, fraction: float) -> bool:
    """Whether `text` is measured instead of trained on: a pure function of the text, the same in every file."""
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


def read_texts(path: Path, text_field: str, on_bad: Callable[[BadLine], None], on_bytes: Callable) -> Iterator[str]:
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
        except NoText as error:
            on_bad(BadLine(record.line, str(error)))
        else:
            yield text


class HeldOut:
    """The different held-out texts of one file, up to MEASURED_BYTES."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}
        self.n_bytes = 0

    def add(self, text: str) -> None:
        if self.n_bytes < MEASURED_BYTES and text not in self.texts:
            self.texts[text] = None
            self.n_bytes += len(text.encode("utf-8"))


def read_data(args: argparse.Namespace) -> tuple[Sample, dict[str, HeldOut]]:
    """Read all files once: the texts to train on, and by file name the texts to measure."""
    sample = Sample(args.max_bytes)
    held_out: dict[str, HeldOut] = {}
    bad: list[str] = []
    n_bad = 0
    read_before: set[Path] = set()
    with Progress("reading", sum(map(total_bytes, args.data_path + args.eval_path))) as progress:
        for number, path in enumerate(args.data_path + args.eval_path):
            trained = number < len(args.data_path)
            measured = held_out.setdefault(_kind_of_file(path), HeldOut())
            n_texts, first_bad = 0, None

            def on_bad(line: BadLine, path: Path = path) -> None:
                nonlocal n_bad, first_bad
                first_bad = first_bad or line
                if path in read_before:
                    return  # told the first time
                n_bad += 1
                if len(bad) < 10:
                    bad.append(f"{path}, line {line.line}: {line.reason}")

            for text in read_texts(path, args.text_field, on_bad, progress.update):
                n_texts += 1
                if is_held_out(text, args.held_out):
                    measured.add(text)
                elif trained:
                    sample.add(text)
                    progress.kept = sample.seen
            if not n_texts:
                reason = f"line {first_bad.line}: {first_bad.reason}" if first_bad else "no text in it"
                raise UserError(f"{path}, {reason}; no row of the file could be used")
            read_before.add(path)
    if n_bad:
        print(f"skipped {n_bad:,} rows without usable text:", *bad, sep="\n  ", file=sys.stderr)
        if n_bad > len(bad):
            print(f"  and {n_bad - len(bad):,} more", file=sys.stderr)
    if not len(sample):
        raise UserError(f"nothing left to train on: --held_out {args.held_out} took every text; use a smaller fraction")
    return sample, held_out


def _kind_of_file(path: Path) -> str:
    """The name a file is reported by; source files are many and small, so they count together."""
    return f"*{path.suffix.lower()}" if path.suffix.lower() in SOURCE_SUFFIXES else path.name


# --- training --------------------------------------------------------------------------------------------------------


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """Byte-level BPE of `texts`. The result depends on which texts there are, not on their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, training: dict) -> None:
    """Write a complete Hugging Face tokenizer folder; `training` says how it was made."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": UNK,  # libraries want one; we mask padding and never look at its id
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    contents = {
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        "training.json": json.dumps(training, ensure_ascii=False, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with (folder / name).open("w", encoding="utf-8", newline="\n") as file:
            file.write(contents[name])
            file.flush()
            os.fsync(file.fileno())


def publish(finished: Path, out_dir: Path) -> None:
    """Make the folder `finished` (beside it) become `out_dir`; killed at any moment, `out_dir` stays loadable.

    A folder cannot be renamed over another. So an old tokenizer is replaced file by file, the vocabulary at the end:
    the files before it only name the special tokens and the chat format, which fit the old vocabulary as well.
    """
    if not out_dir.exists():
        finished.rename(out_dir)
    else:
        for name in FILES:
            os.replace(finished / name, out_dir / name)
    fsync_dir(out_dir.parent)


# --- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compression:
    """How much text the tokens of some texts hold."""

    texts: int
    n_bytes: int
    chars: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / max(self.tokens, 1)

    @property
    def chars_per_token(self) -> float:
        return self.chars / max(self.tokens, 1)


def measure(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Compression:
    """Count bytes, characters and tokens of `texts`."""
    texts = list(texts)
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    tokens = sum(map(len, encode_texts(tokenizer, texts)))
    return Compression(len(texts), n_bytes, sum(map(len, texts)), tokens)


def unicode_samples(per_plane: int = 512) -> Iterator[tuple[str, str]]:
    """Yield (what it is, text): characters spread over all 17 planes, alone and side by side, and awkward sequences.

    Characters are taken at even distances, so the sample is the same each time.
    """
    for plane in range(17):
        start = plane << 16
        characters = [chr(start + i * 0x10000 // per_plane + i % 97) for i in range(per_plane)]
        characters = [c for c in characters if not 0xD800 <= ord(c) <= 0xDFFF and ord(c) >> 16 == plane]
        yield from ((f"plane {plane}, U+{ord(c):04X}", c) for c in characters)
        yield f"plane {plane}, in a row", "".join(characters)
        yield f"plane {plane}, between words", " ".join(f"a{c}b 中{c}文" for c in characters)
    basic = [chr(i) for i in range(0xD800)]
    yield "all characters up to U+D7FF in a row", "".join(basic)
    yield from ((f"control character U+{ord(c):04X}", f"a{c}b") for c in basic if unicodedata.category(c) == "Cc")
    marks = [c for c in basic if unicodedata.combining(c)]
    yield from ((f"lone combining mark U+{ord(c):04X}", c) for c in marks)
    yield "many marks on one letter", "e" + "".join(marks)
    yield "composed and decomposed", "\u00e9 e\u0301 \u1e69 s\u0323\u0307 s\u0307\u0323 \uac00 \u1100\u1161"
    yield "emoji sequences", "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇨🇳🇯🇵 1️⃣ ❤️ \u200d \ufe0f"
    yield "blanks", " \t\n\r\n\n  \u00a0\u2003\u3000\u200b\ufeff \v\f\x85\u2028\u2029 "
    yield "right to left", "שלום \u202eעולם\u202c العربية"
    yield "special tokens as text", f"{UNK}{BOS} a {EOS}\n{BOS}user\n{EOS}"
    yield "nothing", ""


def round_trip_failures(tokenizer: PreTrainedTokenizerFast, samples: Iterable[tuple[str, str]]) -> list[str]:
    """What decoding does not give back exactly, or encodes to a control token: descriptions of the failures."""
    failures = []
    for name, text in samples:
        ids = encode_text(tokenizer, text)
        if {UNK_ID, BOS_ID, EOS_ID} & set(ids):
            failures.append(f"{name}: text became a control token")
        elif (back := tokenizer.decode(ids)) != text:
            failures.append(f"{name}: {text[:20]!r} came back as {back[:20]!r}")
    return failures


def longest_tokens(tokenizer: PreTrainedTokenizerFast, count: int = 20) -> list[str]:
    """The tokens with most characters, decoded."""
    tokens = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return sorted(tokens, key=lambda token: (-len(token), token))[:count]


def print_report(tokenizer: PreTrainedTokenizerFast, compression: dict[str, Compression], n_samples: int) -> None:
    special = ", ".join(f"{token}={tokenizer.convert_tokens_to_ids(token)}" for token in (UNK, BOS, EOS))
    print(f"vocabulary      {len(tokenizer):,} tokens, {special}, hash {tokenizer_hash(tokenizer)}")
    width = max(map(len, compression))
    print(f"held-out text   {'':<{width}}  {'texts':>8}  {'bytes':>11}  bytes/token  chars/token")
    for name, figures in compression.items():
        print(
            f"                {name:<{width}}  {figures.texts:>8,}  {figures.n_bytes:>11,}  "
            f"{figures.bytes_per_token:>11.3f}  {figures.chars_per_token:>11.3f}"
        )
    print(f"round trip      {n_samples:,} samples of all 17 Unicode planes come back unchanged")
    print("longest tokens  " + " ".join(map(repr, longest_tokens(tokenizer))))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    sample, held_out = read_data(args)
    print(
        f"training on {len(sample):,} texts, {sample.n_bytes / 1e6:,.1f} MB "
        f"(of {sample.seen:,} texts, {sample.seen_bytes / 1e6:,.1f} MB), about {sample.n_bytes * 2e-6:.0f} s",
        flush=True,
    )
    bpe = train_bpe(sample, args.vocab_size, args.min_frequency)
    if bpe.get_vocab_size() != args.vocab_size:
        raise UserError(
            f"the text has pairs for only {bpe.get_vocab_size():,} tokens, not {args.vocab_size:,}: "
            "give more text, a smaller --vocab_size or --min_frequency 1"
        )

    args.out_dir.parent.mkdir(parents=True, exist_ok=True)
    finished = Path(tempfile.mkdtemp(prefix=f".{args.out_dir.name}.", suffix=".tmp", dir=args.out_dir.parent))
    try:
        # What is reported is what others will load: the files on the disk, not the object in memory.
        training = {"vocab_size": args.vocab_size, "min_frequency": args.min_frequency, "held_out": args.held_out}
        training["files"] = dict(Counter(map(_kind_of_file, args.data_path)))  # name: how many, or how often
        training |= {"texts": len(sample), "bytes": sample.n_bytes}
        write_tokenizer(bpe, finished, training)
        tokenizer = load_tokenizer(finished)
        samples = list(unicode_samples())
        samples += [("held-out text", text) for part in held_out.values() for text in list(part.texts)[:1000]]
        if failures := round_trip_failures(tokenizer, samples):
            raise UserError(
                f"{len(failures)} of {len(samples):,} texts do not survive encoding and decoding, nothing was written; "
                f"the first: {failures[0]}"
            )
        compression = {name: measure(tokenizer, part.texts) for name, part in held_out.items() if part.texts}
        training["tokenizer_hash"] = tokenizer_hash(tokenizer)
        training["held_out_compression"] = {
            name: {**asdict(figures), "bytes_per_token": round(figures.bytes_per_token, 4)}
            for name, figures in compression.items()
        }
        write_tokenizer(bpe, finished, training)
        finished.chmod(0o755)  # mkdtemp makes folders private
        publish(finished, args.out_dir)
    finally:
        shutil.rmtree(finished, ignore_errors=True)
    if compression:
        print_report(tokenizer, compression, len(samples))
    else:
        print("no text was held out: use a larger --held_out to measure compression")
    print(f"wrote {args.out_dir}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # the longest tokens, on a console that cannot show them
    run_script(main)
