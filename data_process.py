"""Turn raw dumps into the files the training stages read.

    python data_process.py all                      # every dump that lies in dataset/
    python data_process.py pretrain                 # one stage
    python data_process.py sft --input a.jsonl.zst b.parquet --max_chars 1024
    python data_process.py all --data_dir dataset/sample --out_dir out/data

stage     reads (by default, in --data_dir; .gz and .zst too)    writes (in --out_dir)
pretrain  mobvoi_seq_monkey_general_open_corpus.jsonl            pretrain_data.csv                  text
sft       sft_data_zh.jsonl                                      sft_data_single.csv, sft_data.csv  history,q,a
dpo       dpo/*.json                                             dpo/train_data.json                a JSON list

Inputs may be JSONL, JSON, CSV, TXT (each also .gz or .zst) or Parquet, of any size: they are streamed. Rows that cannot
be read are skipped, counted and listed with file, line and reason. An output file is replaced when its stage is done.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import argparse
import os
from pathlib import Path

from common.cli import Parser, validate_folder
from common.errors import UserError, run_script
from data_pipeline.cleaning import STAGES, Options, clean, summary_table

ROOT = Path(__file__).resolve().parent
DUMPS = {
    "pretrain": "mobvoi_seq_monkey_general_open_corpus.jsonl",
    "sft": "sft_data_zh.jsonl",
    "dpo": "dpo/*.json",
}
# A long answer in a preference pair is no fault, and pairs are few: no limit there unless asked for.
MAX_CHARS = {"pretrain": 512, "sft": 512, "dpo": 0}


def find_inputs(stage: str, data_dir: Path) -> list[Path]:
    """The dumps of `stage` in `data_dir`, sorted; not what this script wrote."""
    found = [path for ending in ("", ".gz", ".zst") for path in data_dir.glob(DUMPS[stage] + ending)]
    return sorted(path for path in found if path.name not in map(os.path.basename, STAGES[stage].outputs))


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("stage", choices=[*STAGES, "all"], help="what to make; all: every stage whose dump exists")
    add("--input", type=Path, nargs="+", metavar="PATH", help="raw files to read instead of the default ones")
    add("--data_dir", type=Path, default=ROOT / "dataset", help="folder of the raw dumps (default: dataset)")
    add("--out_dir", type=Path, default=ROOT / "dataset", help="folder for the results (default: dataset)")
    add(
        "--num_workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: one per CPU; 0: only this one)",
    )
    add("--max_chars", type=int, help="longest text, question or answer in characters; 0: any (default: 512; dpo: 0)")
    add("--min_chars", type=int, default=1, help="pretrain: shortest text in characters (default: 1)")
    add("--min_q_chars", type=int, default=2, help="sft: shortest question in characters (default: 2; original: 10)")
    add("--min_a_chars", type=int, default=1, help="sft: shortest answer in characters (default: 1; original: 5)")
    add("--min_chinese_ratio", type=float, default=0.0, metavar="0..1",
        help="smallest share of Chinese characters in each text (default: 0, because any more drops all English; "
        "original for sft: 0.9)")  # fmt: skip
    add("--history", choices=["keep", "drop", "only"], default="keep",
        help="sft: keep: dialogues go to sft_data.csv beside the single turns (default); drop: only their last turn "
        "is kept, in sft_data_single.csv; only: sft_data.csv gets nothing but dialogues")  # fmt: skip
    add("--dedupe", action=argparse.BooleanOptionalAction, default=True, help="drop exact duplicates (default: yes)")
    args = parser.parse_args()
    errors = [f"--{name} {value} is negative" for name, value in vars(args).items() if type(value) is int and value < 0]
    if not 0 <= args.min_chinese_ratio <= 1:
        errors.append(f"--min_chinese_ratio {args.min_chinese_ratio} is not between 0 and 1")
    errors += validate_folder("--out_dir", args.out_dir)
    if args.input and args.stage == "all":
        errors.append("--input needs one stage, not all")
    if errors:
        parser.error(errors)
    return args


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up like Ctrl-C
    done = 0
    for name in STAGES if args.stage == "all" else [args.stage]:
        inputs = args.input or find_inputs(name, args.data_dir)
        if not inputs:
            print(f"{name}: skipped, there is no {args.data_dir / DUMPS[name]}")
            continue
        options = Options(
            min_chars=args.min_chars,
            max_chars=MAX_CHARS[name] if args.max_chars is None else args.max_chars,
            min_q_chars=args.min_q_chars,
            min_a_chars=args.min_a_chars,
            min_chinese_ratio=args.min_chinese_ratio,
            history=args.history,
            dedupe=args.dedupe,
        )
        print(
            summary_table(STAGES[name], clean(STAGES[name], inputs, args.out_dir, options, args.num_workers)),
            flush=True,
        )
        done += 1
    if not done:
        raise UserError(
            f"no raw data in {args.data_dir}: download a dump into it or name one with --input (see --help)"
        )


if __name__ == "__main__":
    run_script(main)
