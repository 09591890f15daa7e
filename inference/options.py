"""Flags of the scripts that let a model write, declared once: which weights, on what device, how tokens are chosen."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.files import ROOT
from inference.backends import COMPILE, TorchModel, fast_model
from inference.generator import SamplingParams, TokenOutput
from inference.kernels.decode import NativeModel
from inference.kernels.decode_weights import QUANTIZATIONS
from model.device import DTYPES, resolve_device, resolve_dtype
from model.model import describe_parameters
from model.rope import parse_scaling
from model.tokenizer import TOKENIZER_DIR, load_tokenizer
from model.weights import Checkpoint, load_checkpoint

# name: (type, help); the defaults are those of Sampling, unless a script has its own.
_FLAGS = {
    "max_new_tokens": (int, "length of an answer in tokens, at most"),
    "temperature": (float, "0: always the likeliest token (greedy); 1: as the model says; above: more surprising"),
    "top_k": (int, "choose among the K likeliest tokens; 0: no limit"),
    "top_p": (float, "choose among the likeliest tokens that together have this probability; 1: no limit"),
    "min_p": (float, "leave out tokens less likely than this share of the likeliest; 0: no limit"),
    "repetition_penalty": (float, "above 1: tokens of the prompt and the answer become less likely"),
    "presence_penalty": (float, "subtracted from the logit of every token that the answer has"),
    "frequency_penalty": (float, "the same, times how often the answer has it"),
    "seed": (int, "the same seed gives the same text (default: another one each time)"),
}


def add_sampling_flags(parser: argparse.ArgumentParser, **defaults) -> None:
    """Add a flag for every field of `SamplingParams` that shapes the text; `defaults` replace some of its defaults."""
    group = parser.add_argument_group("how tokens are chosen")
    for name, (kind, help) in _FLAGS.items():
        default = defaults.get(name, getattr(SamplingParams, name))
        help += "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", type=kind, default=default, help=help)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text appears; repeatable"
    )


def sampling_from_args(args: argparse.Namespace) -> SamplingParams:
    """The `SamplingParams` asked for. UserError naming every flag that is wrong."""
    try:
        return SamplingParams(**{name: getattr(args, name) for name in _FLAGS}, stop=tuple(args.stop))
    except ValueError as error:
        raise UserError(str(error)) from error


def add_model_flags(parser: argparse.ArgumentParser, stages: str) -> None:
    """Add the flags that say which model; `stages` says in words which checkpoint is the default."""
    group = parser.add_argument_group("the model")
    group.add_argument("--weights", type=Path, metavar="FILE", help=f"a .pth file (default: the newest {stages})")
    group.add_argument(
        "--out_dir", type=Path, default=ROOT / "out", help="folder to look for checkpoints in (default: out)"
    )
    group.add_argument(
        "--tokenizer", type=Path, default=TOKENIZER_DIR, help="tokenizer folder (default: the one shipped in model/)"
    )
    group.add_argument(
        "--max_seq_len", type=int, metavar="TOKENS",
        help="prompt and answer together (default: what the model was trained at; it writes badly beyond)",
    )  # fmt: skip
    group.add_argument(
        "--rope_scaling", default="none", metavar="METHOD[:FACTOR]",
        help="how positions beyond the trained length are brought within it: none, linear, ntk, yarn, or with a factor, "
        "such as yarn:4 (default: none; without a factor as little as each text needs, up to --max_seq_len). Shorter "
        "texts stay as they are",
    )  # fmt: skip
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="precision of the computation; auto: bfloat16 where the hardware has it (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--compile", default="auto", choices=COMPILE,
        help="fast decoding; auto: where it takes seconds to start, by a C++ compiler on a CPU; on: also by torch.compile, "
        "which takes a minute; off: call the model itself (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--quantize", default="none", choices=QUANTIZATIONS,
        help="int8: decode with the weights rounded to 8 bits, which is faster and a little less exact (default: none)",
    )  # fmt: skip


def fast_from_args(args: argparse.Namespace, model: torch.nn.Module) -> NativeModel | TorchModel | None:
    """What --compile and --quantize mean for this model, for `BatchGenerator` and `generate`. UserError if it cannot be."""
    try:
        return fast_model(model, args.compile, args.quantize)
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


def ending(event: TokenOutput, sampling: SamplingParams, made: int, context: int) -> str:
    """Why an answer of `made` tokens was cut off, in words; "" if the model ended it."""
    if event.finish != "length":
        return ""
    if made >= sampling.max_new_tokens:
        return f" [cut off: --max_new_tokens {sampling.max_new_tokens}]"
    return f" [cut off: the context of {context} tokens is full; --max_seq_len gives more]"


def use_utf8() -> None:
    """Read and write UTF-8 whatever the terminal's settings: the default elsewhere cannot print Chinese."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Broken bytes from outside stay recognisable as such, and are refused where text is needed.
        stream.reconfigure(encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else "backslashreplace")


def read_line(prompt: str) -> str | None:
    """A line from the user, with line editing where there is any; None at the end of the input or Ctrl-C."""
    try:
        import readline  # noqa: F401  gives input() its arrow keys; not there on Windows
    except ImportError:
        pass
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def visible(text: str) -> str:
    """`text` with control characters as pictures (U+2400...): a model must not steer the terminal."""
    return text.translate(_PICTURES)


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 65533)
