"""The openai package."""

import json
from typing import Literal

import openai
from features import IMAGE_URL, LENGTH, MESSAGES, MODEL, NAMES, QUESTION, TOOLS, is_embedding, named, run
from pydantic import BaseModel

client = openai.OpenAI()
greedy = dict(model=MODEL, temperature=0)


class Person(BaseModel):
    name: Literal[NAMES]


def chat():
    answer = client.chat.completions.create(messages=MESSAGES, max_tokens=LENGTH, **greedy)
    assert answer.usage.completion_tokens == LENGTH and answer.choices[0].finish_reason == "length"
    return answer.choices[0].message.content


def chat_streamed():
    chunks = client.chat.completions.create(messages=MESSAGES, max_tokens=LENGTH, stream=True, **greedy)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def completions():
    return client.completions.create(prompt=["Once", "Twice"], max_tokens=LENGTH, **greedy).choices[1].text


def responses():
    answer = client.responses.create(input=QUESTION, max_output_tokens=LENGTH, **greedy)
    assert answer.usage.output_tokens == LENGTH
    return answer.output_text


def responses_streamed():
    events = client.responses.create(input=QUESTION, max_output_tokens=LENGTH, stream=True, **greedy)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def tools_offered():
    answer = client.chat.completions.create(messages=MESSAGES, tools=TOOLS, max_tokens=LENGTH, **greedy)
    return answer.choices[0].message.content


def structured_output():
    answer = client.chat.completions.parse(messages=MESSAGES, response_format=Person, **greedy)
    return answer.choices[0].message.parsed.name


def required_tool():
    answer = client.chat.completions.create(
        messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=LENGTH, **greedy
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    return json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["word"] in NAMES


def image():
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": IMAGE_URL}}]
    question = {"role": "user", "content": content}
    answer = client.chat.completions.create(messages=[question], max_tokens=LENGTH, **greedy)
    assert answer.choices[0].message.content != chat(), "the same as without the image"
    return answer.choices[0].message.content


def embeddings():
    data = client.embeddings.create(model=MODEL, input=["one", "two"]).data
    return is_embedding(*(item.embedding for item in data))


run(
    named(
        chat,
        chat_streamed,
        completions,
        responses,
        responses_streamed,
        tools_offered,
        structured_output,
        required_tool,
        image,
        embeddings,
    )  # fmt: skip
)
