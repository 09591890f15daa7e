"""Read dialogues about images: LLaVA's JSON with a folder of images, Parquet with their bytes, JSONL with data URLs.

    messages, images = parse_image_row(row, image_dir)   # [{"role": "user", ...}, ...], [b"..."]

A row is a dialogue as in data_pipeline/records.py, and its images under `image`, `images` or `image_bytes` (one, or several;
in a text also with commas between their names), or as parts of its messages, as OpenAI's API has them. `<image>` in a
question says where an image stands; without it they stand before the first question. In the messages that are returned,
that place is `model.chat_format.IMAGE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.images import read_image
from data_pipeline.records import Malformed, check_answers, check_not_empty, parse_value, read_messages
from model.chat_format import IMAGE, TURN_ROLE, Message, check_messages
from model.tokenizer import IMAGE_TOKEN

FIELDS = ("image_bytes", "images", "image")
IMAGE_COLUMNS = (("conversations",), ("messages",))  # a Parquet file needs one of these
MAX_IMAGES = 32  # of a row


def parse_image_row(data: dict, image_dir: Path | None) -> tuple[list[Message], list[bytes]]:
    """Return the messages of a row and the bytes of its images, in their order; raise UserError if it is not valid.

    A row without images is a dialogue like any other.
    """
    check_answers(data)
    name = next((name for name in ("messages", "conversations") if data.get(name)), None)
    if name is None:
        raise Malformed(f"no conversations or messages; the fields are {', '.join(map(str, list(data)[:8])) or 'none'}")
    sources = _listed(next((data[field] for field in FIELDS if data.get(field)), []))
    dialogue, inline = _without_parts(parse_value(data[name], name))
    messages = read_messages({name: dialogue, "system": data.get("system"), "tools": data.get("tools")})
    for message in messages:
        if IMAGE in message["content"]:
            raise Malformed("the character U+FFFC, which stands for an image here")
        check_not_empty(message)
    check_messages(messages, answered=True)
    if inline and sources:
        raise Malformed("images in fields and in the messages: only one of them can be")
    sources = inline or sources
    questions = [message for message in messages if message["role"] == TURN_ROLE]
    n_places = sum(message["content"].count(IMAGE_TOKEN) for message in questions)
    if not n_places and sources:
        questions[0]["content"] = f"{IMAGE_TOKEN}\n" * len(sources) + questions[0]["content"]
    elif n_places != len(sources):
        raise Malformed(f"{n_places} times {IMAGE_TOKEN} in the questions, and {len(sources)} images")
    if len(sources) > MAX_IMAGES:
        raise Malformed(f"{len(sources)} images: at most {MAX_IMAGES} are read")
    for message in questions:
        message["content"] = message["content"].replace(IMAGE_TOKEN, IMAGE)
    return messages, [read_image(source, image_dir) for source in sources]


def _listed(value: Any) -> list:
    """Return one image or several as a list; names may stand in one text with commas between them."""
    if isinstance(value, str) and not value.startswith("data:"):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value if isinstance(value, list) else [value]


def _without_parts(dialogue: object) -> tuple[object, list]:
    """Return a dialogue whose messages are texts, with `<image>` where a part is an image, and those images."""
    if not isinstance(dialogue, list):
        return dialogue, []
    messages, images = [], []
    for message in dialogue:
        key = "content" if isinstance(message, dict) and "role" in message else "value"
        if isinstance(message, dict) and isinstance(parts := message.get(key), list):
            texts = []
            for part in parts:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind in ("image", "image_url"):
                    images.append(part.get("image_url") or part.get("image") or part)
                    texts.append(IMAGE_TOKEN)
                elif kind == "text" and isinstance(part.get("text"), str):
                    texts.append(part["text"])
                else:
                    raise Malformed(f"a message has a part of type {kind}; text and image_url are read")
            message = message | {key: "".join(texts)}
        messages.append(message)
    return messages, images
