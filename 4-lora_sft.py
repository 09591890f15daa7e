"""Stage 4, LoRA: teach a model something new by training a small adapter beside its frozen weights.

    python 4-lora_sft.py --lora_name identity --data_path dataset/sample/lora_identity.jsonl
    python 4-lora_sft.py --lora_name shop --data_path shop.jsonl --rank 16 --target_modules wq wv --merge
    python 2-eval.py --lora out/lora_identity_512                              # chat with the result

In:  the newest of out/full_sft_{dim}[_moe].pth, rl_, rlvr_ and distill_ (any checkpoint with --init_from), and dialogues
     as for 3-full_sft.py
Out: out/lora_{name}_{dim}[_moe]/, an adapter in peft's format (a few percent of the model's size)
     with --merge also out/lora_{name}_{dim}[_moe].pth, the full model with the adapter added

Every chosen matrix W stays as it is; beside it two thin ones are trained, and W + alpha / rank * B A is used. Data and
loss are those of stage 3. An adapter fits only the weights it was trained on, and stores their fingerprint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.cli import as_word, flag, parse_options
from common.errors import UserError, run_script
from common.files import ROOT
from trainer.options import DialogueOptions, mix_flag


@dataclass
class LoraOptions(DialogueOptions):
    stage = "lora_{lora_name}"

    data_path: list[Path] = flag(
        [ROOT / "dataset" / "sample" / "lora_identity.jsonl"],
        "dialogues: CSV or JSONL, as for 3-full_sft.py (default: dataset/sample/lora_identity.jsonl)", nargs="+",
    )  # fmt: skip
    mix: list[float] = mix_flag()
    lora_name: str = flag("identity", "name of the adapter")
    rank: int = flag(8, "width of the adapter's matrices", min=1)
    alpha: float = flag(
        16.0, "the adapter's output is scaled by alpha / rank; above 0, or the adapter does nothing", above=0
    )
    lora_dropout: float = flag(0.0, "share of the adapter's inputs dropped while training", min=0, below=1)
    target_modules: list[str] = flag(
        ["wq", "wk", "wv", "wo", "w1", "w2", "w3"], "linear layers that get an adapter (default: all)", nargs="+"
    )
    merge: bool = flag(False, "also write the full model with the adapter added")
    learning_rate: float = 2e-3
    batch_size: int = 8
    weight_decay: float = 0.0
    epochs: float = 3.0

    def validate(self) -> list[str]:
        rules = {
            f"--lora_name {self.lora_name!r} becomes part of a file name: use letters, digits and -": (
                re.fullmatch(r"[A-Za-z0-9-]+", self.lora_name)
            ),
            "--embedding_lr_scale: the embedding is frozen here: leave it out": self.embedding_lr_scale == 1,
            "--init_from none: an adapter needs trained weights to start from": self.init_from != "none",
        }
        return super().validate() + [error for error, kept in rules.items() if not kept]


def main() -> None:
    options = parse_options(LoraOptions, __doc__)

    # Imported here, because PyTorch takes seconds to load: --help and wrong flags are answered at once.
    import torch

    from model.architecture import checkpoint_name
    from model.device import DTYPES
    from model.lora import add_adapter, load_adapter, save_adapter, trainable_share
    from model.tokenizer import load_tokenizer, tokenizer_hash
    from model.weights_file import save_checkpoint
    from trainer.checkpoint import check_run
    from trainer.distributed import cleanup_distributed, init_distributed
    from trainer.finetune import chat_rows, starting_model
    from trainer.losses import next_token_loss
    from trainer.recipe import require_files, sample_texts
    from trainer.trainer import Run, fit

    dist_env = init_distributed(options.device, options.timeout)

    # Model: an adapter on frozen weights.
    tokenizer = load_tokenizer(options.tokenizer)
    model, base = starting_model(options, ["full_sft", "rl", "rlvr", "distill"], tokenizer, dist_env)
    assert base is not None  # --init_from none was refused
    file = options.out_dir / checkpoint_name(f"lora_{options.lora_name}", base.config)
    folder = file.with_suffix("")
    for output in (folder, file) if options.merge else (folder,):
        check_run(output, options, dist_env, base.path)
    require_files(options.data_path, "name a file of dialogues with --data_path")

    settings = {"r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.lora_dropout}
    identity = {"adapter": settings | {"target_modules": sorted(set(options.target_modules))}}
    identity |= {"tokenizer_hash": tokenizer_hash(tokenizer), "origin": base.fingerprint}
    torch.manual_seed(options.seed)  # half of an adapter's matrices start with random values
    try:
        adapted = add_adapter(
            model, rank=options.rank, alpha=options.alpha, dropout=options.lora_dropout, targets=options.target_modules
        )
    except UserError as error:
        raise UserError(f"--target_modules: {error}") from error
    print(trainable_share(adapted))
    save, sample = partial(save_adapter, folder, adapted, base), partial(sample_texts, tokenizer, True)
    run = Run("lora", folder.name, base.config, identity, save, sample)

    # Data: dialogues.
    train, val = chat_rows(options, dist_env, tokenizer, model.config.max_seq_len)

    # Loss: cross entropy of the next token of the assistant.
    fit(adapted, next_token_loss, train, val, options, run, dist_env)
    if dist_env.is_main and options.merge:
        merged = load_adapter(folder, base=base.path)
        info = merged.info | {"merged_adapter": run.name}
        save_checkpoint(file, merged.model, dtype=DTYPES[options.save_dtype], info=info, overwrite=True)
        print(f"merged into {file}")
    cleanup_distributed(dist_env)
    print(f"done: {folder}; now try: python 2-eval.py --lora {as_word(folder)}")


if __name__ == "__main__":
    run_script(main)
