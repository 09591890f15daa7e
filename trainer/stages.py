"""The steps that every training stage begins with: files, tokenizer, model, and a run that knows its name."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from model.LMConfig import LMConfig
from model.model import Transformer, parameter_counts
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import check_can_write, checkpoint_name, save_checkpoint
from trainer.arguments import DTYPES, TrainOptions
from trainer.checkpoint import complete_states
from trainer.datasets import PackedRows
from trainer.errors import UserError
from trainer.loop import Run


def require_files(paths: list[Path], hint: str) -> None:
    """UserError naming every path that is not a file."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"no such file: {', '.join(missing)}; {hint}")


def open_tokenizer(options: TrainOptions, config: LMConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of this run; its size must be the model's vocabulary."""
    try:
        tokenizer = load_tokenizer(options.tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"the tokenizer in {options.tokenizer} has {len(tokenizer)} tokens, the model {config.vocab_size}: "
            f"give --vocab_size {len(tokenizer)} or another --tokenizer"
        )
    return tokenizer


def new_model(config: LMConfig, seed: int) -> Transformer:
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return Transformer(config)


def weights_run(
    stage: str, options: TrainOptions, model: Transformer, tokenizer: PreTrainedTokenizerFast, origin: str | None = None
) -> Run:
    """A run whose result is OUT_DIR/<stage>_<dim>[_moe].pth.

    origin: fingerprint of the weights it started from; None: random ones.
    Raises UserError if a checkpoint of another architecture is in the way, or the folder cannot be written.
    """
    config = model.config
    path = options.out_dir / checkpoint_name(stage, config)
    try:
        options.out_dir.mkdir(parents=True, exist_ok=True)
        if options.resume is None or not complete_states(options.out_dir / f"{path.stem}.resume"):
            check_can_write(path, config, options.overwrite)  # what is resumed is compared with more than the shape
    except OSError as error:
        raise UserError(
            f"--out_dir {options.out_dir} cannot be used ({error.strerror}); choose another folder"
        ) from error
    except ValueError as error:
        raise UserError(str(error)) from error

    def save_weights(info: dict) -> None:
        # The check above was made once, at the start: from now on the file is this run's.
        save_checkpoint(path, model, dtype=DTYPES[options.save_dtype], info=info, overwrite=True)

    return Run(
        stage=stage,
        name=path.stem,
        config=config,
        identity={"tokenizer_hash": tokenizer_hash(tokenizer), "origin": origin},
        save_weights=save_weights,
        active_parameters=parameter_counts(model)["active"],
    )


def train_and_val(corpus, options: TrainOptions, row_length: int) -> tuple[PackedRows, PackedRows | None]:
    """Training and validation rows of a corpus; None where --val_fraction is 0."""
    n_tokens = max(int(corpus.offsets[-1]), 1)
    train_ids, val_ids = corpus.split(min(options.val_fraction, options.val_tokens / n_tokens))
    train = PackedRows(corpus, train_ids, row_length, options.seed)
    val = PackedRows(corpus, val_ids, row_length, options.seed) if len(val_ids) else None
    held_out = f"{len(val_ids):,} documents, {val.n_tokens:,} tokens" if val else "nothing"
    print(
        f"training on {len(train_ids):,} documents, {train.n_tokens:,} tokens in {len(train):,} rows of {row_length} "
        f"({train.packing.fill:.1%} full); held out for validation: {held_out}"
    )
    return train, val
