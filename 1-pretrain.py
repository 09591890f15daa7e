"""Stage 1, pretraining: a network with random weights learns language by predicting the next token of plain text.

    python 1-pretrain.py                                                 # the 26.88M model on dataset/pretrain_data.csv
    python 1-pretrain.py --preset minimind-v1 --compile --use_wandb      # the 108M model
    python 1-pretrain.py --resume                                        # go on where a run was stopped
    torchrun --nproc_per_node 2 1-pretrain.py                            # two processes, one per GPU

In:  dataset/pretrain_data.csv with a column `text` (python data_process.py pretrain makes it); also JSONL, TXT, Parquet
Out: out/pretrain_{dim}[_moe].pth, the weights, and .json, how they were made (0-eval_pretrain.py writes with them)
     out/pretrain_{dim}[_moe].metrics.jsonl and .png, how the loss fell
     out/pretrain_{dim}[_moe].resume/, what --resume needs

Every text becomes `<s>text</s>`. Texts are packed into rows of --max_seq_len tokens without seeing each other. At each
token the model gives a probability to every entry of the vocabulary, and the loss is how surprised it was by the token
that really came next: ln(6400) = 8.76 when it knows nothing. After this stage it continues texts; it does not answer.
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
from data_pipeline.tokenize import tokenize_pretrain_data
from model.device import resolve_device
from model.model import describe_parameters
from trainer.distributed import cleanup_distributed, init_distributed, main_process_first
from trainer.losses import next_token_loss
from trainer.options import TrainOptions
from trainer.recipe import new_model, open_tokenizer, require_files, train_and_val, weights_run
from trainer.trainer import fit


@dataclass
class PretrainOptions(TrainOptions):
    data_path: list[Path] = flag(
        [ROOT / "dataset" / "pretrain_data.csv"],
        "texts: CSV, JSONL, JSON, Parquet or TXT, also .gz and .zst (default: dataset/pretrain_data.csv)", nargs="+",
    )  # fmt: skip
    text_field: str = flag("text", "column or key with the text")


def main() -> None:
    options = parse_options(PretrainOptions, __doc__)
    dist_env = init_distributed(resolve_device(options.device).type, options.timeout)

    # What it learns from: texts, as tokens on disk.
    require_files(options.data_path, "make it with: python data_process.py pretrain, or name one with --data_path")
    config = options.config()
    tokenizer = open_tokenizer(options, config)
    cache = options.cache_dir or options.out_dir / "cache"
    with main_process_first(dist_env, "tokens"):
        dataset = tokenize_pretrain_data(options.data_path, tokenizer, cache, text_field=options.text_field)
    train, val = train_and_val(dataset, options, config.max_seq_len)

    # What learns: a network that knows nothing.
    model = new_model(config, options.seed)
    print(describe_parameters(model))
    run = weights_run("pretrain", options, model, tokenizer)

    # Learning.
    fit(model, next_token_loss, train, val, options, run, dist_env)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 0-eval_pretrain.py --weights {path}")


if __name__ == "__main__":
    run_script(main)
