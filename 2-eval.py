"""Chat with a model, or have it answer a list of questions.

    python 2-eval.py                                            # the newest of out/rl_*, full_sft_*, lora_*
    python 2-eval.py --auto --temperature 0                     # built-in questions, Chinese and English
    python 2-eval.py --weights out/full_sft_512.pth --system "Answer in one sentence." --history_turns 3
    python 2-eval.py --lora out/lora_identity_512
    python 2-eval.py --weights out/rl_512-llama                 # an exported folder

In:  a .pth file, the folder of an adapter, or an exported folder (--weights); an adapter on a base of your choice (--lora
     with --weights)
Out: the conversation on the terminal; /save FILE keeps it in the format that 3-full_sft.py trains on

The model sees `<s>user\\n…</s>\\n<s>assistant\\n` and generates the answer up to its own `</s>`. It remembers only what is
in its prompt: --history_turns says how many earlier questions and answers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import flag, parse_options
from common.errors import UserError, run_script
from inference.options import ChatOptions, ModelOptions, SamplingParams, model_options, sampling_options
from inference.terminal import Chat, print_answer, use_utf8

if TYPE_CHECKING:
    from inference.model_loader import TextGenerator

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


@dataclass
class Options(ChatOptions):
    auto: bool = flag(False, "answer a built-in list of questions, each without the others", action="store_true")
    lora: Path | None = flag(
        None, "a LoRA adapter, on the base it was trained on (beside it, or named by --weights)", metavar="FOLDER"
    )
    model: ModelOptions = model_options()
    sampling: SamplingParams = sampling_options(temperature=0.7, top_p=0.9)


class LocalChat(Chat):
    """A conversation with a model in this process."""

    def __init__(self, generator: TextGenerator, options: Options) -> None:
        super().__init__(options.system, options.history_turns)
        self.generator, self.sampling = generator, options.sampling

    def reply(self, question: str) -> str:
        from inference.prompts import chat_prompt

        context, length = self.generator.context, self.sampling.max_new_tokens
        prompt = chat_prompt(
            self.generator.tokenizer, self.turns, question, history_turns=self.history_turns,
            system=self.system[0]["content"] if self.system else None, context=context, max_new_tokens=length,
        )  # fmt: skip
        if left_out := prompt.turns_left_out:
            turns = left_out + prompt.turns_seen
            print(f"[context of {context} tokens: {left_out} of {turns} earlier turns left out]")
        return print_answer(self.generator.generate(prompt.ids, self.sampling), length, context)[0]


def main() -> None:
    use_utf8()
    options = parse_options(Options, __doc__)
    from inference.model_finder import CHAT_STAGES, require_model  # torch and transformers take seconds to import
    from inference.model_loader import load_text_generator

    path = options.model.weights
    if path is None and options.lora is None:
        path = require_model(options.model.out_dir, CHAT_STAGES, "3-full_sft.py")
    generator = load_text_generator(path, options.model, options.lora)
    if generator.checkpoint.info.get("stage") == "pretrain":
        print("note: this is a base model, which continues texts; 3-full_sft.py makes it answer")
    chat = LocalChat(generator, options)
    if not options.auto:
        chat.run()
        return
    answered = 0
    for question in QUESTIONS:
        print(f"> {question}")
        chat.turns.clear()
        answered += chat.ask(question)
    if not answered:
        raise UserError("no question was answered; the lines above say why")


if __name__ == "__main__":
    run_script(main)
