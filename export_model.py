"""Take a model out of the toolkit: to transformers, vLLM, llama.cpp, Ollama, the Hugging Face Hub, and back.

    python export_model.py                                              # the newest weights, for plain transformers
    python export_model.py --weights out/rl_512.pth --lora out/lora_shop_512 --format minimind
    python export_model.py --format gguf --dtype q8_0 --push_to_hub me/my-minimind
    python export_model.py --format pth --weights out/rl_512-llama      # an exported folder into a .pth again

format    what loads it                                                       written
llama     transformers, vLLM, ... without code of ours: dense as Llama,       a folder: safetensors, configuration,
          mixture of experts as Ernie 4.5 MoE                                 tokenizer with chat template
minimind  transformers with trust_remote_code=True: our names, our code       the same, and model.py with what it imports
gguf      llama.cpp, Ollama                                                   a folder: one .gguf, a Modelfile
pth       this toolkit                                                        the .pth and its .json

Every folder gets a model card (README.md) and minimind.json, which tells how the weights were made. An export is loaded
again and its logits on real text are compared with those of the source: if they differ, nothing is left behind.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import argparse
import json
import re
from contextlib import AbstractContextManager
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerFast

from common.cli import Parser, validate_folder
from common.errors import UserError, run_script
from common.files import ROOT, exclusive
from export.huggingface import (
    check_target,
    describe,
    new_folder,
    read_folder,
    write_description,
    write_llama,
    write_minimind,
)
from export.model_card import model_card
from export.self_check import SAMPLE_TEXTS, Agreement, compare_folder, sample_rows
from inference.model_finder import find_model
from model.device import DTYPES
from model.tokenizer import TOKENIZER_DIR, load_tokenizer
from model.weights import Checkpoint, load_checkpoint, save_checkpoint

GGUF_TYPES = {"float32": "f32", "float16": "f16", "q8_0": "q8_0"}
ALIASES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
MAX_TEXTS = 100


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--format", choices=["llama", "minimind", "gguf", "pth"], default="llama", help="see above (default: llama)")
    add("--weights", type=Path, metavar="PATH", help="a .pth file; for --format pth an exported folder (default: the "
        "newest of rl, full_sft, pretrain in OUT_DIR; with --lora the weights it was trained on)")  # fmt: skip
    add("--lora", type=Path, metavar="FOLDER", help="an adapter to merge into the weights first")
    add("--output", type=Path, metavar="PATH", help="what to write (default: OUT_DIR/<name of the weights>-<format>; for "
        "--format pth <folder>.pth)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an export that is there")
    add("--dtype", choices=[*DTYPES, "q8_0", *ALIASES], help="precision of the weights; q8_0 only for gguf, bfloat16 not "
        "for gguf (default: that of the file; gguf: float16)")  # fmt: skip
    add("--tokenizer", type=Path, default=TOKENIZER_DIR, help="its folder (default: the one shipped in model/)")
    add(
        "--out_dir",
        type=Path,
        default=ROOT / "out",
        help="where checkpoints are looked for and exports go (default: out)",
    )
    add("--text", type=Path, metavar="FILE", help=f"UTF-8 text for the comparison, one paragraph a line, {MAX_TEXTS} at "
        "most (default: a dozen sentences)")  # fmt: skip
    add("--tolerance", type=float, help="largest difference of logits allowed (default: 1e-4; minimind and gguf, whose "
        "logits are computed by our own code: 0)")  # fmt: skip
    add("--ceval", type=Path, metavar="FILE", help="summary.json of eval_ceval.py, for the model card")
    add("--push_to_hub", metavar="USER/NAME", help="also upload the folder to the Hugging Face Hub (log in before: hf "
        "auth login)")  # fmt: skip
    add("--private", action="store_true", help="make the repository there a private one")
    args = parser.parse_args()
    args.dtype = ALIASES.get(args.dtype, args.dtype)
    errors = []
    if args.dtype and args.format == "gguf" and args.dtype not in GGUF_TYPES:
        errors.append(f"--dtype {args.dtype} is not for --format gguf: use {', '.join(GGUF_TYPES)}")
    if args.dtype == "q8_0" and args.format != "gguf":
        errors.append("--dtype q8_0 needs --format gguf")
    if args.format == "pth":
        unused = [name for name in ("lora", "push_to_hub", "ceval") if getattr(args, name)]
        errors += [f"--{name} is not for --format pth" for name in unused]
        if args.weights is None:
            errors.append("--format pth needs --weights FOLDER")
    if args.tolerance is not None and not args.tolerance >= 0:
        errors.append(f"--tolerance {args.tolerance} must not be negative")
    if args.push_to_hub is not None and not re.fullmatch(r"[^/\s]+/[^/\s]+", args.push_to_hub):
        errors.append(f"--push_to_hub {args.push_to_hub}: give user/name")
    if args.private and args.push_to_hub is None:
        errors.append("--private is for --push_to_hub")
    if args.output is None:
        errors += validate_folder("--out_dir", args.out_dir) if args.format != "pth" else []
    else:
        errors += validate_folder("--output", args.output.parent)
        if not args.output.name:
            errors.append(f"--output {args.output}: name what is to be made there")
        if args.format == "pth" and args.output.suffix != ".pth":
            errors.append(f"--output {args.output}: name a .pth file, which the other scripts find by this ending")
    if errors:
        parser.error(errors)
    return args


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up like Ctrl-C
    transformers.utils.logging.disable_progress_bar()
    try:
        result, agreement = to_pth(args) if args.format == "pth" else to_folder(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{result}: {args.format}\n{agreement.describe()}")
    if args.push_to_hub:
        push(result, args.push_to_hub, args.private)


def to_folder(args: argparse.Namespace) -> tuple[Path, Agreement]:
    """Weights into a folder that others load."""
    if args.output is not None and args.output.parent.is_dir():
        with hold(args.output):  # whose leftovers the check clears away, must not be at work
            check_target(args.output, args.overwrite)  # before anything is loaded
    texts, ceval = read_texts(args.text), read_summary(args.ceval)
    tokenizer = load_tokenizer(args.tokenizer)
    source = open_source(args, tokenizer)
    for note in source.notes:
        print(f"note: {note}")
    name = source.path.stem if source.path.suffix == ".pth" else source.path.name
    target = args.output or args.out_dir / f"{name}-{args.format}"
    kept = str(source.model.tok_embeddings.weight.dtype).removeprefix("torch.")
    dtype = args.dtype or ("float16" if args.format == "gguf" else kept)
    description = describe(source, dtype)
    rows = sample_rows(tokenizer, texts, source.config)
    with hold(target), new_folder(target, args.overwrite) as folder:
        if args.format == "gguf":
            from export.gguf import compare_gguf, modelfile, write_gguf

            kind = GGUF_TYPES[dtype]
            file = folder / f"{name}.{kind}.gguf"
            write_gguf(file, source.model, tokenizer, kind, name)
            agreement = compare_gguf(file, source.model, kind, rows, args.tolerance)
            write_text(folder / "Modelfile", modelfile(file.name, name.lower(), source.config))
            write_description(folder, description)
        else:
            write = write_llama if args.format == "llama" else write_minimind
            write(folder, source.model, args.tokenizer, DTYPES[dtype], description)
            agreement = compare_folder(folder, source.model, rows, args.tolerance)
            file = folder
        agreement.check()
        card = model_card(
            args.push_to_hub or target.name, source, description, args.format, agreement, file.name, ceval
        )
        write_text(folder / "README.md", card)
    return target, agreement


def to_pth(args: argparse.Namespace) -> tuple[Path, Agreement]:
    """An exported folder into a .pth."""
    target = args.output or Path(f"{args.weights.resolve()}.pth")
    check_file(target, args.overwrite)
    source = read_folder(args.weights)
    rows = sample_rows(load_tokenizer(args.weights), read_texts(args.text), source.config)
    agreement = compare_folder(args.weights, source.model, rows, args.tolerance)
    agreement.check()
    dtype = DTYPES[args.dtype] if args.dtype else source.model.tok_embeddings.weight.dtype
    with hold(target):
        check_file(target, args.overwrite)  # somebody else may have written it meanwhile
        save_checkpoint(target, source.model, dtype=dtype, info=source.info, overwrite=args.overwrite)
    return target, agreement


def check_file(target: Path, overwrite: bool) -> None:
    """UserError if a .pth must not be written there."""
    if target.is_dir():
        raise UserError(f"{target} is a folder; choose another --output")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; replace it with --overwrite, or choose another --output")


def hold(target: Path) -> AbstractContextManager:
    """Nobody else exports to `target` meanwhile, or trains what is saved there."""
    busy = f"another process is writing {target} right now: wait for it, or choose another --output"
    return exclusive(target.parent, target.stem if target.suffix == ".pth" else target.name, busy)


def open_source(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    """The weights to export, with the adapter merged if one is given."""
    if args.lora is not None:
        from model.lora import load_adapter  # peft takes seconds to import

        return load_adapter(args.lora, tokenizer=tokenizer, base=args.weights)
    path = args.weights or find_model(args.out_dir, ["rl", "full_sft", "pretrain"])
    if path is None:
        raise UserError(f"no checkpoint in {args.out_dir}: train one, or name it with --weights FILE")
    return load_checkpoint(path, tokenizer=tokenizer)


def read_texts(path: Path | None) -> list[str]:
    """What the export is compared on: paragraphs of a file, or those built in."""
    if path is None:
        return list(SAMPLE_TEXTS)
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read: {error}") from error
    if not texts:
        raise UserError(f"--text {path} is empty")
    return texts[:MAX_TEXTS]


def read_summary(path: Path | None) -> dict | None:
    """Results of eval_ceval.py."""
    if path is None:
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--ceval {path} cannot be read: {error}") from error
    if not isinstance(summary, dict):
        raise UserError(f"--ceval {path} is not a summary.json of eval_ceval.py")
    return summary


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def push(folder: Path, repo: str, private: bool) -> None:
    """Upload an exported folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of whichever HTTP library it uses

    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="MiniMind")
    except (HTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder} is written, but was not uploaded to {repo}: {reason}; log in with: hf auth login"
        ) from error
    print(f"uploaded to {url}")


if __name__ == "__main__":
    run_script(main)
