"""llama-index, with its classes for servers that are like OpenAI's."""

from typing import Literal

from features import BASE_URL, LENGTH, MODEL, NAMES, QUESTION, is_embedding, run
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from pydantic import BaseModel

server = dict(model=MODEL, api_base=BASE_URL, api_key="none", context_window=512)
greedy = dict(**server, temperature=0, max_tokens=LENGTH)
model = OpenAILike(is_chat_model=True, is_function_calling_model=True, **greedy)
newer = OpenAILikeResponses(**server, temperature=0, max_output_tokens=LENGTH)
messages = [ChatMessage(role="user", content=QUESTION)]


class Person(BaseModel):
    """A person."""

    name: Literal[NAMES]


def look_up(word: str) -> str:
    """Look a word up."""
    return word


def tools():
    tool = FunctionTool.from_defaults(look_up)
    return model.chat_with_tools([tool], user_msg=QUESTION).message.content


run(
    {
        "chat": lambda: model.chat(messages).message.content,
        "chat, streamed": lambda: "".join(part.delta or "" for part in model.stream_chat(messages)),
        "completions": lambda: OpenAILike(is_chat_model=False, **greedy).complete("Once").text,
        "responses": lambda: newer.chat(messages).message.content,
        "responses, streamed": lambda: "".join(part.delta or "" for part in newer.stream_chat(messages)),
        "tools offered": tools,
        "structured output": lambda: model.as_structured_llm(Person).chat(messages),
        "embeddings": lambda: is_embedding(
            *OpenAILikeEmbedding(model_name=MODEL, api_base=BASE_URL, api_key="none").get_text_embedding_batch(
                ["one", "two"]
            )
        ),
    }
)
