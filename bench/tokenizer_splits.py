"""Compare splitting patterns and training mixtures of the tokenizer, in bytes per token on text that none has seen.

    python bench/tokenizer_splits.py --data_dir path/to/the/data

The folder has pretrain/{mobvoi_seq_monkey_general_open_corpus,tokenizer_train}.jsonl and sft/sft_data_zh.jsonl.
docs/tokenizer.md has the result. Every tokenizer has 6,400 entries, the control tokens included. Texts are held out by hash,
so that the held-out ones of one file are in no other.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import PreTrainedTokenizerFast  # noqa: E402

from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script  # noqa: E402
from data_pipeline.bpe import measure, train_bpe  # noqa: E402
from data_pipeline.tokenizer_data import read_data  # noqa: E402
from model.tokenizer import SPLIT, load_tokenizer  # noqa: E402

# Each as its publisher wrote it, but without possessive quantifiers, which change nothing here.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CONTRACTIONS = r"'(?i:[sdmt]|ll|ve|re)"
SPLITS = {
    "Qwen2: single digits (ours)": SPLIT,
    "Llama 3: up to 3 digits": SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"),
    "GPT-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT-4": rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s+$|\s*[\r\n]|\s+(?!\S)|\s+",
    "nanochat: up to 2 digits": rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,2}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
}
PRETRAIN, DIALOGUE, MIXED = "pretraining text", "dialogue", "mixed training text"
FILES = {
    PRETRAIN: "pretrain/mobvoi_seq_monkey_general_open_corpus.jsonl",
    DIALOGUE: "sft/sft_data_zh.jsonl",
    MIXED: "pretrain/tokenizer_train.jsonl",
}
MIXTURES = {  # a file that is named twice counts twice
    "mixed": [MIXED],
    "pretraining": [PRETRAIN],
    "pretraining + dialogue": [PRETRAIN, DIALOGUE],
    "pretraining + mixed": [PRETRAIN, MIXED],
    "pretraining + mixed + 2 x dialogue": [PRETRAIN, MIXED, DIALOGUE, DIALOGUE],
    "pretraining + 3 x mixed": [PRETRAIN, *[MIXED] * 3],
    "pretraining + 2 x mixed + 2 x dialogue": [PRETRAIN, MIXED, MIXED, DIALOGUE, DIALOGUE],
}


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="folder of the texts")
    add("--splits", nargs="*", choices=SPLITS, default=[*SPLITS], help="splitting patterns to compare (default: all)")
    add("--mixtures", nargs="*", choices=MIXTURES, default=[*MIXTURES], help="training data to compare (default: all)")
    add("--tokenizers", type=Path, nargs="*", default=[], help="tokenizer folders to measure as well (default: none)")
    add("--held_out", type=float, default=0.05, help="fraction of the texts that is measured (default: 0.05)")
    add("--max_bytes", type=float, default=32e6, help="train on at most this many bytes (default: 32e6)")
    add("--vocab_size", type=int, default=6400, help="number of tokens (default: 6400)")
    args = parser.parse_args()
    paths = {name: args.data_dir / file for name, file in FILES.items()}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise UserError(f"no such file: {', '.join(missing)}; name another --data_dir")

    print(f"| splitting | trained on | MB | {DIALOGUE} | {PRETRAIN} |")
    print("|---|---|---|---|---|", flush=True)

    def show(split: str, mixture: str, n_bytes: float, tokenizer: PreTrainedTokenizerFast, measured: dict) -> None:
        parts = [measured[paths[name].name].texts for name in (DIALOGUE, PRETRAIN)]
        figures = [measure(tokenizer, texts).bytes_per_token for texts in parts]
        size = f"{n_bytes / 1e6:.1f}" if n_bytes else "–"
        print(f"| {split} | {mixture} | {size} | {figures[0]:.3f} | {figures[1]:.3f} |", flush=True)

    for mixture in args.mixtures:
        data_path = [paths[name] for name in MIXTURES[mixture]]
        sample, measured = read_data(data_path, [*paths.values()], "text", args.held_out, args.max_bytes)
        if mixture == args.mixtures[0]:
            for folder in args.tokenizers:
                show(str(folder), "as it is", 0, load_tokenizer(folder), measured)
        for split in args.splits:
            bpe = train_bpe(sample, args.vocab_size, split=SPLITS[split])
            show(split, mixture, sample.n_bytes, PreTrainedTokenizerFast(tokenizer_object=bpe), measured)


if __name__ == "__main__":
    run_script(main)
