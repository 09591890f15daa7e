"""The steps that every training stage begins with: files, tokenizer, data, model, and the run."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.tokenize import TokenizedDataset
from inference.model_finder import checkpoint_name, find_model
from model.device import DTYPES
from model.LMConfig import PRESETS, LMConfig
from model.model import Transformer, describe_parameters, parameter_counts
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import Checkpoint, check_can_write, load_checkpoint, save_checkpoint
from trainer.checkpoint import complete_states
from trainer.distributed import DistEnv, main_process_first
from trainer.options import TrainOptions, TuneOptions
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


def starting_model(
    options: TuneOptions, stages: list[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[Transformer, Checkpoint | None]:
    """Return the model a stage starts from, and the checkpoint it came from (None: random weights).

    --init_from, or the newest checkpoint of `stages` in --out_dir (of the size of --preset, if that is given). Weights
    are float32, whatever the file's precision; fields such as --dropout and --max_seq_len replace those of the file.
    """
    if options.init_from == "none":
        print("WARNING: starting from random weights: the model has not learned any language")
        config = options.config()
        open_tokenizer(options, config)
        return new_model(config, options.seed), None
    if options.init_from is not None:
        path: Path | None = Path(options.init_from)
    else:
        path = find_model(options.out_dir, stages, options.config() if options.preset else None)
    if path is None:
        size = f" of the size of {options.preset}" if options.preset else ""
        raise UserError(
            f"no {' or '.join(stages)} checkpoint{size} in {options.out_dir}: run the stage before this one, name "
            "weights with --init_from FILE, or start from random ones with --init_from none"
        )
    overrides = (PRESETS[options.preset] if options.preset else {}) | options.model
    checkpoint = load_checkpoint(path, dtype=torch.float32, tokenizer=tokenizer, overrides=overrides)
    stage, step = checkpoint.info.get("stage", "unknown stage"), checkpoint.info.get("step", "?")
    print(f"starting from {path} ({stage}, step {step}): {describe_parameters(checkpoint.model)}")
    for note in checkpoint.notes:
        print(f"note: {note}")
    return checkpoint.model, checkpoint


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
    make_out_dir(options.out_dir)
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


def make_out_dir(out_dir: Path) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir} cannot be used ({error.strerror}); choose another folder") from error


def packed_rows(
    options: TrainOptions,
    dist_env: DistEnv,
    seq_len: int,
    tokenize: Callable[[Path], TokenizedDataset],
    show: PreTrainedTokenizerFast | None = None,
) -> tuple[PackedRows, PackedRows | None]:
    """Return training and validation rows of the data (None where --val_fraction is 0).

    Args:
        tokenize: return the tokens of the data from the cache in a folder, or create them there.
        show: the tokenizer, to print the first sample.
    """
    with main_process_first(dist_env, "tokens"):
        dataset = tokenize(options.cache_dir or options.out_dir / "cache")
    if show is not None:
        show_sample(dataset, show)
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


def show_sample(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print one document with its target tokens in green (in a log without colours: between » and «)."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[32m", "\033[0m") if colour else ("»", "«")
    tokens = dataset.document(0)
    loss_mask = dataset.loss_mask[: len(tokens)] if dataset.loss_mask is not None else np.arange(len(tokens)) > 0
    print(f"--- the first sample; the model learns the text {'in green' if colour else 'between » and «'}:")
    pairs = zip(tokens.tolist(), loss_mask.tolist(), strict=True)
    for learned, group in itertools.groupby(pairs, lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        print(f"{on}{text}{off}" if learned else text, end="")
    print("\n---")
