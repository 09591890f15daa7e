"""Stage 3, supervised fine-tuning: a model that continues text learns to answer, from examples of dialogues.

    python 3-full_sft.py                                                       # from the newest out/pretrain_*.pth
    python 3-full_sft.py --data_path my_chats.jsonl --init_from out/pretrain_768.pth --show_sample
    python 3-full_sft.py --resume                                              # go on where a run was stopped

In:  out/pretrain_{dim}[_moe].pth, and dataset/sft_data_single.csv or sft_data.csv (columns history,q,a; python
     data_process.py sft makes them), or JSONL with `messages` or `conversations`
Out: out/full_sft_{dim}[_moe].pth and .json, .metrics.jsonl, .png and .resume/ as in 1-pretrain.py

A dialogue is written as `<s>user\\n...</s>\\n<s>assistant\\n...</s>\\n`. The loss is that of pretraining, with one change:
only the assistant's texts and the `</s>` that ends each of them are learned. The model should answer questions, not ask
them, and it must learn to stop. Dialogues that are too long lose their oldest turns.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

from dataclasses import dataclass
from pathlib import Path

from common.cli import flag, parse_options
from common.errors import run_script
from common.files import ROOT
from data_pipeline.tokenize_chats import tokenize_chat_data
from model.device import resolve_device
from trainer.distributed import cleanup_distributed, init_distributed, main_process_first
from trainer.losses import next_token_loss
from trainer.options import TuneOptions
from trainer.recipe import open_tokenizer, require_files, show_sample, starting_model, train_and_val, weights_run
from trainer.trainer import fit


@dataclass
class SftOptions(TuneOptions):
    data_path: list[Path] = flag(
        [ROOT / "dataset" / "sft_data_single.csv"],
        "dialogues: CSV (history,q,a) or JSONL (messages or conversations) (default: dataset/sft_data_single.csv)",
        nargs="+",
    )  # fmt: skip
    learning_rate: float = flag(5e-4, "peak learning rate")
    batch_size: int = flag(16, "rows of max_seq_len tokens that go through the model at once, per process")
    show_sample: bool = flag(False, "print one sample with what is learned of it marked")


def main() -> None:
    options = parse_options(SftOptions, __doc__)
    dist_env = init_distributed(resolve_device(options.device).type, options.timeout)

    # What learns: a model that knows the language.
    require_files(options.data_path, "make it with: python data_process.py sft, or name one with --data_path")
    tokenizer = open_tokenizer(options)
    model, origin = starting_model(options, ["pretrain"], tokenizer)
    run = weights_run("full_sft", options, model, tokenizer, origin)

    # What it learns from: dialogues, with a mask over everything that the assistant does not say.
    seq_len = model.config.max_seq_len
    cache = options.cache_dir or options.out_dir / "cache"
    with main_process_first(dist_env, "tokens"):
        dataset = tokenize_chat_data(options.data_path, tokenizer, cache, max_tokens=seq_len)
    if options.show_sample:
        show_sample(dataset, tokenizer)
    train, val = train_and_val(dataset, options, seq_len)

    # Learning.
    fit(model, next_token_loss, train, val, options, run, dist_env)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 2-eval.py --weights {path}")


if __name__ == "__main__":
    run_script(main)
