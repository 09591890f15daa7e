"""Chats with images as transformers' pipelines give them, for a vision-language model in a folder of its own.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image = {"type": "image", "url": "cat.png"}      # or "path", "base64", or a picture of Pillow's under "image"
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
    model.generate(**inputs)

The ids are those of `render_chat`: what training has seen.
"""

from __future__ import annotations

import base64
import io
import os
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from model.chat_format import Message, render_chat, with_images, with_tools
from model.pixels import pixel_values, to_rgb


class VisionLanguageProcessor(ProcessorMixin):
    """Make the inputs of a `VisionLanguageModel` with its own encoder.

    Args:
        image_size: side of an image in pixels.
        image_ids: the tokens that stand for an image.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_size: int = 48,
        image_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self.image_size, self.image_ids = image_size, [*image_ids]
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(self, images: Any = None, text: str | Sequence[str] = "", **kwargs: Any) -> BatchFeature:
        """Return the inputs for one question about some images."""
        if not isinstance(text, str):
            (text,) = text  # a batch of several would need padding
        shown = [images] if images is not None and not isinstance(images, (list, tuple)) else images or []
        content = [*({"type": "image", "image": image} for image in shown), {"type": "text", "text": text}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return input_ids and attention_mask (1, time), and pixel_values (images, 3, size, size) if there are images.

        Content may be a text, or a list of parts of type text and image; the images of a message stand before its text.
        """
        messages, images = [], []
        for message in conversation:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            shown = [_picture(part) for part in parts if part["type"] != "text"]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            messages.append({**message, "content": with_images(text, len(shown))})
            images += shown
        ids, _ = render_chat(
            self.tokenizer, with_tools(messages, tools or []), add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, enable_thinking=enable_thinking, image_ids=self.image_ids,
        )  # fmt: skip
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if images:
            inputs["pixel_values"] = pixel_values([to_rgb(_open(image)) for image in images], self.image_size)
        return BatchFeature(inputs)


def _picture(part: dict[str, Any]) -> Any:
    """Return what a part of a message has as its image."""
    found = [part[name] for name in ("image", "url", "path", "base64") if part.get(name) is not None]
    if not found:
        raise ValueError(f"a part of type {part['type']!r} has no image; text and images are read")
    return found[0]


def _open(source: Any) -> Image.Image:
    """Return an image as it is; transformers' `load_image` would put a transparent one on black.

    source: a picture of Pillow's, an address, the name of a file, or base64, also as a data URL.
    """
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str):
        raise TypeError(f"an image is {type(source).__name__}, not a picture, an address, a file or base64")
    if os.path.isfile(source):
        return Image.open(source)
    if source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "minimind"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            data = reply.read()
    else:
        try:
            data = base64.b64decode("".join(source.rpartition(",")[2].split()), validate=True)
        except ValueError:
            raise ValueError(f"{source:.80} is no address, no file and no base64") from None
    return Image.open(io.BytesIO(data))
