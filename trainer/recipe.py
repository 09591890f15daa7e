"""The steps that every training stage begins with: files, tokenizer, model, and a run that knows its name."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.tokenize import TokenizedDataset
from model.device import DTYPES
from model.LMConfig import PRESETS, LMConfig, architecture_differences
from model.lora import read_description, save_adapter
from model.model import Transformer, describe_parameters, parameter_counts
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import (
    Checkpoint,
    check_can_write,
    checkpoint_name,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from trainer.checkpoint import complete_states
from trainer.options import TrainOptions, TuneOptions
from trainer.trainer import Run


def require_files(paths: list[Path], hint: str) -> None:
    """UserError naming every path that is not a file."""
    folders = [str(path) for path in paths if path.is_dir()]
    if folders:
        raise UserError(f"--data_path takes files, and this is a folder: {', '.join(folders)}; name the files in it")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"no such file: {', '.join(missing)}; {hint}")


def open_tokenizer(options: TrainOptions, config: LMConfig | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of this run; with `config` its size must be the model's vocabulary."""
    try:
        tokenizer = load_tokenizer(options.tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config is not None and len(tokenizer) != config.vocab_size:
        raise UserError(
            f"the tokenizer in {options.tokenizer} has {len(tokenizer)} tokens, the model {config.vocab_size}: "
            f"give --vocab_size {len(tokenizer)} or another --tokenizer"
        )
    return tokenizer


def new_model(config: LMConfig, seed: int) -> Transformer:
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return Transformer(config)


def starting_model(
    options: TuneOptions, stages: list[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[Transformer, Checkpoint | None]:
    """The model a stage starts from, and the checkpoint it came from (None: random weights).

    --init_from, or the newest checkpoint of `stages` in --out_dir (of the size of --preset, if that is given). Weights
    are float32, whatever the file's precision; fields such as --dropout and --max_seq_len replace those of the file.
    """
    if options.init_from == "none":
        print("WARNING: starting from random weights: the model has not learned any language")
        config = options.config()
        open_tokenizer(options, config)
        return new_model(config, options.seed), None
    if options.init_from is not None:
        path = Path(options.init_from)
    else:
        path = find_checkpoint(options.out_dir, stages, options.config() if options.preset else None)
        if path is None:
            size = f" of the size of {options.preset}" if options.preset else ""
            raise UserError(
                f"no {' or '.join(stages)} checkpoint{size} in {options.out_dir}: run the stage before this one, name "
                "weights with --init_from FILE, or start from random ones with --init_from none"
            )
    overrides = (dict(PRESETS[options.preset]) if options.preset else {}) | options.model
    try:
        checkpoint = load_checkpoint(path, dtype=torch.float32, tokenizer=tokenizer, overrides=overrides)
    except ValueError as error:
        raise UserError(str(error)) from error
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
    """A run whose result is OUT_DIR/<stage>_<dim>[_moe].pth.

    origin: the checkpoint it started from; None: random weights.
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
        identity={
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "origin": origin.fingerprint if origin is not None else None,
        },
        save_weights=save_weights,
        active_parameters=parameter_counts(model)["active"],
    )


def adapter_run(
    name: str,
    options: TrainOptions,
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    base: Checkpoint,
    merge: bool = False,
) -> Run:
    """A run whose result is the adapter folder OUT_DIR/lora_<name>_<dim>[_moe].

    merge: a .pth of that name is to be written as well.
    Raises UserError if an adapter or weights of another architecture are in the way.
    """
    config = base.config
    folder = options.out_dir / Path(checkpoint_name(f"lora_{name}", config)).stem
    try:
        options.out_dir.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not options.overwrite:
            differences = architecture_differences(LMConfig(**read_description(folder)["config"]), config)
            if differences:
                raise UserError(
                    f"{folder} is an adapter of another model ({'; '.join(differences)}): replace it with --overwrite, or "
                    "choose another --lora_name"
                )
    except OSError as error:
        raise UserError(
            f"--out_dir {options.out_dir} cannot be used ({error.strerror}); choose another folder"
        ) from error
    except ValueError as error:
        raise UserError(f"{error}; remove the folder or choose another --lora_name") from error
    try:
        if merge:
            check_can_write(options.out_dir / f"{folder.name}.pth", config, options.overwrite)
    except ValueError as error:
        raise UserError(str(error)) from error

    return Run(
        stage="lora",
        name=folder.name,
        config=config,
        identity={
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "origin": base.fingerprint,
            "adapter": {
                key: sorted(value) if isinstance(value, set) else value
                for key, value in adapted.peft_config["default"].to_dict().items()
                if key in ("r", "lora_alpha", "lora_dropout", "target_modules")
            },
        },
        save_weights=lambda info: save_adapter(folder, adapted, base, info),
        active_parameters=parameter_counts(adapted.get_base_model())["active"],
    )


def show_sample(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print one document, what is learned of it in green (in a log without colours: between » and «)."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[32m", "\033[0m") if colour else ("»", "«")
    tokens = dataset.document(0)
    loss_mask = dataset.loss_mask[: len(tokens)] if dataset.loss_mask is not None else np.arange(len(tokens)) > 0
    print(f"--- the first sample; learned is what stands {'in green' if colour else 'between » and «'}:")
    for learned, group in itertools.groupby(
        zip(tokens.tolist(), loss_mask.tolist(), strict=True), lambda pair: pair[1]
    ):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        print(f"{on}{text}{off}" if learned else text, end="")
    print("\n---")


def train_and_val(
    dataset: TokenizedDataset, options: TrainOptions, seq_len: int
) -> tuple[PackedRows, PackedRows | None]:
    """Training and validation rows of a tokenized dataset; None where --val_fraction is 0."""
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
