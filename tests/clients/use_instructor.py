"""instructor: structured output over the openai package, in its modes; and chats without a structure."""

from typing import Literal

import instructor
import openai
from features import LENGTH, MESSAGES, MODEL, NAMES, run
from pydantic import BaseModel

greedy = dict(model=MODEL, messages=MESSAGES, max_tokens=LENGTH, temperature=0, max_retries=0)


class Person(BaseModel):
    name: Literal[NAMES]


def chat():
    client = instructor.from_openai(openai.OpenAI())
    return client.chat.completions.create(response_model=None, **greedy).choices[0].message.content


def parse(mode):
    return instructor.from_openai(openai.OpenAI(), mode=mode).chat.completions.create(response_model=Person, **greedy)


run(
    {
        "chat": chat,
        # Mode.JSON asks for any JSON object, and leaves its fields to the model.
        "structured output": lambda: parse(instructor.Mode.JSON_SCHEMA),
        "required tool": lambda: parse(instructor.Mode.TOOLS),
    }
)
