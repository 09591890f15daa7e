"""Weights on the disk: save, find, check and load `.pth` files.

    save_checkpoint("out/pretrain_512.pth", model, info={"stage": "pretrain", "step": 1000})
    checkpoint = load_checkpoint("out/pretrain_512.pth", dtype=torch.float32, tokenizer=tokenizer)
    checkpoint.model, checkpoint.config, checkpoint.info, checkpoint.notes

A `.pth` is a plain state dict under the published names. `<same name>.json` beside it holds the configuration and how
the weights were made. The published files come without that JSON, and the later ones have other names: see
`model.families`.

**Which JSON belongs to which weights.** Each file is replaced atomically, but the two cannot be replaced at once. So
the JSON carries a fingerprint of its `.pth`, and it is written in this order: the new weights under a temporary name;
the JSON of the new weights, which still holds the old JSON as `previous`; the rename of the weights; the JSON without
`previous`. A process killed anywhere leaves weights whose description is in the JSON. Weights that fit neither were
put there by another program, and are refused rather than read with the wrong number of heads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.files import atomic_write, write_json
from model.families import (
    EMBEDDING,
    LLAMA_EMBEDDING,
    OUTPUT,
    config_from_llama_shapes,
    config_from_shapes,
    from_llama_state,
    split_vision,
    vision_config_from_shapes,
)
from model.LMConfig import FIELD_TYPES, LMConfig, architecture_differences
from model.model import Transformer
from model.tokenizer import tokenizer_hash
from model.vision import model_class
from model.weights_file import check_intact, fingerprint_of, list_names, read_description, read_tensors, write_tensors

_TABLES = re.compile(r"pos_cis|layers\.\d+\.attention\.mask")  # computed, not learnt, but stored in old files


@dataclass
class Checkpoint:
    """Weights read from `path`. `info` is the JSON beside them ({} if none), `notes` are remarks for the user.

    `fingerprint` is 16 hex digits that change with the content of the file.
    """

    model: Transformer
    config: LMConfig
    info: dict[str, Any]
    path: Path
    fingerprint: str
    notes: list[str] = field(default_factory=list)


# ---- writing


def save_checkpoint(
    path: Path | str,
    model: Transformer,
    *,
    dtype: torch.dtype = torch.float32,
    info: dict[str, Any],
    overwrite: bool = False,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write the weights of `model` and the JSON beside them. Killed at any moment, the old or the new pair remains.

    Args:
        path: the `.pth` file; its folder is created.
        model: a bare Transformer (compiled or not), on any device.
        dtype: of the file: float32, bfloat16 or float16.
        info: what the JSON records beside the configuration: stage, step, tokens, loss, tokenizer_hash, ...
        overwrite: replace a checkpoint of another architecture.
        tensors: the (name, tensor) pairs to write, where those in `model` are sharded; they are taken one at a time.

    Raises:
        UserError: non-finite weights (by name), weights that are not a MiniMind's, or see `check_can_write`.
        OSError: a full disk, a folder without permission; the previous checkpoint is untouched.
    """
    path = Path(path)
    config = model.config
    check_can_write(path, config, overwrite)
    previous = _previous_description(path)
    ours = {"config": config.own_fields(), "dtype": dtype_name(dtype)}
    new = ours | {key: value for key, value in info.items() if key not in ("fingerprint", "previous")} | ours
    json.dumps(new, allow_nan=False)  # fails here, before anything is written, if it cannot be JSON
    skeleton = {name: torch.empty(shape, dtype=dtype) for name, shape in _expected_shapes(config).items()}
    if config.tie_word_embeddings:
        skeleton[OUTPUT] = skeleton[EMBEDDING]
    pairs = _cast(_tensors_of(model, path) if tensors is None else tensors, dtype, path)
    try:
        with atomic_write(path, "w+b", encoding=None) as file:
            write_tensors(file, skeleton, pairs)
            new["fingerprint"] = fingerprint_of(file)
            write_json(path.with_suffix(".json"), new | previous)
        if previous:
            write_json(path.with_suffix(".json"), new)
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides the reason (no space left) behind an error of its own.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError) and reason.errno is not None:
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise


def check_can_write(path: Path | str, config: LMConfig, overwrite: bool = False) -> None:
    """Raise UserError if `path` is a folder, or holds weights of another architecture than `config` without `overwrite`.

    A run calls this at its start, not only at its first save.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, but weights are written into a file: rename the folder")
    if overwrite or not path.exists():
        return
    advice = "choose another folder, or overwrite=True to replace it"
    try:
        existing = _read(path)[1]
    except UserError as error:
        raise UserError(f"{path} exists and is not a checkpoint that can be read ({error}); {advice}") from error
    differences = architecture_differences(config, existing)
    if differences:
        raise UserError(
            f"{path} holds a model of another architecture (this one != that one: {', '.join(differences)}); {advice}"
        )


def state_to_save(model: Transformer, dtype: torch.dtype, path: Path | str) -> dict[str, Tensor]:
    """Return the weights in `dtype` on the CPU, the tied pair once, under the embedding's name.

    Raises UserError for weights that could not be read again; `path` is for its message.
    """
    return dict(_cast(_tensors_of(model, path), dtype, path))


def _tensors_of(model: Transformer, path: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `model` by their names, the tied pair once."""
    state = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in model.state_dict().items()}
    _check_names_and_shapes(state, model.config, path)
    if model.config.tie_word_embeddings and not torch.equal(state[EMBEDDING], state.pop(OUTPUT)):
        raise UserError(f"{path} was not written: {OUTPUT} is no longer tied to {EMBEDDING}")
    yield from state.items()


def _cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, path: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in `dtype` on the CPU. Raises UserError for one that is not finite, before or after the cast."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{path}: weights are saved as float32, bfloat16 or float16, not {dtype_name(dtype)}")
    for name, tensor in tensors:
        if not tensor.isfinite().all():  # the training went wrong
            raise UserError(f"{path} was not written: these weights are not finite: {name}")
        tensor = tensor.to("cpu", dtype)
        if not tensor.isfinite().all():  # float16 ends at 65,504
            raise UserError(
                f"{path} was not written: too large for {dtype_name(dtype)}: {name}; save as float32 or bfloat16"
            )
        yield name, tensor


def _previous_description(path: Path) -> dict:
    """Return {"previous": the description of the weights now in `path`}, or {} if there are none."""
    if not path.is_file():
        return {}
    try:
        return {"previous": read_description(path) | {"fingerprint": fingerprint_of(path)}}
    except UserError:  # it cannot be read anyway, and the user wants it replaced
        return {}


# ---- reading


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
    _check_names_and_shapes(state, config, path)
    _check_values(state, config, path)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config, info, path)

    if not mapped:  # a copy, because another process may delete the file or overwrite it in place
        dtype = dtype or state[EMBEDDING].dtype
        state = {name: tensor.to(device, dtype, copy=True) for name, tensor in _without_tied(state, config).items()}
    return Checkpoint(build_model(state, config, path), config, info, path, fingerprint_of(path), notes)


def build_model(state: dict[str, Tensor], config: LMConfig, path: Path | str) -> Transformer:
    """Return a model of exactly these tensors, a tied output taken from the embedding, in evaluation mode.

    Raises UserError for weights that do not fit; `path` is for its message.
    """
    if config.tie_word_embeddings and EMBEDDING in state:
        state = state | {OUTPUT: state[EMBEDDING]}
    _check_names_and_shapes(state, config, path)
    with torch.device("meta"):  # no memory, and no random numbers that are thrown away
        model = model_class(config)(config)
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def _without_tied(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != OUTPUT or not config.tie_word_embeddings}


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
        config = _config_from_json(info, path.with_suffix(".json"))
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


def _config_from_json(info: dict, file: Path) -> LMConfig:
    fields, types = info["config"], FIELD_TYPES
    unknown = sorted(set(fields) - set(types))
    if unknown:
        raise UserError(f'{file}: unknown fields in "config": {list_names(unknown)}; written by another version?')
    fractions = [name for name, value in fields.items() if types[name] == "int" and type(value) is not int]
    if fractions:
        raise UserError(f'{file}: "config" cannot be used: not a whole number: {list_names(fractions)}')
    try:
        return LMConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f'{file}: "config" cannot be used: {error}') from error


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


def _expected_shapes(config: LMConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_class(config)(config).state_dict().items()}


def _check_names_and_shapes(state: dict[str, Tensor], config: LMConfig, path: Path | str) -> None:
    """Raise UserError, naming the weights, unless exactly those of `config` are there in its shapes."""
    expected = _expected_shapes(config)
    errors = []
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing:
        errors.append(f"missing: {list_names(missing)}")
    if unexpected:
        errors.append(f"unexpected: {list_names(unexpected)}")
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if misshapen:
        errors.append(f"other shapes: {list_names(misshapen)}")
    if errors:
        raise UserError(f"{path}: the weights do not fit their architecture; {'; '.join(errors)}")


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
            f"{path} was trained with the tokenizer {trained_with}, this one is {given}: pass the one it was trained with"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
