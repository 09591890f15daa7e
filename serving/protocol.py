"""What clients send and get: the shapes of OpenAI's API that this server honours.

Types are strict: "5" is no number and 1 no boolean. A field that this server cannot honour is refused unless it asks for
nothing (null, an empty list, the neutral value); fields that only name things for a bookkeeping that does not exist here
(`HARMLESS`) are accepted and have no effect; every other field is unknown and refused by name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

HARMLESS = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
# Fields of OpenAI's that this server refuses, and the values of each that ask for nothing.
UNSUPPORTED: dict[str, tuple] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "suffix": ("",),
}
MAX_CHOICES = 128
MAX_STOPS = 4
MAX_INPUTS = 2048

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompt = str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
StopText = Annotated[str, Field(max_length=1024)]


class Shape(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


# ---- requests


class StreamOptions(Shape):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(None, description="end with a chunk that has the usage of the whole request")
    include_obfuscation: Literal[False] | None = Field(None, description="not supported: false, or nothing")


class Request(Shape):
    """A request, with all the fields it may have. Unknown ones are kept, to be refused by name."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    model: str = Field(description="a name from /v1/models")


class SamplingRequest(Request):
    """How tokens are chosen; what is not given is as the server was started."""

    stream: bool | None = Field(None, description="send the answer piece by piece, as server-sent events")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="so many answers")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="end before any of these texts"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="choice i of n gets seed + i")
    top_k: int | None = Field(None, ge=0, description="extension: choose among the k likeliest; 0: no limit")
    min_p: float | None = Field(None, ge=0, le=1, description="extension: at least this share of the likeliest")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="extension; 1: none")


class ContentPart(Shape):
    model_config = ConfigDict(strict=True, extra="allow")

    type: str = Field(description='"text"; others are refused')
    text: str | None = None


class Message(Shape):
    model_config = ConfigDict(strict=True, extra="allow")

    role: str = Field(description="system or developer (only the first message), user, assistant")
    content: str | list[ContentPart] | None = Field(None, description="a text, or parts of type text, which are joined")
    name: str | None = Field(None, description="accepted; the model does not see it")


class ChatRequest(SamplingRequest):
    messages: list[Message] = Field(
        min_length=1,
        description="perhaps a system message, then user and assistant in turn; if the last is of the assistant, "
        "the answer continues it",
    )
    max_tokens: int | None = Field(None, ge=-1, description="length of the answer; null, -1: as much as fits")
    max_completion_tokens: int | None = Field(None, ge=-1, description="the same, by its newer name")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs logprobs")


class CompletionRequest(SamplingRequest):
    prompt: Prompt = Field(description="a text or token ids, or a list of them; <s> is put in front of texts")
    max_tokens: int | None = Field(16, ge=-1, description="null, -1: as much as fits; 0 only scores, with echo")
    echo: bool | None = Field(None, description="return the prompt in front of the answer")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="of so many of the likeliest tokens; with echo also of the prompt's"
    )
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="only as much as n: answers are not ranked")


class EmbeddingRequest(Request):
    input: Prompt = Field(description="a text or token ids, or a list of them")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of little-endian float32")
    dimensions: int | None = Field(None, ge=1, description="only the model's own width")


# ---- answers


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Shape):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Shape):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Shape):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Shape):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Shape):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="prompt and answer together, in tokens")


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Shape):
    status: Literal["ok", "shutting down", "failed"]


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Shape):
    """Every error, whatever its status."""

    error: ErrorDetail
