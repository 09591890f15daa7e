"""Stage 3, supervised fine-tuning: a model that continues text learns to answer, from examples of dialogues.

    python 3-full_sft.py                                                       # from the newest out/pretrain_*.pth
    python 3-full_sft.py --data_path my_chats.jsonl --init_from out/pretrain_768.pth --show_sample
    python 3-full_sft.py --resume                                              # continue a run that was stopped

In:  out/pretrain_{dim}[_moe].pth, and dataset/sft_data_single.csv or sft_data.csv (columns history,q,a; made by python
     data_process.py sft), or JSONL with `messages` or `conversations`
Out: out/full_sft_{dim}[_moe].pth and .json, .metrics.jsonl, .png and .resume/ as in 1-pretrain.py

A dialogue is written as `<s>user\\n...</s>\\n<s>assistant\\n...</s>\\n`. The loss is that of pretraining, with one change:
its targets are only the assistant's texts and the `</s>` that ends each of them. The model should answer questions, not
ask them, and it must learn to stop. Dialogues that are too long lose their oldest turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.cli import as_word, flag, parse_options
from common.errors import run_script
from common.files import ROOT
from trainer.options import DialogueOptions, mix_flag


@dataclass
class SftOptions(DialogueOptions):
    stage = "full_sft"
    recipes = {"muon": {"learning_rate": 3e-3}, "adamw": {"learning_rate": 1e-3}}  # measured in docs/recipes.md

    data_path: list[Path] = flag(
        [ROOT / "dataset" / "sft_data_single.csv"],
        "dialogues: CSV (history,q,a) or JSONL (messages or conversations) (default: dataset/sft_data_single.csv)",
        nargs="+",
    )  # fmt: skip
    mix: list[float] = mix_flag()
    optimizer: str = "auto"
    learning_rate: float = flag(None, "peak learning rate (default: 3e-3 with muon, 1e-3 with adamw)")
    batch_size: int = 16


def main() -> None:
    options = parse_options(SftOptions, __doc__)

    # Imported here, because PyTorch takes seconds to load: --help and wrong flags are answered at once.
    from model.tokenizer import load_tokenizer
    from trainer.distributed import cleanup_distributed, init_distributed
    from trainer.finetune import chat_rows, starting_model
    from trainer.losses import next_token_loss
    from trainer.recipe import require_files, weights_run
    from trainer.trainer import fit

    dist_env = init_distributed(options.device, options.timeout)

    # Model: one that was pretrained.
    tokenizer = load_tokenizer(options.tokenizer)
    model, origin = starting_model(options, ["pretrain"], tokenizer, dist_env)
    run = weights_run(options, model.config, tokenizer, dist_env, origin)
    require_files(options.data_path, "make it with: python data_process.py sft, or name one with --data_path")

    # Data: dialogues, with a mask over everything that the assistant does not say.
    train, val = chat_rows(options, dist_env, tokenizer, model.config.max_seq_len)

    # Loss: cross entropy of the next token of the assistant.
    fit(model, next_token_loss, train, val, options, run, dist_env)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 2-eval.py --weights {as_word(path)}")


if __name__ == "__main__":
    run_script(main)
