"""The steps shared by the stages that start from a trained model: its weights, and rows of dialogues."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.preferences import PreferencePairs
from data_pipeline.tokenize_chats import show_sample, tokenize_chat_data
from inference.model_finder import find_model
from model.architecture import checkpoint_name
from model.device import resolve_device, resolve_dtype
from model.model import Transformer
from model.weights_file import Checkpoint
from trainer.distributed import DistEnv, all_gather_object, main_process_first
from trainer.losses import compute_ref_logps
from trainer.options import DialogueOptions, TrainOptions, TuneOptions
from trainer.recipe import load_model, packed_rows


def starting_model(
    options: TuneOptions, stages: list[str], tokenizer: PreTrainedTokenizerFast, dist_env: DistEnv
) -> tuple[Transformer, Checkpoint | None]:
    """Return the model a stage starts from, and the checkpoint it came from (None: random weights).

    --init_from, or the newest finished checkpoint of `stages` in --out_dir (of the size of --preset or --dim, if given);
    see `load_model`.
    """
    if options.init_from == "none":
        print("WARNING: starting from random weights: the model has not learned any language")
        return load_model(options, None, tokenizer, dist_env)
    if options.init_from is not None:
        path: Path | None = Path(options.init_from)
    else:
        sized = options.preset or options.model.keys() & {"dim", "use_moe"}
        config = options.config() if sized else None
        path = find_model(options.out_dir, stages, config, "--init_from")
    if path is None:
        names = [checkpoint_name(stage, config) if config else f"{stage}_*.pth" for stage in stages]
        raise UserError(
            f"no {' or '.join(names)} in {options.out_dir}: run the stage before this one, name "
            "weights with --init_from FILE, or start from random ones with --init_from none"
        )
    options.init_from = str(path)  # --resume finds the same one again
    return load_model(options, path, tokenizer, dist_env)


def chat_rows(
    options: DialogueOptions,
    dist_env: DistEnv,
    tokenizer: PreTrainedTokenizerFast,
    seq_len: int,
    image_ids: Sequence[int] = (),
) -> tuple[PackedRows, PackedRows | None]:
    """Return training and validation rows of dialogues, with a mask over everything that the assistant does not say.

    image_ids: the tokens that stand for an image, for dialogues about images.
    """
    train, val = packed_rows(
        options, dist_env, seq_len,
        lambda cache: tokenize_chat_data(
            options.data_path, tokenizer, cache, max_tokens=seq_len, image_ids=image_ids, max_dropped=options.max_dropped
        ),
    )  # fmt: skip
    if options.show_sample:
        show_sample(train.dataset, tokenizer)
    return train, val


def add_ref_logps(
    parts: list[PreferencePairs], reference: list[Any], options: TrainOptions, dist_env: DistEnv, model: nn.Module
) -> None:
    """Give pairs of answers the log-probabilities that `model` assigns them before training; kept in the cache.

    reference: what identifies `model`, as JSON-friendly values: its weights and its architecture. A sharded model computes
    on all processes together; where each process has all of it, one computes for all.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)

    def on_all_processes(found: bool) -> bool:
        return all(all_gather_object(dist_env, found)) if options.shards_weights else found

    heartbeat = partial(dist_env.heartbeat, count=options.shards_weights)
    for part in parts:
        compute = partial(compute_ref_logps, model, part, device, dtype, options.batch_size, heartbeat)
        one_by_one = main_process_first(dist_env, "computing the reference")
        with contextlib.nullcontext() if options.shards_weights else one_by_one:
            part.add_ref_logps(options.cache_folder, [*reference, str(dtype)], compute, on_all_processes)
