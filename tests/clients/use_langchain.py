"""langchain-openai: chat models, a completion model, embeddings."""

from typing import Literal

from features import LENGTH, MODEL, NAMES, QUESTION, is_embedding, run
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

greedy = dict(model=MODEL, temperature=0, max_tokens=LENGTH)
model = ChatOpenAI(**greedy)
newer = ChatOpenAI(use_responses_api=True, **greedy)


class Person(BaseModel):
    """A person."""

    name: Literal[NAMES]


@tool
def look_up(word: Literal[NAMES]) -> str:
    """Look a word up."""
    return word


def text_of(message):
    return message.text if isinstance(message.text, str) else message.text()


run(
    {
        "chat": lambda: text_of(model.invoke(QUESTION)),
        "chat, streamed": lambda: "".join(text_of(chunk) for chunk in model.stream(QUESTION)),
        "completions": lambda: OpenAI(**greedy).invoke("Once"),
        "responses": lambda: text_of(newer.invoke(QUESTION)),
        "responses, streamed": lambda: "".join(text_of(chunk) for chunk in newer.stream(QUESTION)),
        "tools offered": lambda: text_of(model.bind_tools([look_up]).invoke(QUESTION)),
        "structured output": lambda: model.with_structured_output(Person).invoke(QUESTION),
        "required tool": lambda: model.bind_tools([look_up], tool_choice="look_up").invoke(QUESTION).tool_calls,
        # Otherwise it would send ids of OpenAI's tokenizer, as it does to every server that is not OpenAI's.
        "embeddings": lambda: is_embedding(
            *OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False).embed_documents(["one", "two"])
        ),
    }
)
