"""Open a model from a path: a .pth file, the folder of an adapter, or an exported folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from inference.backends import Backend, choose_backend
from model.device import resolve_device, resolve_dtype
from model.model import describe_parameters
from model.rope import parse_scaling
from model.tokenizer import TOKENIZER_DIR, load_tokenizer
from model.weights import Checkpoint, load_checkpoint


def backend_from_args(args: argparse.Namespace, model: torch.nn.Module) -> Backend | None:
    """What --compile and --quantize mean for this model, for `BatchGenerator` and `generate`. UserError if it cannot be."""
    try:
        return choose_backend(model, args.compile, args.quantize)
    except ValueError as error:
        raise UserError(f"--compile {args.compile} --quantize {args.quantize}: {error}") from error


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype mean here. UserError for a device that is not there."""
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    return device, resolve_dtype(args.dtype, device)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder. UserError if there is none."""
    try:
        return load_tokenizer(folder)
    except ValueError as error:
        raise UserError(str(error)) from error


def open_checkpoint(path: Path, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    """The model in a file, ready to write. UserError if it cannot be."""
    device, dtype = device_and_dtype(args)
    try:
        checkpoint = load_checkpoint(path, device=device, dtype=dtype, tokenizer=tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(describe_checkpoint(checkpoint))
    return checkpoint


def open_model(path: Path, args: argparse.Namespace) -> tuple[Checkpoint, PreTrainedTokenizerFast]:
    """The model in a file, an adapter folder or an exported folder, ready to write, and its tokenizer.

    An export has its tokenizer with it; an adapter has its base beside it. UserError if it cannot be used.
    """
    if not path.is_dir():
        tokenizer = open_tokenizer(args.tokenizer)
        return open_checkpoint(path, args, tokenizer), tokenizer
    device, dtype = device_and_dtype(args)
    try:
        if (path / "adapter_config.json").is_file():
            from model.lora import load_adapter  # peft takes seconds to import

            tokenizer = open_tokenizer(args.tokenizer)
            checkpoint = load_adapter(path, device, dtype, tokenizer)
        else:
            from export.huggingface import read_folder

            tokenizer = open_tokenizer(path if args.tokenizer == TOKENIZER_DIR else args.tokenizer)
            checkpoint = read_folder(path)
            if checkpoint.config.vocab_size != len(tokenizer):
                raise UserError(
                    f"{path}: the model has {checkpoint.config.vocab_size} tokens, the tokenizer {len(tokenizer)}: "
                    "use the one it was exported with"
                )
            checkpoint.model.to(device, dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(describe_checkpoint(checkpoint))
    return checkpoint, tokenizer


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """Which weights these are and how they were made, in a few lines."""
    config, info = checkpoint.config, checkpoint.info
    weight = checkpoint.model.get_input_embeddings().weight
    origin = [str(info["stage"])] if "stage" in info else []
    origin += [f"step {info['step']}"] if "step" in info else []
    origin += [f"loss {info['loss']:.4g}"] if isinstance(info.get("loss"), float) else []
    lines = [f"{checkpoint.path}" + (f" ({', '.join(origin)})" if origin else "")]
    lines += [f"  note: {note}" for note in checkpoint.notes]
    lines.append(f"  {describe_parameters(checkpoint.model)}")
    dtype = str(weight.dtype).removeprefix("torch.")
    lines.append(f"  trained at {config.max_seq_len} tokens; {dtype} on {weight.device}\n")
    return "\n".join(lines)


def context_length(checkpoint: Checkpoint, args: argparse.Namespace) -> int:
    """Tokens of prompt and answer together; says so if they are more than the model was trained at.

    With --rope_scaling the model gets its `extension`, which every `BatchGenerator` of it then follows.
    """
    trained = checkpoint.config.max_seq_len
    if args.max_seq_len is not None and args.max_seq_len < 2:
        raise UserError(f"--max_seq_len {args.max_seq_len} leaves no room: give at least 2")
    if args.rope_scaling == "none":
        context = args.max_seq_len or trained
        if context > trained:
            print(f"note: trained at {trained} tokens; what comes after them may be poor (--rope_scaling may help)")
        return context
    try:
        method, factor = parse_scaling(args.rope_scaling)
        extension = checkpoint.config.extension(method, factor, args.max_seq_len)
    except ValueError as error:
        raise UserError(str(error)) from error
    checkpoint.model.extension = extension
    context = args.max_seq_len or int(trained * factor)
    factors = " or ".join(f"{step:g}" for step in extension.factors)
    print(
        f"context of {context} tokens: texts beyond the {trained} of the training are scaled ({method}, {factors} times)"
    )
    return context
