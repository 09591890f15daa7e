"""Open a model from a path, whatever kind it is, and make it ready to generate text.

checkpoint, tokenizer = open_model(Path("out/lora_identity_512"), dtype=torch.float32)
generator = load_text_generator(Path("out/full_sft_512.pth"), ModelOptions(quantize="int8"))
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data_pipeline.images import open_data_url
from export.huggingface import read_folder
from inference.backends import Backend, choose_backend
from inference.generator import Images, TokenOutput, generate
from inference.options import ModelOptions, SamplingParams
from inference.prompts import Prompt, chat_prompt
from inference.vision import ImageProcessor
from model.architecture import parse_rope_scaling
from model.chat_format import Message
from model.device import resolve_device, resolve_dtype
from model.model import describe_parameters
from model.tokenizer import TOKENIZER_DIR, load_tokenizer
from model.weights import load_checkpoint
from model.weights_file import Checkpoint


def open_model(
    path: Path | None,
    *,
    lora: Path | None = None,
    tokenizer: Path = TOKENIZER_DIR,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Checkpoint, PreTrainedTokenizerFast]:
    """Return the model at `path`, in evaluation mode, and its tokenizer.

    Args:
        path: a .pth file; the folder of an adapter, which is merged into its base; or an exported folder.
        lora: the folder of an adapter to merge into the weights at `path`. If `path` is None, these are in the file beside
            the adapter that it was trained on.
        tokenizer: its folder. With the default an exported folder uses the tokenizer inside it.
        dtype: of the weights; None: as they are stored (with an adapter: float32).

    Raises UserError if the model cannot be used.
    """
    if lora is None and path is not None and (path / "adapter_config.json").is_file():
        path, lora = None, path
    try:
        if lora is not None:
            from model.lora import load_adapter  # peft takes seconds to import

            loaded = load_tokenizer(tokenizer)
            checkpoint = load_adapter(lora, device, dtype, loaded, path)
        elif path is None:
            raise ValueError("open_model needs a path or an adapter")
        elif path.is_dir():
            checkpoint = read_folder(path)
            loaded = load_tokenizer(path if tokenizer == TOKENIZER_DIR else tokenizer)
            if checkpoint.config.vocab_size != len(loaded):
                raise UserError(
                    f"{path}: the model has {checkpoint.config.vocab_size} tokens and the tokenizer {len(loaded)}: "
                    "use the tokenizer it was exported with"
                )
            torch.nn.Module.to(checkpoint.model, device=device, dtype=dtype)
        else:
            loaded = load_tokenizer(tokenizer)
            checkpoint = load_checkpoint(path, device, dtype, loaded)
    except OSError as error:  # from torch, for some damaged files
        raise UserError(f"{lora or path} cannot be read ({error}): copy it again or save it anew") from error
    checkpoint.model.eval()
    return checkpoint, loaded


@dataclass(frozen=True)
class TextGenerator:
    """A model with everything that generating text needs.

    context: maximum length of prompt and answer together, in tokens.
    vision_encoder: folder of the image encoder; None: as in the description of the weights.
    """

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerFast
    context: int
    backend: Backend | None = None
    vision_encoder: Path | None = None

    @functools.cached_property
    def image_processor(self) -> ImageProcessor | None:
        """Return what prepares images; None for a model of text. Raises UserError if its encoder is not found."""
        if self.checkpoint.config.vision is None and self.vision_encoder is None:
            return None
        return ImageProcessor.for_checkpoint(self.checkpoint, self.vision_encoder)

    def answer(
        self,
        turns: list[Message],
        turn: list[Message],
        sampling: SamplingParams,
        images: Sequence[str] = (),
        **asked: Any,
    ) -> tuple[Prompt, Iterator[TokenOutput]]:
        """Return the prompt of a question in a chat, and the tokens of its answer as they are made.

        Args:
            turns, turn, asked: as for `chat_prompt`; where the model sees, an `IMAGE` in them is a place of an image.
            images: data URLs of what stands in these places.
        """
        sees = self.image_processor
        prompt = chat_prompt(
            self.tokenizer, turns, turn, context=self.context, max_new_tokens=sampling.max_new_tokens,
            image_ids=sees.model.vision.image_ids if sees is not None else (), **asked,
        )  # fmt: skip
        seen = None
        if sees is not None and prompt.n_images:  # those of turns that were left out are the first ones
            seen = sees([open_data_url(url) for url in images[-prompt.n_images :]])
        return prompt, self.generate(prompt.ids, sampling, seen)

    def generate(
        self, prompt: Sequence[int], sampling: SamplingParams, images: Images | None = None
    ) -> Iterator[TokenOutput]:
        """Yield the tokens of the answer to one prompt, and its images, as they are made."""
        return generate(
            self.checkpoint.model,
            [prompt],
            sampling,
            tokenizer=self.tokenizer,
            max_len=self.context,
            backend=self.backend,
            images=[images],
        )


def load_text_generator(
    path: Path | None, options: ModelOptions, lora: Path | None = None, vision_encoder: Path | None = None
) -> TextGenerator:
    """Open a model as `options` say, and print what it is. `path`, `lora` and errors are those of `open_model`."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    checkpoint, tokenizer = open_model(path, lora=lora, tokenizer=options.tokenizer, device=device, dtype=dtype)
    print(describe_checkpoint(checkpoint))
    context = set_context(checkpoint, options)
    try:
        backend = choose_backend(checkpoint.model, options.compile, options.quantize)
    except ValueError as error:
        raise UserError(f"--compile {options.compile} --quantize {options.quantize}: {error}") from error
    return TextGenerator(checkpoint, tokenizer, context, backend, vision_encoder)


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """Return in a few lines which weights these are and how they were made."""
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


def set_context(checkpoint: Checkpoint, options: ModelOptions) -> int:
    """Return how many tokens prompt and answer may have together; print it if the model was trained at fewer.

    With --rope_scaling the model gets `dynamic_rope_scaling`, which every `BatchGenerator` of it then follows.
    """
    trained = checkpoint.config.max_seq_len
    if options.rope_scaling == "none":
        context = options.max_seq_len or trained
        if context > trained:
            print(f"note: trained at {trained} tokens; what comes after them may be poor (--rope_scaling may help)")
        return context
    method, factor = parse_rope_scaling(options.rope_scaling)
    dynamic = checkpoint.config.dynamic_rope_scaling(method, factor, options.max_seq_len)
    checkpoint.model.dynamic_rope_scaling = dynamic
    context = options.max_seq_len or int(trained * (factor or 1))
    factors = " or ".join(f"{step:g}" for step in dynamic.factors)
    print(
        f"context of {context} tokens: texts beyond the {trained} of the training are scaled ({method}, {factors} times)"
    )
    return context
