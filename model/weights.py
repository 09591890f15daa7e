"""Load weights from `.pth` files: our own, and those published for every MiniMind, after checking everything about them.

    checkpoint = load_checkpoint("out/pretrain_512.pth", dtype=torch.float32, tokenizer=tokenizer)
    checkpoint.model, checkpoint.config, checkpoint.info, checkpoint.notes

Published files come without the JSON of our own (see `model.weights_file`), and the later ones have other names: see
`model.families`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from model.families import (
    LLAMA_EMBEDDING,
    config_from_llama_shapes,
    config_from_shapes,
    from_llama_state,
    split_vision,
    vision_config_from_shapes,
)
from model.LMConfig import FIELD_TYPES, LMConfig, architecture_differences
from model.tokenizer import tokenizer_hash
from model.vision import VisionLanguageModel  # noqa: F401  (registers its class)
from model.weights_file import (
    EMBEDDING,
    OUTPUT,
    Checkpoint,
    build_model,
    check_intact,
    check_names_and_shapes,
    config_from_json,
    dtype_name,
    fingerprint_of,
    list_names,
    read_description,
    read_tensors,
)

_TABLES = re.compile(r"pos_cis|layers\.\d+\.attention\.mask")  # computed, not learnt, but stored in old files


def load_checkpoint(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    overrides: dict[str, Any] | None = None,
    mapped: bool = False,
) -> Checkpoint:
    """Load published weights or our own, and check everything about them. The model is in evaluation mode.

    Args:
        path: the `.pth` file.
        dtype: of the model; None: that of the file.
        tokenizer: the one the model will be used with; it must be the one the model was trained with.
        overrides: LMConfig fields to replace (dropout, max_seq_len, ...). Fields of the architecture come from the
            file: a different value for one is refused.
        mapped: leave the weights in the file, on the CPU, in its dtype: only what is used of them takes memory.

    Raises UserError for a missing or damaged file, a JSON of other weights, missing, unexpected, misshapen or non-finite
    weights by name, another tokenizer or architecture.
    """
    path = Path(path)
    state, config, info, notes = _read(path)
    check_intact(path, info)
    if overrides:
        config = _replace_fields(config, overrides, path)
    check_names_and_shapes(state, config, path)
    _check_values(state, config, path)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config, info, path)

    if not mapped:  # a copy, because another process may delete the file or overwrite it in place
        dtype = dtype or state[EMBEDDING].dtype
        if config.tie_word_embeddings:
            del state[OUTPUT]
        state = {name: tensor.to(device, dtype, copy=True) for name, tensor in state.items()}
    return Checkpoint(build_model(state, config, path), config, info, path, fingerprint_of(path), notes)


def _read(path: Path) -> tuple[dict[str, Tensor], LMConfig, dict, list[str]]:
    """Return the state dict under its plain names, the configuration, the JSON and notes."""
    notes: list[str] = []
    raw = read_tensors(path)
    info = read_description(path)
    state: dict[str, Tensor] = {}
    compiled = tables = 0
    for name, tensor in raw.items():
        plain = name.replace("_orig_mod.", "")
        compiled += plain != name
        if _TABLES.fullmatch(plain):
            tables += 1
        elif plain in state:
            raise UserError(f"{path} holds {plain} twice, with and without the prefix _orig_mod.")
        else:
            state[plain] = tensor
    if compiled:
        notes.append(f"{compiled} names carry the prefix _orig_mod. of torch.compile: removed")
    if tables:
        notes.append(f"{tables} tables (mask, pos_cis) in it: ignored, because they are computed")
    vision = split_vision(state)
    names_of_llama = LLAMA_EMBEDDING in state
    embedding = LLAMA_EMBEDDING if names_of_llama else EMBEDDING
    if embedding not in state or state[embedding].dim() != 2:
        raise UserError(f"{path} is not a MiniMind: there is no matrix {embedding}; it holds {list_names(list(state))}")

    if info:
        config = config_from_json(info, path.with_suffix(".json"))
    elif names_of_llama:
        config = config_from_llama_shapes(state, path, notes)
    else:
        pos_cis = next((tensor for name, tensor in raw.items() if name.endswith("pos_cis")), None)
        config = config_from_shapes(state, pos_cis, path, notes)
    if vision and not info:
        fields = vision_config_from_shapes(vision, names_of_llama, path, notes)
        config = LMConfig(**(config.own_fields() | {"vision_config": fields}))
    if names_of_llama:
        state = from_llama_state(state, config, path)
        notes.append("names of Llama in it: renamed to those of MiniMind-v1, queries and keys reordered")
    if OUTPUT not in state and config.tie_word_embeddings:
        state[OUTPUT] = state[EMBEDDING]
        if not names_of_llama:
            notes.append(f"no {OUTPUT} in it: tied to {EMBEDDING}")
    return state | vision, config, info, notes


# ---- architecture


def _replace_fields(config: LMConfig, overrides: dict[str, Any], path: Path) -> LMConfig:
    unknown = sorted(set(overrides) - set(FIELD_TYPES))
    if unknown:
        raise UserError(f"unknown model fields: {', '.join(unknown)}")
    wanted = LMConfig(**(config.own_fields() | overrides))
    scaling, trained = wanted.scaling, config.max_seq_len
    if config.scaling is None and scaling is not None:  # a longer context: the file's length times the factor
        if scaling.original != trained:
            raise UserError(
                f"{path} was trained at {trained} tokens; rope_scaling={scaling.method}:{scaling.factor:g} makes that "
                f"{trained * scaling.factor:g}, not max_seq_len={wanted.max_seq_len}: change one of the two"
            )
        config = LMConfig(**(config.own_fields() | {"rope_scaling": wanted.rope_scaling}))
    differences = architecture_differences(wanted, config)
    if differences:
        raise UserError(
            f"{path} is a model of another architecture (asked for != in the file: {', '.join(differences)}); "
            "leave these fields out, or choose another checkpoint"
        )
    return wanted


# ---- checks


def _check_values(state: dict[str, Tensor], config: LMConfig, path: Path) -> None:
    strange = [f"{name} ({dtype_name(t.dtype)})" for name, t in state.items() if not t.is_floating_point()]
    if strange:
        raise UserError(f"{path}: not floating-point weights: {list_names(strange)}")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: these weights are not finite (a run that diverged?): {list_names(broken)}")
    if config.tie_word_embeddings and not torch.equal(state[EMBEDDING], state[OUTPUT]):
        raise UserError(f"{path}: {OUTPUT} differs from {EMBEDDING}; in a MiniMind they are one tensor")


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: LMConfig, info: dict, path: Path) -> None:
    if config.vocab_size != len(tokenizer):
        raise UserError(
            f"{path} has {config.vocab_size} tokens, the tokenizer {len(tokenizer)}: pass the one it was trained with"
        )
    trained_with, given = info.get("tokenizer_hash"), tokenizer_hash(tokenizer)
    if trained_with is not None and trained_with != given:
        raise UserError(
            f"{path} was trained with the tokenizer {trained_with}, this one is {given}: name the folder of the one it was "
            "trained with, with --tokenizer"
        )
