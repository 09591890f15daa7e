"""The steps that every training stage begins with: files, tokenizer, data, model, and the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.tokenize import TokenizedDataset
from model.architecture import checkpoint_name
from model.device import DTYPES
from model.LMConfig import LMConfig
from model.model import Transformer, parameter_counts
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import Checkpoint, check_can_write, save_checkpoint
from trainer.checkpoint import complete_states
from trainer.distributed import DistEnv, main_process_first
from trainer.options import TrainOptions
from trainer.trainer import Run


def require_files(paths: list[Path], hint: str) -> None:
    """Raise UserError if one of the paths is not a file; name them all."""
    if folders := [str(path) for path in paths if path.is_dir()]:
        raise UserError(f"--data_path takes files, and this is a folder: {', '.join(folders)}; name the files in it")
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"no such file: {', '.join(missing)}; {hint}")


def open_tokenizer(options: TrainOptions, config: LMConfig | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of this run; with `config`, its size must be the model's vocabulary."""
    tokenizer = load_tokenizer(options.tokenizer)
    if config is not None and len(tokenizer) != config.vocab_size:
        raise UserError(
            f"the tokenizer in {options.tokenizer} has {len(tokenizer)} tokens, the model {config.vocab_size}: "
            f"give --vocab_size {len(tokenizer)} or another --tokenizer"
        )
    return tokenizer


def new_model(config: LMConfig, seed: int) -> Transformer:
    """Return a model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return Transformer(config)


def weights_run(
    stage: str,
    options: TrainOptions,
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    origin: Checkpoint | None = None,
) -> Run:
    """Return a run that writes OUT_DIR/<stage>_<dim>[_moe].pth.

    origin: the checkpoint it started from; None: random weights.
    Raises UserError if a checkpoint of another architecture is in the way, or the folder cannot be written.
    """
    config: LMConfig = model.config
    path = options.out_dir / checkpoint_name(stage, config)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    if options.resume is None or not complete_states(options.out_dir / f"{path.stem}.resume"):
        check_can_write(path, config, options.overwrite)  # a resumed state is compared with more than the shape

    def save_weights(info: dict) -> None:
        # The check above was made once, at the start: from now on the file belongs to this run.
        save_checkpoint(path, model, dtype=DTYPES[options.save_dtype], info=info, overwrite=True)

    return Run(
        stage=stage,
        name=path.stem,
        config=config,
        identity={
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "origin": origin.fingerprint if origin is not None else None,
        },
        save_weights=save_weights,
        active_parameters=parameter_counts(model)["active"],
    )


def packed_rows(
    options: TrainOptions,
    dist_env: DistEnv,
    seq_len: int,
    tokenize: Callable[[Path], TokenizedDataset],
) -> tuple[PackedRows, PackedRows | None]:
    """Return training and validation rows of the data (None where --val_fraction is 0).

    tokenize: return the tokens of the data from the cache in a folder, or create them there.
    """
    with main_process_first(dist_env, "tokens"):
        dataset = tokenize(options.cache_dir or options.out_dir / "cache")
    n_tokens = max(int(dataset.offsets[-1]), 1)
    train_ids, val_ids = dataset.split(min(options.val_fraction, options.val_tokens / n_tokens))
    train = PackedRows(dataset, train_ids, seq_len, options.seed)
    val = PackedRows(dataset, val_ids, seq_len, options.seed) if len(val_ids) else None
    held_out = f"{len(val_ids):,} documents, {val.n_tokens:,} tokens" if val else "nothing"
    print(
        f"training on {len(train_ids):,} documents, {train.n_tokens:,} tokens in {len(train):,} rows of {seq_len} "
        f"({train.packing.fill:.1%} full); held out for validation: {held_out}"
    )
    return train, val
