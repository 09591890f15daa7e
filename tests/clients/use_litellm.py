"""litellm, which many gateways and agent libraries call."""

from typing import Literal

import litellm
from features import BASE_URL, LENGTH, MESSAGES, MODEL, NAMES, QUESTION, TOOLS, is_embedding, named, run
from pydantic import BaseModel

server = dict(model=f"openai/{MODEL}", api_base=BASE_URL, api_key="none")
greedy = dict(**server, temperature=0, max_tokens=LENGTH)


class Person(BaseModel):
    name: Literal[NAMES]


def chat():
    return litellm.completion(messages=MESSAGES, **greedy).choices[0].message.content


def chat_streamed():
    return "".join(
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=MESSAGES, stream=True, **greedy)
    )


def completions():
    text = dict(greedy, model=f"text-completion-openai/{MODEL}")
    return litellm.text_completion(prompt="Once", **text).choices[0].text


def text_of(response):
    return "".join(part.text for item in response.output for part in item.content)


def responses():
    return text_of(litellm.responses(input=QUESTION, temperature=0, max_output_tokens=LENGTH, **server))


def responses_streamed():
    events = litellm.responses(input=QUESTION, temperature=0, max_output_tokens=LENGTH, stream=True, **server)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def tools_offered():
    answer = litellm.completion(messages=MESSAGES, tools=TOOLS, **greedy)
    return answer.choices[0].message.content


def structured_output():
    answer = litellm.completion(messages=MESSAGES, response_format=Person, **greedy)
    return Person.model_validate_json(answer.choices[0].message.content)


def embeddings():
    return is_embedding(*(item["embedding"] for item in litellm.embedding(input=["one", "two"], **server).data))


run(
    named(chat, chat_streamed, completions, responses, responses_streamed, tools_offered, structured_output, embeddings)
)
