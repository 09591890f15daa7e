"""The steps that every training stage begins with: files, tokenizer, data, model, and the run."""

from __future__ import annotations

import itertools
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.packing import mix
from data_pipeline.tokenize import TokenizedDataset
from model.architecture import checkpoint_name
from model.device import DTYPES
from model.LMConfig import PRESETS, LMConfig
from model.model import Transformer, describe_parameters, initial_weights, model_class
from model.tokenizer import BOS_ID, EOS_ID, encode_text, tokenizer_hash
from model.weights import load_checkpoint
from model.weights_file import Checkpoint, build_model, read_tensors, save_checkpoint
from trainer.checkpoint import check_run
from trainer.distributed import DistEnv, barrier, broadcast_object, main_process_first
from trainer.options import TrainOptions, TuneOptions, VisionOptions
from trainer.trainer import Run

# What a model continues or answers for --sample_interval.
CONTINUED = ("The capital of France is", "中国的首都是", "Once upon a time", "从前")
ANSWERED = ("Who are you?", "你是谁？", "What is the capital of Japan?", "水是什么颜色的？")

# Where the batch is chosen by the length of the run:
MICRO_BATCH = 32  # rows at once
SMALLEST_BATCH = 4096.0  # tokens in a step; with fewer, the optimizer takes much of the time


def require_files(paths: list[Path], hint: str) -> None:
    """Raise UserError if one of the paths is not a file; name them all."""
    if folders := [str(path) for path in paths if path.is_dir()]:
        raise UserError(f"--data_path takes files, and this is a folder: {', '.join(folders)}; name the files in it")
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"no such file: {', '.join(missing)}; {hint}")


def load_model(
    options: TrainOptions, path: Path | None, tokenizer: PreTrainedTokenizerFast, dist_env: DistEnv
) -> tuple[Transformer, Checkpoint | None]:
    """Return the model to train and the checkpoint that it came from; without `path`, random weights and None.

    Random weights are the same for the same seed. Those of a file are float32, whatever its precision; fields such as
    --dropout and --max_seq_len replace those of the file. Where training shards the weights over the processes, they are
    mapped from a file.
    """
    if path is None:
        config = options.config()
        if len(tokenizer) != config.vocab_size:
            raise UserError(
                f"the tokenizer in {options.tokenizer} has {len(tokenizer)} tokens, the model {config.vocab_size}: "
                f"give --vocab_size {len(tokenizer)} or another --tokenizer"
            )
        tensors = initial_weights(config, options.seed)
        if options.shards_weights:
            model = mapped_model(tensors, config, options, dist_env)
        else:
            model = build_model(dict(tensors), config, "the new model").train()
        print(describe_parameters(model))
        return model, None
    if options.resume and not path.exists():
        raise UserError(
            f"no checkpoint {path}: if the run to resume started from it, name its new place with --init_from (its .json "
            "belongs to it)"
        )
    overrides = options.model
    if options.preset:
        asked = options.config()
        names = (*PRESETS[options.preset], "n_heads", "n_kv_heads", "use_moe")
        overrides = {name: getattr(asked, name) for name in names} | overrides
    checkpoint = load_checkpoint(path, "cpu", torch.float32, tokenizer, overrides, mapped=options.shards_weights)
    if checkpoint.config.vision_config is not None and not isinstance(options, VisionOptions):
        raise UserError(
            f"--init_from {path}: this model sees, and only 8-pretrain_vlm.py and 9-sft_vlm.py train such models"
        )
    if options.shards_weights and checkpoint.model.dtype != torch.float32:
        tensors = ((name, tensor.detach()) for name, tensor in checkpoint.model.named_parameters())
        checkpoint.model = mapped_model(tensors, checkpoint.config, options, dist_env)
    stage, step = checkpoint.info.get("stage", "unknown stage"), checkpoint.info.get("step", "?")
    print(f"starting from {path} ({stage}, step {step}): {describe_parameters(checkpoint.model)}")
    for note in checkpoint.notes:
        print(f"note: {note}")
    return checkpoint.model, checkpoint


def mapped_model(
    tensors: Iterable[tuple[str, Tensor]], config: LMConfig, options: TrainOptions, dist_env: DistEnv
) -> Transformer:
    """Return a model whose weights stay in a temporary file in --out_dir, so that no process holds them all.

    Rank 0 writes the file, one tensor at a time; all machines see it.
    """
    run = checkpoint_name(options.stage.format(**vars(options)), config).removesuffix(".pth")
    folder = options.out_dir / f".{run}.{broadcast_object(dist_env, lambda: uuid.uuid4().hex)}.tmp"  # see `exclusive`
    path = folder / "weights.pth"
    try:
        if dist_env.is_main:
            with torch.device("meta"):
                empty = model_class(config)(config)
            save_checkpoint(path, empty, info={}, tensors=tensors)
        barrier(dist_env)
        model = build_model(read_tensors(path), config, path).train()
        barrier(dist_env)
    finally:
        if dist_env.is_main:  # what is mapped from a file outlives its name (not on Windows)
            shutil.rmtree(folder, ignore_errors=True)
    return model


def weights_run(
    options: TrainOptions,
    config: LMConfig,
    tokenizer: PreTrainedTokenizerFast,
    dist_env: DistEnv,
    origin: Checkpoint | None = None,
    frozen: Sequence[tuple[str, Tensor]] = (),
    **identity: Any,
) -> Run:
    """Return a run that writes OUT_DIR/<stage>_<dim>[_moe].pth; the stage is that of the class of `options`.

    Args:
        origin: the checkpoint it starts from; None: random weights.
        frozen: the weights that are not trained, by name.
        identity: what else has to be the same to resume it.

    Raises UserError if it cannot start: see `trainer.checkpoint.check_run`.
    """
    path = options.out_dir / checkpoint_name(options.stage, config)
    check_run(path, options, dist_env, origin.path if origin is not None else None)
    with torch.device("meta"):
        empty = model_class(config)(config)

    def save_weights(info: dict, tensors: Iterable[tuple[str, Tensor]]) -> None:
        # The check above was made once, at the start: from now on the file belongs to this run.
        tensors = itertools.chain(tensors, frozen)
        save_checkpoint(path, empty, dtype=DTYPES[options.save_dtype], info=info, overwrite=True, tensors=tensors)

    return Run(
        stage=options.stage,
        name=path.stem,
        config=config,
        identity={
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "origin": origin.fingerprint if origin is not None else None,
            **identity,
        },
        save_weights=save_weights,
        sample=partial(sample_texts, tokenizer, isinstance(options, TuneOptions)),
    )


def sample_texts(tokenizer: PreTrainedTokenizerFast, chat: bool, model: nn.Module) -> list[dict[str, str]]:
    """Return how the model answers fixed questions, or continues fixed texts, always with the most probable token."""
    found = []
    for prompt in ANSWERED if chat else CONTINUED:
        if chat:
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = [BOS_ID, *encode_text(tokenizer, prompt)]
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
        out = model.generate(input_ids=inputs, **settings)  # type: ignore[operator]
        text = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        found.append({"prompt": prompt, "text": str(text)})
    return found


def packed_rows(
    options: TrainOptions,
    dist_env: DistEnv,
    seq_len: int,
    tokenize: Callable[[Path], TokenizedDataset],
) -> tuple[PackedRows, PackedRows | None]:
    """Return training and validation rows of the data (None where --val_fraction is 0).

    tokenize: return the tokens of the data from the cache in a folder, or create them there.
    """
    with main_process_first(dist_env, "preparing tokens"):
        dataset = tokenize(options.cache_folder)
    n_tokens = max(int(dataset.offsets[-1]), 1)
    train_ids, val_ids = dataset.split(min(options.val_fraction, options.val_tokens / n_tokens))
    if options.mix:
        train_ids = _mixed(dataset, train_ids, options)
    train = PackedRows(dataset, train_ids, seq_len, options.seed)
    val = PackedRows(dataset, val_ids, seq_len, options.seed) if len(val_ids) else None
    held_out = f"{len(val_ids):,} documents, {val.n_tokens:,} tokens" if val else "nothing"
    print(
        f"training on {len(train_ids):,} documents, {train.n_tokens:,} tokens in {len(train):,} rows of {seq_len} "
        f"({train.packing.fill:.1%} full); held out for validation: {held_out}"
    )
    return train, val


def _mixed(dataset: TokenizedDataset, documents: np.ndarray, options: TrainOptions) -> np.ndarray:
    """Return documents of the files in the shares of --mix; print how often each file is read in an epoch."""
    try:
        mixed, passes = mix(documents, dataset.lengths, dataset.source_ends, options.mix, options.seed)
    except ValueError as error:
        raise UserError(f"--mix: {error}; its documents are held out: use a smaller --val_fraction") from None
    total = sum(options.mix)
    parts = [
        f"{path.name} {share / total:.1%} of the tokens ({times:.2f} passes)"
        for path, share, times in zip(options.data_path, options.mix, passes, strict=True)
    ]
    print(f"mix in an epoch, about: {', '.join(parts)}")
    return mixed


def best_batch(tokens: float | None = None, steps: int | None = None) -> float:
    """Return the tokens in a step that are best for a run of so many tokens, or of so many steps.

    The longer the run, the larger: k * tokens ** 0.4. The exponent is about that of https://arxiv.org/abs/2505.13738 (0.38);
    k gives 4,096 for 800,000 tokens.
    """
    exponent = 0.4
    k = 4096 / 800_000**exponent
    if tokens is not None:
        return max(k * tokens**exponent, SMALLEST_BATCH)
    assert steps is not None
    # tokens = steps * batch, solved for the batch
    return max((k * steps**exponent) ** (1 / (1 - exponent)), SMALLEST_BATCH)


def choose_batch_size(options: TrainOptions, train: PackedRows, world_size: int) -> None:
    """Set --batch_size, and --accumulation_steps where more than MICRO_BATCH rows are needed, from the length of the run."""
    seq_len = train.packing.seq_len
    per_step = best_batch(steps=options.max_steps) if options.max_steps else best_batch(options.epochs * train.n_tokens)
    rows = max(round(per_step / seq_len / world_size / options.accumulation_steps), 1)  # of one process at once
    n_parts = -(-rows // MICRO_BATCH)
    options.batch_size = -(-rows // n_parts)
    options.accumulation_steps *= n_parts
    tokens = options.batch_size * options.accumulation_steps * world_size * seq_len
    print(f"no --batch_size: {tokens:,} tokens in a step, by the length of the run")
