"""Chat with a model, or have it answer a list of questions.

    python 2-eval.py                                            # the newest that answers: out/full_sft_*, rl_*, lora_* …
    python 2-eval.py --auto --temperature 0                     # built-in questions, Chinese and English
    python 2-eval.py --weights out/full_sft_512.pth --system "Answer in one sentence." --history_turns 3
    python 2-eval.py --lora out/lora_identity_512
    python 2-eval.py --weights out/rl_512-llama                 # an exported folder
    python 2-eval.py --tools                                    # the model may call a calculator, and so on
    python 2-eval.py --image cat.png                            # a vision-language model, the newest out/sft_vlm_*

In:  a .pth file, the folder of an adapter, or an exported folder (--weights); an adapter on a base of your choice (--lora
     with --weights)
Out: the conversation on the terminal; /save FILE keeps it in the format that 3-full_sft.py (with images: 9-sft_vlm.py)
     trains on

The model sees `<s>user\\n…</s>\\n<s>assistant\\n` and generates the answer up to its own `</s>`. It remembers only what is
in its prompt: --history_turns says how many earlier questions and answers are.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import flag, parse_options
from common.errors import UserError, run_script
from evaluation.tools import chat_tools
from inference.options import ChatOptions, ModelOptions, SamplingParams, model_options, sampling_options
from inference.terminal import Chat, print_answer, training_row, use_utf8
from model.chat_format import Message, with_images
from model.chat_parser import AnswerParser
from model.chat_style import chat_style

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

IMAGE_QUESTIONS = [
    "描述这张图片。",
    "Describe this picture.",
    "图里有什么颜色？",
    "How many things are there?",
]  # with --image
IMAGE_HELP = "  /image FILE  show an image with the next question; repeatable\n"


@dataclass
class Options(ChatOptions):
    auto: bool = flag(False, "answer a built-in list of questions, each without the others", action="store_true")
    image: list[Path] = flag(
        [], "show these images with the first question (--auto: with each)", nargs="+", metavar="FILE"
    )
    vision_encoder: Path | None = flag(
        None,
        "folder of the image encoder, for a model without its own (default: that of its training)",
        metavar="FOLDER",
    )
    lora: Path | None = flag(
        None, "a LoRA adapter, on the base it was trained on (beside it, or named by --weights)", metavar="FOLDER"
    )
    model: ModelOptions = model_options()
    sampling: SamplingParams = sampling_options(temperature=0.7, top_p=0.9)


class LocalChat(Chat):
    """A conversation with a model in this process. An image is the character `IMAGE` in a turn, and one of `images`."""

    def __init__(self, generator: TextGenerator, options: Options) -> None:
        super().__init__(options.system, options.history_turns, **chat_tools(options.tools))
        self.generator, self.sampling = generator, options.sampling
        self.sees = generator.image_processor is not None
        self.images: list[str] = []  # data URLs of all turns, and then of the next question
        self.n_waiting = 0  # of the next question
        if self.sees:
            self.help = IMAGE_HELP + self.help

    def reply(self, turn: list[Message]) -> Message:
        prompt, outputs = self.generator.answer(
            self.turns, turn, self.sampling, self.images, history_turns=self.history_turns, tools=self.tools,
            system=self.system[0]["content"] if self.system else None,
        )  # fmt: skip
        context, length = self.generator.context, self.sampling.max_new_tokens
        if left_out := prompt.turns_left_out:
            turns = left_out + prompt.turns_seen
            print(f"[context of {context} tokens: {left_out} of {turns} earlier turns left out]")
        # Tokenizers whose template writes thinking and calls otherwise have no tags: there they are a part of the text.
        parser = AnswerParser(calls=bool(self.tools)) if chat_style(self.generator.tokenizer).tags else None
        return print_answer(outputs, length, context, parser)[0]

    def attach(self, paths: list[Path]) -> None:
        """Show images with the next question. Raises UserError for one that cannot be used."""
        from data_pipeline.images import data_url, read_image

        if paths and not self.sees:
            raise UserError("this is a model of text; start with --image FILE, or with weights of 9-sft_vlm.py")
        for path in paths:
            try:
                file = path.expanduser().absolute()
                image = read_image(file.name, file.parent)
            except (UserError, RuntimeError) as error:  # RuntimeError: there is no user of the name in ~NAME
                raise UserError(f"{path}: {error}") from None
            self.images.append(data_url(image))
            self.n_waiting += 1

    def run_command(self, command: str, argument: str) -> bool:
        if command != "/image":
            return False
        try:
            if not argument:
                raise UserError("name a file: /image FILE")
            self.attach([Path(argument)])
            print(f"{argument}: with the next question")
        except UserError as error:
            print(f"no image: {error}", file=sys.stderr, flush=True)
        return True

    def ask(self, question: str) -> bool:
        answered = super().ask(with_images(question, self.n_waiting) if self.sees else question)
        if answered:
            self.n_waiting = 0
        return answered

    def clear(self) -> None:
        super().clear()
        self.images.clear()
        self.n_waiting = 0

    def record(self) -> dict:
        return training_row(self.system, self.turns, self.tools, self.images[: len(self.images) - self.n_waiting])


def main() -> None:
    use_utf8()
    options = parse_options(Options, __doc__)
    from inference.model_finder import CHAT_STAGES, require_model  # torch and transformers take seconds to import
    from inference.model_loader import load_text_generator
    from inference.vision import require_vision

    path = options.model.weights
    if path is None and options.lora is None:
        stages, script = (CHAT_STAGES, "3-full_sft.py") if not options.image else (("sft_vlm",), "9-sft_vlm.py")
        path = require_model(options.model.out_dir, stages, script)
    generator = load_text_generator(path, options.model, options.lora, options.vision_encoder)
    if generator.checkpoint.info.get("stage") == "pretrain":
        print("note: this is a base model, which continues texts; 3-full_sft.py makes it answer")
    if options.image:
        require_vision(generator.checkpoint.model, generator.checkpoint.path)
    chat = LocalChat(generator, options)
    if not options.auto:
        chat.attach(options.image)
        chat.run()
        return
    answered = 0
    for question in IMAGE_QUESTIONS if options.image else QUESTIONS:
        print(f"> {question}")
        chat.clear()
        chat.attach(options.image)
        answered += chat.ask(question)
    if not answered:
        raise UserError("no question was answered; the lines above say why")


if __name__ == "__main__":
    run_script(main)
