"""Run an export: write it, compare it with its source, and keep it only if the two agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from common.errors import UserError, first_line
from common.files import atomic_folder, exclusive, explain_write_errors, write_json
from export.huggingface import (
    CONFIG,
    DESCRIPTION,
    check_target,
    copy_tokenizer,
    describe,
    read_folder,
    stock_architecture,
    write_llama,
    write_minimind,
)
from export.llava import compare_llava, open_clip, write_llava
from export.model_card import model_card
from export.options import GGUF_TYPES, ExportOptions
from export.self_check import Agreement, compare_folder, sample_rows
from model.tokenizer import TOKENIZER_DIR, load_tokenizer
from model.weights_file import Checkpoint, dtype_name, save_checkpoint


def check_output(options: ExportOptions) -> None:
    """Raise UserError if --output must not be written: to be found before anything is loaded."""
    if options.output is not None and options.output.parent.is_dir():
        with lock(options.output):  # the check removes what a killed export left, not what a running one is writing
            check_target(options.output, options.overwrite)


def export_folder(
    source: Checkpoint, tokenizer: PreTrainedTokenizerFast, options: ExportOptions
) -> tuple[Path, Agreement]:
    """Export `source` to a folder for other programs. Raises UserError if the export does not compute the same."""
    vision = source.config.vision
    clip = None
    if vision is not None and options.format == "llama":
        clip = open_clip(source, tokenizer, options.vision_encoder)
    elif vision is not None and options.format != "minimind":
        fitting = "minimind" if vision.encoder == "vit" else "llama"
        raise UserError(f"{source.path} sees images, and --format {options.format} cannot hold that: use {fitting}")
    elif vision is not None and vision.encoder != "vit":
        raise UserError(f"{source.path} has its image encoder in another folder: only --format llama holds both")
    ceval = read_ceval(options.ceval)
    name = source.path.stem if source.path.suffix == ".pth" else source.path.name
    target = options.output or options.out_dir / f"{name}-{options.format}"
    stored = dtype_name(source.model.tok_embeddings.weight.dtype)
    dtype = options.dtype or {"gguf": "float16", "onnx": "float32"}.get(options.format, stored)
    description = describe(source, dtype)
    rows = sample_rows(tokenizer, options.text, source.config)
    tokenizer_dir = options.tokenizer
    if tokenizer_dir == TOKENIZER_DIR and (source.path / CONFIG).is_file():
        tokenizer_dir = source.path  # an export has its own tokenizer
    with lock(target):
        check_target(target, options.overwrite)
        # Without a leading dot: transformers makes a module name of a folder with code.
        with atomic_folder(target, hidden=False) as folder:
            if options.format == "gguf":
                from export.gguf import compare_gguf, modelfile, write_gguf

                kind = GGUF_TYPES[dtype]
                file = folder / f"{name}.{kind}.gguf"
                write_gguf(file, source.model, tokenizer, kind, name)
                agreement = compare_gguf(file, source.model, kind, rows, options.tolerance)
                write_text(folder / "Modelfile", modelfile(file.name, name.lower(), source.config))
                write_json(folder / DESCRIPTION, description)
            elif options.format == "onnx":
                from export.onnx import compare_onnx, write_onnx

                file = folder / "model.onnx"
                write_onnx(file, source.model)
                agreement = compare_onnx(file, source.model, rows, options.tolerance)
                copy_tokenizer(tokenizer_dir, folder)
                write_json(folder / DESCRIPTION, description)
            elif clip is not None:
                write_llava(folder, source.model, clip, tokenizer_dir, getattr(torch, dtype), description)
                agreement = compare_llava(folder, source.model, clip, rows, options.tolerance)
                file = folder
            else:
                write = write_llama if options.format == "llama" else write_minimind
                differs = options.format == "llama" and not source.config.renormalizes_top_k
                if differs and stock_architecture(source.config) == "ernie4_5_moe":
                    print(
                        "note: vLLM always renormalises the weights of experts, and this model does not: use transformers"
                    )
                write(folder, source.model, tokenizer_dir, getattr(torch, dtype), description)
                agreement = compare_folder(folder, source.model, rows, options.tolerance)
                file = folder
            agreement.check()
            title = options.push_to_hub or target.name
            card = model_card(title, source, description, options.format, agreement, file.name, ceval)
            write_text(folder / "README.md", card)
    return target, agreement


def import_folder(folder: Path, options: ExportOptions) -> tuple[Path, Agreement]:
    """Convert an exported folder to a .pth file."""
    target = options.output or Path(f"{folder.resolve()}.pth")
    with lock(target):
        if target.is_dir():
            raise UserError(f"{target} is a folder; choose another --output")
        if target.exists() and not options.overwrite:
            raise UserError(f"{target} exists; replace it with --overwrite, or choose another --output")
        source = read_folder(folder)
        rows = sample_rows(load_tokenizer(folder), options.text, source.config)
        agreement = compare_folder(folder, source.model, rows, options.tolerance)
        agreement.check()
        dtype = getattr(torch, options.dtype) if options.dtype else source.model.tok_embeddings.weight.dtype
        save_checkpoint(target, source.model, dtype=dtype, info=source.info, overwrite=options.overwrite)
    return target, agreement


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Keep every other process from exporting to `target`, or from training what is saved there."""
    busy = f"another process is writing {target} right now: wait for it, or choose another --output"
    with (
        explain_write_errors(target.parent, "another --output", "; nothing was changed"),
        exclusive(target.parent, target.stem if target.suffix == ".pth" else target.name, busy),
    ):
        yield


def read_ceval(path: Path | None) -> dict[str, str]:
    """Return the accuracies in a summary.json of eval_ceval.py: overall, and of the categories if there are any."""
    if path is None:
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        groups = {"overall": summary["overall"], **summary["categories"]}
        return {
            name: f"{group['accuracy']:.1%} of {group['questions']} questions (chance: 25%)"
            for name, group in groups.items()
        }
    except (OSError, ValueError) as error:
        raise UserError(f"--ceval {path} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"--ceval {path} has no accuracy: name the summary.json that eval_ceval.py writes") from error


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def upload(folder: Path, repo: str, private: bool) -> None:
    """Upload an exported folder to the Hugging Face Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of whichever HTTP library it uses

    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="MiniMind")
    except (HTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"{folder} is written, but was not uploaded to {repo}: {reason}; log in with: hf auth login"
        ) from error
    print(f"uploaded to {url}")
