"""pydantic-ai: agents on both of OpenAI's APIs."""

import asyncio
from typing import Literal

from features import LENGTH, MODEL, NAMES, QUESTION, run
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.settings import ModelSettings


class Person(BaseModel):
    name: Literal[NAMES]


greedy = ModelSettings(temperature=0, max_tokens=LENGTH)
chat = Agent(OpenAIChatModel(MODEL), model_settings=greedy, instructions="Be kind.")
newer = Agent(OpenAIResponsesModel(MODEL), model_settings=greedy, instructions="Be kind.")
with_tools = Agent(OpenAIChatModel(MODEL), model_settings=greedy)
typed = Agent(
    OpenAIChatModel(MODEL),
    model_settings=greedy,
    output_type=Person,
)


@with_tools.tool_plain
def look_up(word: Literal[NAMES]) -> str:
    """Look a word up."""
    return word


def streamed(agent: Agent) -> str:
    async def collect() -> str:
        async with agent.run_stream(QUESTION) as stream:
            return "".join([part async for part in stream.stream_text(delta=True)])

    return asyncio.run(collect())


run(
    {
        "chat": lambda: chat.run_sync(QUESTION).output,
        "chat, streamed": lambda: streamed(chat),
        "responses": lambda: newer.run_sync(QUESTION).output,
        "responses, streamed": lambda: streamed(newer),
        "tools offered": lambda: with_tools.run_sync(QUESTION).output,
        "structured output": lambda: typed.run_sync(QUESTION).output,
    }
)
