"""Stage 1, pretraining: a network with random weights learns language by predicting the next token of plain text.

    python 1-pretrain.py                                                 # the 26.88M model on dataset/pretrain_data.csv
    python 1-pretrain.py --preset minimind-v1 --compile --use_wandb      # the 108M model
    python 1-pretrain.py --resume                                        # continue a run that was stopped
    python 1-pretrain.py --init_from out/pretrain_512.pth --data_path my_texts.jsonl --out_dir out/mine
    torchrun --nproc_per_node 2 1-pretrain.py                            # two processes, one per GPU

In:  dataset/pretrain_data.csv with a column `text` (made by python data_process.py pretrain); also JSONL, TXT, Parquet
Out: out/pretrain_{dim}[_moe].pth, the weights, and .json, how they were made (0-eval_pretrain.py generates with them)
     out/pretrain_{dim}[_moe].metrics.jsonl and .png, the loss over time
     out/pretrain_{dim}[_moe].resume/, the state for --resume

Every text becomes `<s>text</s>`. Texts are packed into rows of --max_seq_len tokens without seeing each other. At each
token the model assigns a probability to every entry of the vocabulary, and the loss is how surprised it was by the token
that really came next: ln(6400) = 8.76 when it knows nothing. After this stage it continues texts; it does not answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.cli import as_word, flag, parse_options
from common.errors import run_script
from common.files import ROOT
from trainer.options import TrainOptions, mix_flag


@dataclass
class PretrainOptions(TrainOptions):
    stage = "pretrain"
    recipes = {  # measured in docs/recipes.md
        "muon": {"learning_rate": 4e-3, "warmup_iters": 10},
        "adamw": {"learning_rate": 1e-3, "warmup_iters": 50},
    }

    data_path: list[Path] = flag(
        [ROOT / "dataset" / "pretrain_data.csv"],
        "texts: CSV, JSONL, JSON, Parquet or TXT, also .gz and .zst (default: dataset/pretrain_data.csv)", nargs="+",
    )  # fmt: skip
    mix: list[float] = mix_flag()
    text_field: str = flag("text", "column or key with the text")
    init_from: str | None = flag(None, "weights to train further (default: none, random weights)", metavar="FILE|none")
    optimizer: str = "auto"
    learning_rate: float = flag(None, "peak learning rate (default: 4e-3 with muon, 1e-3 with adamw)")
    warmup_iters: int = flag(
        None, "optimizer steps of linear warm-up, at most a tenth of the run (default: 10 with muon, 50 with adamw)"
    )  # fmt: skip
    batch_size: int = flag(
        None, "rows of max_seq_len tokens that go through the model at once, per process (default: from the length of the "
        "run; more than 32 are accumulated)"
    )  # fmt: skip


def main() -> None:
    options = parse_options(PretrainOptions, __doc__)

    # Imported here, because PyTorch takes seconds to load: --help and wrong flags are answered at once.
    from data_pipeline.tokenize import tokenize_pretrain_data
    from model.tokenizer import load_tokenizer
    from trainer.distributed import cleanup_distributed, init_distributed
    from trainer.losses import next_token_loss
    from trainer.recipe import choose_batch_size, load_model, packed_rows, require_files, weights_run
    from trainer.trainer import fit

    dist_env = init_distributed(options.device, options.timeout)

    # Model: random weights, or those of --init_from.
    tokenizer = load_tokenizer(options.tokenizer)
    start = None if options.init_from in (None, "none") else Path(options.init_from)
    model, origin = load_model(options, start, tokenizer, dist_env)
    run = weights_run(options, model.config, tokenizer, dist_env, origin)
    require_files(options.data_path, "make it with: python data_process.py pretrain, or name one with --data_path")

    # Data: texts, tokenized once and kept on the disk.
    train, val = packed_rows(
        options, dist_env, model.config.max_seq_len,
        lambda cache: tokenize_pretrain_data(
            options.data_path, tokenizer, cache, text_field=options.text_field, max_dropped=options.max_dropped
        ),
    )  # fmt: skip
    if options.batch_size is None:
        choose_batch_size(options, train, dist_env.size)

    # Loss: cross entropy of the next token.
    fit(model, next_token_loss, train, val, options, run, dist_env)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 0-eval_pretrain.py --weights {as_word(path)}")


if __name__ == "__main__":
    run_script(main)
