"""Stage 4, LoRA: teach a model something new by training a small adapter beside its frozen weights.

    python 4-lora_sft.py --lora_name identity --data_path dataset/sample/lora_identity.jsonl
    python 4-lora_sft.py --lora_name shop --data_path shop.jsonl --rank 16 --target_modules wq wv --merge
    python 2-eval.py --lora out/lora_identity_512                              # talk to the result

In:  out/full_sft_{dim}[_moe].pth (or --init_from any checkpoint), and dialogues as 3-full_sft.py takes them
Out: out/lora_{name}_{dim}[_moe]/, an adapter in peft's format (a few percent of the model's size)
     with --merge also out/lora_{name}_{dim}[_moe].pth, the full model with the adapter added

Every chosen matrix W stays as it is; beside it two thin ones are trained, and W + alpha / rank * B A is used. Data and
loss are those of stage 3. The adapter belongs to the very weights it was trained on, and knows their fingerprint.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cli import flag, parse_options
from common.errors import UserError, run_script
from common.files import ROOT
from data_pipeline.tokenize_chats import tokenize_chat_data
from model.device import DTYPES, resolve_device
from model.lora import ALL_PROJECTIONS, add_adapter, merge, read_description, trainable_share
from model.weights import save_checkpoint
from trainer.distributed import cleanup_distributed, init_distributed, main_process_first
from trainer.losses import next_token_loss
from trainer.options import TuneOptions
from trainer.recipe import (
    adapter_run,
    open_tokenizer,
    require_files,
    show_sample,
    starting_model,
    train_and_val,
)
from trainer.trainer import fit


@dataclass
class LoraOptions(TuneOptions):
    data_path: list[Path] = flag(
        [ROOT / "dataset" / "sample" / "lora_identity.jsonl"],
        "dialogues: CSV or JSONL, as for 3-full_sft.py (default: dataset/sample/lora_identity.jsonl)", nargs="+",
    )  # fmt: skip
    lora_name: str = flag("identity", "what the adapter is called")
    rank: int = flag(8, "width of the adapter's matrices")
    alpha: float = flag(16.0, "the adapter's output is scaled by alpha / rank")
    lora_dropout: float = flag(0.0, "share of the adapter's inputs dropped while training")
    target_modules: list[str] = flag(
        list(ALL_PROJECTIONS), "linear layers that get an adapter (default: all)", nargs="+"
    )
    merge: bool = flag(False, "also write the full model with the adapter added")
    learning_rate: float = flag(1e-3, "peak learning rate")
    batch_size: int = flag(8, "rows of max_seq_len tokens that go through the model at once, per process")
    weight_decay: float = flag(0.0, "decay of the adapter's matrices")
    epochs: float = flag(3.0, "passes over the data; may be a fraction")
    show_sample: bool = flag(False, "print one sample with what is learned of it marked")

    def validate(self) -> list[str]:
        found = super().validate()
        if not re.fullmatch(r"[A-Za-z0-9-]+", self.lora_name):
            found.append(f"--lora_name {self.lora_name!r} becomes part of a file name: use letters, digits and -")
        if self.rank < 1:
            found.append(f"--rank {self.rank} must be at least 1")
        if not self.alpha > 0:
            found.append(f"--alpha {self.alpha} must be more than 0, or the adapter does nothing")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"--lora_dropout {self.lora_dropout} must be at least 0 and below 1")
        if self.init_from == "none":
            found.append("--init_from none: an adapter needs trained weights to stand beside")
        return found


def main() -> None:
    options = parse_options(LoraOptions, __doc__)
    dist_env = init_distributed(resolve_device(options.device).type, options.timeout)

    # What learns: an adapter on frozen weights.
    require_files(options.data_path, "name a file of dialogues with --data_path")
    tokenizer = open_tokenizer(options)
    model, base = starting_model(options, ["full_sft", "rl"], tokenizer)
    torch.manual_seed(options.seed)  # half of an adapter's matrices begin with random values
    try:
        adapted = add_adapter(
            model,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.lora_dropout,
            targets=options.target_modules,
        )
    except ValueError as error:
        raise UserError(f"--target_modules: {error}") from error
    print(trainable_share(adapted))
    run = adapter_run(options.lora_name, options, adapted, tokenizer, base, merge=options.merge)

    # What it learns from: dialogues.
    seq_len = model.config.max_seq_len
    cache = options.cache_dir or options.out_dir / "cache"
    with main_process_first(dist_env, "tokens"):
        dataset = tokenize_chat_data(options.data_path, tokenizer, cache, max_tokens=seq_len)
    if options.show_sample:
        show_sample(dataset, tokenizer)
    train, val = train_and_val(dataset, options, seq_len)

    # Learning.
    fit(adapted, next_token_loss, train, val, options, run, dist_env)
    if dist_env.is_main and options.merge:
        path = options.out_dir / f"{run.name}.pth"
        info = read_description(options.out_dir / run.name) | {"merged_adapter": run.name}
        save_checkpoint(path, merge(adapted), dtype=DTYPES[options.save_dtype], info=info, overwrite=True)
        print(f"merged into {path}")
    cleanup_distributed(dist_env)
    print(f"done: {options.out_dir / run.name}; now try: python 2-eval.py --lora {options.out_dir / run.name}")


if __name__ == "__main__":
    run_script(main)
