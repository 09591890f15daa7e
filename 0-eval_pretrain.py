"""Let a pretrained model continue a text: the way to see what it has learned.

    python 0-eval_pretrain.py                                   # built-in beginnings, Chinese and English
    python 0-eval_pretrain.py --prompt "春天来了" --prompt "The sun" --temperature 0
    python 0-eval_pretrain.py --prompt_file beginnings.txt --seed 1
    python 0-eval_pretrain.py --interactive --weights out/pretrain_768.pth

In:  the newest out/pretrain_*.pth, or any model (--weights): a .pth file, published MiniMind-v1 files too, or a folder
Out: text on the terminal, as it is generated

The model sees `<s>` and the beginning, as at the start of a training text, and generates until it ends the text itself or
--max_new_tokens is reached. It has learned to continue, not to answer: for answers use 2-eval.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import flag, parse_options
from common.errors import UserError, run_script
from common.files import read_lines
from inference.options import ModelOptions, SamplingParams, model_options, sampling_options
from inference.terminal import print_answer, read_line, use_utf8

if TYPE_CHECKING:
    from inference.model_loader import TextGenerator

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
_SOURCE = "what to continue (default: built-in beginnings)"


@dataclass
class Options:
    prompt: list[str] = flag([], "a beginning; repeatable", group=_SOURCE, action="append", metavar="TEXT")
    prompt_file: Path | None = flag(None, "beginnings, one per line", group=_SOURCE, metavar="FILE")
    interactive: bool = flag(False, "ask for beginnings; an empty line ends", group=_SOURCE, action="store_true")
    model: ModelOptions = model_options()
    sampling: SamplingParams = sampling_options(max_new_tokens=128, temperature=0.7, top_p=0.9, repetition_penalty=1.05)

    def validate(self) -> list[str]:
        sources = [name for name in ("prompt", "prompt_file", "interactive") if getattr(self, name)]
        return [f"--{' and --'.join(sources)} cannot be used together"] if len(sources) > 1 else []


def read_prompts(options: Options) -> Iterator[str]:
    if options.interactive:
        print("write a beginning; an empty line ends")
        while text := read_line("> "):
            yield text
    elif options.prompt_file:
        yield from read_lines("--prompt_file", options.prompt_file)
    else:
        yield from options.prompt or PROMPTS


def continue_text(generator: TextGenerator, text: str, sampling: SamplingParams) -> bool:
    """Print `text` and its continuation; return whether Ctrl-C stopped it. Raises ValueError if it is not Unicode."""
    from inference.prompts import text_prompt

    context = generator.context
    prompt = text_prompt(generator.tokenizer, text, context=context, max_new_tokens=sampling.max_new_tokens)
    if left_out := prompt.tokens_left_out:
        used = len(prompt.ids) - 1
        print(f"[the beginning has {used + left_out} tokens; the last {used} are used]")
    print(text, end="", flush=True)
    return print_answer(generator.generate(prompt.ids, sampling), sampling.max_new_tokens, context)[1]


def main() -> None:
    use_utf8()
    options = parse_options(Options, __doc__)
    from inference.model_finder import require_model  # torch and transformers take seconds to import
    from inference.model_loader import load_text_generator

    path = options.model.weights or require_model(options.model.out_dir, ["pretrain"], "1-pretrain.py")
    generator = load_text_generator(path, options.model)
    for text in read_prompts(options):
        try:
            if continue_text(generator, text, options.sampling) and not options.interactive:
                raise KeyboardInterrupt
        except ValueError as error:  # not Unicode: broken bytes from the command line or the terminal
            if not options.interactive:
                raise UserError(str(error)) from error
            print(f"{error}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
