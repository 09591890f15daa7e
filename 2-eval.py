"""Chat with a model, or have it answer a list of questions.

    python 2-eval.py                                            # the newest of out/rl_*, full_sft_*, lora_*
    python 2-eval.py --auto --temperature 0                     # built-in questions, Chinese and English
    python 2-eval.py --weights out/full_sft_512.pth --system "Answer in one sentence." --history_turns 3
    python 2-eval.py --lora out/lora_identity_512

In:  a checkpoint (--weights), or an adapter folder that knows its base (--lora)
Out: the conversation on the terminal; /save FILE keeps it in the format that 3-full_sft.py trains on

The model sees `<s>user\\n…</s>\\n<s>assistant\\n` and writes the answer up to its own `</s>`. It remembers what stands in
its prompt, and nothing else: --history_turns says how many earlier questions and answers do.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import argparse
import time
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from common.cli import Parser
from common.errors import UserError, run_script
from inference.backends import Backend
from inference.generator import ending, generate
from inference.model_loader import (
    backend_from_args,
    context_length,
    describe_checkpoint,
    device_and_dtype,
    open_checkpoint,
    open_tokenizer,
)
from inference.options import SamplingParams, add_model_flags, add_sampling_flags, sampling_from_args
from inference.terminal import interact, use_utf8, visible
from model.weights import Checkpoint, find_checkpoint
from serving.chat_model import chat_prompt

QUESTIONS = [
    "你好，请介绍一下你自己。",
    "中国的首都是哪座城市？",
    "水的化学式是什么？",
    "请写一句关于春天的话。",
    "12 加 7 等于多少？",
    "Who are you?",
    "What is the capital of France?",
    "Which day comes after Monday?",
    "Tell me a short story about a cat.",
]


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--auto", action="store_true", help="answer a built-in list of questions, each by itself")
    parser.add_argument("--history_turns", type=int, default=5, metavar="N", help="earlier turns it sees (default: 5)")
    parser.add_argument("--system", metavar="TEXT", help="a system message, in front of everything")
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="FOLDER",
        help="a LoRA adapter, on the base it was trained on (beside it, or named by --weights)",
    )
    add_model_flags(parser, stages="of rl_*.pth, full_sft_*.pth and lora_* in OUT_DIR")
    add_sampling_flags(parser, temperature=0.7, top_p=0.9)
    args = parser.parse_args()
    if args.history_turns < 0:
        raise UserError(f"--history_turns {args.history_turns} must not be negative")
    return args


def open_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    """The checkpoint or adapter asked for, else the newest."""
    path = args.lora or args.weights
    if path is None:
        found = [weights for weights in [find_checkpoint(args.out_dir, ["rl", "full_sft"])] if weights]
        found += [config.parent for config in args.out_dir.glob("lora_*/adapter_config.json")]
        if not found:
            raise UserError(
                f"nothing to chat with in {args.out_dir} (no rl_*.pth, full_sft_*.pth, lora_*): "
                "run 3-full_sft.py, or name a file with --weights"
            )
        path = max(found, key=written_at)
    if path != args.lora and not (path / "adapter_config.json").is_file():
        return open_checkpoint(path, args, tokenizer)

    from model.lora import load_adapter  # peft takes seconds to import

    device, dtype = device_and_dtype(args)
    try:
        checkpoint = load_adapter(path, device, dtype, tokenizer, base=args.weights if args.lora else None)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(describe_checkpoint(checkpoint))
    return checkpoint


def written_at(path: Path) -> int:
    file = path / "adapter_config.json" if path.is_dir() else path
    return file.stat().st_mtime_ns


class Chat:
    """A conversation and the model that answers in it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerFast,
        sampling: SamplingParams,
        context: int,
        history_turns: int,
        system: str | None,
        backend: Backend | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.context = checkpoint.model, tokenizer, sampling, context
        self.history_turns, self.backend = history_turns, backend
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict] = []  # user and assistant in turn

    def answer(self, question: str) -> None:
        """Print the answer as it comes; both become part of the conversation.

        Raises ValueError, and nothing changes, if the question is too long or not Unicode.
        """
        system = self.system[0]["content"] if self.system else None
        limits = {"context": self.context, "max_new_tokens": self.sampling.max_new_tokens}
        prompt = chat_prompt(
            self.tokenizer, self.turns, question, history_turns=self.history_turns, system=system, **limits
        )
        if left_out := prompt.turns_left_out:
            turns = left_out + prompt.turns_seen
            print(f"[context of {self.context} tokens: {left_out} of {turns} earlier turns left out]")
        started, made, text, end = time.perf_counter(), 0, "", ""
        try:
            for event in generate(
                self.model,
                [prompt.ids],
                self.sampling,
                tokenizer=self.tokenizer,
                max_len=self.context,
                backend=self.backend,
            ):
                made, text = made + 1, text + event.text
                print(visible(event.text), end="", flush=True)
                end = ending(event, self.sampling, made, self.context)
        except KeyboardInterrupt:
            end = " [stopped]"
        print(f"{end}\n[{made} tokens, {made / (time.perf_counter() - started):.1f} tokens/s]\n", flush=True)
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]


def main() -> None:
    use_utf8()
    args = parse_args()
    sampling = sampling_from_args(args)
    tokenizer = open_tokenizer(args.tokenizer)
    checkpoint = open_model(args, tokenizer)
    context = context_length(checkpoint, args)
    if checkpoint.info.get("stage") == "pretrain":
        print("note: this is a base model, which continues texts; 3-full_sft.py makes it answer")
    backend = backend_from_args(args, checkpoint.model)
    chat = Chat(checkpoint, tokenizer, sampling, context, args.history_turns, args.system, backend)
    if not args.auto:
        interact(chat)
        return
    for question in QUESTIONS:
        print(f"> {question}")
        chat.turns.clear()
        try:
            chat.answer(question)
        except ValueError as error:
            raise UserError(str(error)) from error


if __name__ == "__main__":
    run_script(main)
