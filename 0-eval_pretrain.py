"""Let a pretrained model go on with a text: the way to see what it has learnt.

    python 0-eval_pretrain.py                                   # built-in beginnings, Chinese and English
    python 0-eval_pretrain.py --prompt "春天来了" --prompt "The sun" --temperature 0
    python 0-eval_pretrain.py --prompt_file beginnings.txt --seed 1
    python 0-eval_pretrain.py --interactive --weights out/pretrain_768.pth

In:  the newest out/pretrain_*.pth, or any checkpoint (--weights), published MiniMind-v1 files too
Out: text on the terminal, as it is written

The model sees `<s>` and the beginning, as at the head of a training text, and writes until it ends the text itself or
--max_new_tokens are reached. It has learnt to continue, not to answer: that is what 2-eval.py is for.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from common.cli import Parser
from common.errors import UserError, run_script
from inference.backends import Backend
from inference.generator import ending, generate
from inference.model_loader import backend_from_args, context_length, open_checkpoint, open_tokenizer
from inference.options import SamplingParams, add_model_flags, add_sampling_flags, sampling_from_args
from inference.terminal import read_line, use_utf8, visible
from model.weights import Checkpoint, find_checkpoint
from serving.chat_model import text_prompt

PROMPTS = [
    "中国的首都是",
    "春天来了，",
    "水的化学式是",
    "人工智能是一门",
    "从前有一个小男孩，",
    "The capital of France is",
    "Water is made of",
    "Once upon a time, there was",
    "Monday, Tuesday, Wednesday,",
]


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    source = parser.add_argument_group("what to continue (default: built-in beginnings)").add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a beginning; repeatable")
    source.add_argument("--prompt_file", type=Path, metavar="FILE", help="beginnings, one per line")
    source.add_argument("--interactive", action="store_true", help="ask for beginnings; an empty line ends")
    add_model_flags(parser, stages="pretrain_*.pth in OUT_DIR")
    add_sampling_flags(parser, max_new_tokens=128, temperature=0.7, top_p=0.9, repetition_penalty=1.05)
    return parser.parse_args()


def read_prompts(args: argparse.Namespace) -> Iterator[str]:
    if args.interactive:
        print("write a beginning; an empty line ends")
        while text := read_line("> "):
            yield text
    elif args.prompt_file:
        yield from lines_of(args.prompt_file)
    else:
        yield from args.prompt or PROMPTS


def lines_of(path: Path) -> list[str]:
    """The lines that are not blank. UserError if there is none."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--prompt_file {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    if not lines:
        raise UserError(f"--prompt_file {path} is empty: write one beginning per line")
    return lines


def continue_text(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    sampling: SamplingParams,
    context: int,
    backend: Backend | None,
) -> None:
    """Print `text` and, as it comes, what the model makes of it."""
    prompt = text_prompt(tokenizer, text, context=context, max_new_tokens=sampling.max_new_tokens)
    if left_out := prompt.tokens_left_out:
        used = len(prompt.ids) - 1
        print(f"[the beginning has {used + left_out} tokens; the last {used} are used]")
    print(text, end="", flush=True)
    started, made = time.perf_counter(), 0
    for event in generate(
        checkpoint.model, [prompt.ids], sampling, tokenizer=tokenizer, max_len=context, backend=backend
    ):
        made += 1
        print(visible(event.text), end="", flush=True)
    seconds = time.perf_counter() - started
    print(f"{ending(event, sampling, made, context)}\n[{made} tokens, {made / seconds:.1f} tokens/s]\n", flush=True)


def main() -> None:
    use_utf8()
    args = parse_args()
    sampling = sampling_from_args(args)
    tokenizer = open_tokenizer(args.tokenizer)
    path = args.weights or find_checkpoint(args.out_dir, ["pretrain"])
    if path is None:
        raise UserError(f"no pretrain_*.pth in {args.out_dir}: run 1-pretrain.py, or name a file with --weights")
    checkpoint = open_checkpoint(path, args, tokenizer)
    context, backend = context_length(checkpoint, args), backend_from_args(args, checkpoint.model)
    for text in read_prompts(args):
        try:
            continue_text(checkpoint, tokenizer, text, sampling, context, backend)
        except ValueError as error:  # not Unicode: broken bytes from the command line or the terminal
            if not args.interactive:
                raise UserError(str(error)) from error
            print(f"{error}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
