"""Schemas of requests and answers: the part of OpenAI's API that this server implements.

Types are strict: "5" is not a number and 1 not a boolean. A declared field that asks for what the model cannot do (an image,
audio) is an error. A field that is not declared is ignored, and the response says so, unless it has
no effect anyway: it only labels a request (`HARMLESS`), or its value is one of `NEUTRAL`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_type_hints

from openai import types
from openai.types import completion_choice
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model

from inference.options import SamplingParams

HARMLESS = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
    + ("include_obfuscation", "id", "status")
)
NEUTRAL = (None, False, "", "none", [], {})  # and 0, which equals False
# Fields of SamplingParams that a request has under the same name, with OpenAI's limits; {}: the limits of SamplingParams.
# top_k (-1: no limit, as for vLLM), min_p and repetition_penalty (llama.cpp: repeat_penalty) are extensions of OpenAI's API.
SAMPLING_FIELDS: dict[str, dict[str, Any]] = {
    "temperature": {"ge": 0, "le": 2},
    "top_p": {"ge": 0, "le": 1},
    "presence_penalty": {"ge": -2, "le": 2},
    "frequency_penalty": {"ge": -2, "le": 2},
    "seed": {"ge": -(2**63), "le": 2**63 - 1},
    "top_k": {"ge": -1},
    "min_p": {},
    "repetition_penalty": {
        "gt": 0,
        "le": 10,
        "validation_alias": AliasChoices("repetition_penalty", "repeat_penalty"),
    },
}
MAX_CHOICES = 128
MAX_STOPS = 4
MAX_INPUTS = 2048
MAX_TOOLS = 128

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompt = str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
StopText = Annotated[str, Field(max_length=1024)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]  # as the name of a JSON field


class Schema(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


# ---- requests


class OpenSchema(Schema):
    """A part of a request. Fields that it does not declare are kept, so that they can be named."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    def ignored_fields(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of the fields that have no effect here, although they would have one elsewhere."""
        for name, value in (self.model_extra or {}).items():
            if name not in HARMLESS and value not in NEUTRAL:
                yield prefix + name
        for name, value in self:
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, OpenSchema):
                    yield from part.ignored_fields(f"{prefix}{name}.")


class StreamOptions(OpenSchema):
    include_usage: bool | None = Field(None, description="end with a chunk that has the usage of the whole request")
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage: every chunk has the usage so far"
    )


class Request(OpenSchema):
    model: str = Field(description="a name from /v1/models")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="leave out the beginning of a prompt that is longer, of a chat the oldest turns; -1: of "
        "one that does not fit into the context"
    )  # fmt: skip


def _sampling_fields() -> dict[str, Any]:
    """Return the fields of a request that choose tokens, as `SamplingParams` declares them."""
    hints, found = get_type_hints(SamplingParams), {}
    keywords = {"min": "ge", "above": "gt", "max": "le"}
    for field in dataclasses.fields(SamplingParams):
        if field.name in SAMPLING_FIELDS:
            ours = {keywords[key]: value for key, value in field.metadata["limits"].items()}
            limits: Any = SAMPLING_FIELDS[field.name] or ours
            description = field.metadata["help"].partition(" (default")[0]
            found[field.name] = (hints[field.name] | None, Field(None, description=description, **limits))
    return found


class SamplingRequest(create_model("SamplingFields", __base__=Request, **_sampling_fields())):  # type: ignore[misc]
    """How tokens are chosen; for what is not set, the server's own settings apply."""

    stream: bool | None = Field(None, description="send the answer as it is written, as server-sent events")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="number of answers; answer i has the seed `seed` + i")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="end before any of these texts"
    )
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="added to the logits of tokens, by their ids; -100 excludes a token"
    )


class TextPart(OpenSchema):
    type: Literal["text", "input_text", "output_text"]  # the other two: in /v1/responses
    text: str


Detail = Literal["auto", "low", "high", "original"] | None


class ImageUrl(OpenSchema):
    url: str = Field(description="data:image/png;base64,...; an http(s) address if the server allows that")
    detail: Detail = Field(None, description="accepted; every image has the same number of tokens")


class ImagePart(OpenSchema):
    type: Literal["image_url"]
    image_url: ImageUrl

    @property
    def source(self) -> str:
        return self.image_url.url


class InputImagePart(OpenSchema):
    """An image in /v1/responses."""

    type: Literal["input_image"]
    image_url: str
    detail: Detail = None

    @property
    def source(self) -> str:
        return self.image_url


ContentPart = Annotated[TextPart | ImagePart | InputImagePart, Field(discriminator="type")]


class CalledFunction(OpenSchema):
    name: Annotated[str, Field(min_length=1)]
    arguments: str = Field(description="a JSON object")


class ToolCall(OpenSchema):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(OpenSchema):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = Field(
        None,
        description="a text, or parts: those of type text are joined, and those of type image_url stand before the text of "
        "their message; only an answer with tool_calls may have none",
    )
    name: str | None = Field(None, description="accepted; the model does not see it")
    tool_calls: list[ToolCall] | None = Field(None, description="calls in an earlier answer; tool messages must follow")
    tool_call_id: str | None = Field(
        None, description="accepted: what tools return stands in the order of the messages"
    )
    reasoning_content: str | None = Field(None, description="the thinking of an earlier answer")


class FunctionType(OpenSchema):
    type: Literal["function"]


class Function(OpenSchema):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of an object; null: no parameters")
    strict: bool | None = Field(None, description="calls match the schema; they always do where one is required")


class Tool(FunctionType):
    function: Function


class FunctionName(OpenSchema):
    name: str


class NamedTool(FunctionType):
    function: FunctionName


class JsonSchema(OpenSchema):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="no effect: answers always match")


class ResponseFormat(OpenSchema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TemplateArguments(OpenSchema):
    enable_thinking: bool | None = Field(None, description="true: the answer begins with thinking; false: without")


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatRequest(SamplingRequest):
    messages: list[Message] = Field(
        min_length=1,
        description="consecutive messages of one role are joined, and system messages moved to the front; if the last "
        "message is the assistant's, the answer continues it",
    )
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="functions that the model may call")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="required, or a named tool: the answer consists of calls, which match the schema"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer")
    function_call: Literal["none", "auto"] | None = Field(None, description="no effect: use tools")
    response_format: ResponseFormat | None = Field(
        None, description="json_object, json_schema: the answer is JSON, up to max_tokens"
    )
    reasoning_effort: Effort | None = Field(None, description="none, minimal: the model answers without thinking")
    chat_template_kwargs: TemplateArguments | None = None
    modalities: list[Literal["text"]] | None = None
    max_tokens: int | None = Field(
        None, ge=-1, description="maximum length of the answer; null, -1: as much as fits, which is never exceeded"
    )
    max_completion_tokens: int | None = Field(None, ge=-1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs logprobs")


class InputItem(Message):
    role: Literal["system", "developer", "user", "assistant"]
    type: Literal["message"] | None = None


class ReasoningPart(OpenSchema):
    type: Literal["reasoning_text"]
    text: str


class FunctionCallItem(OpenSchema):
    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1)]
    arguments: str = Field(description="a JSON object")


class FunctionOutputItem(OpenSchema):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart] = Field(description="what the tool returned")


class ReasoningItem(OpenSchema):
    type: Literal["reasoning"]
    content: list[ReasoningPart] | None = None


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]


class TextOptions(OpenSchema):
    format: TextFormat | None = None


class ReasoningOptions(OpenSchema):
    effort: Effort | None = None


class FlatTool(Function, FunctionType):
    """The same in the form of /v1/responses."""


class NamedFunction(FunctionName, FunctionType):
    pass


class ResponsesRequest(SamplingRequest):
    input: (
        str | Annotated[list[InputItem | FunctionCallItem | FunctionOutputItem | ReasoningItem], Field(min_length=1)]
    ) = Field(description="a question, or a whole chat")
    instructions: str | None = Field(None, description="a system message, which stands first")
    max_output_tokens: int | None = Field(None, ge=1, description="maximum length of the answer")
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = Field(None, description='"message.output_text.logprobs"; others have no effect')
    text: TextOptions | None = None
    tools: list[FlatTool] | None = Field(None, max_length=MAX_TOOLS, description="functions that the model may call")
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer")
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: leave out the oldest turns of a chat that does not fit into the context"
    )
    n: Literal[1] | None = None
    previous_response_id: None = Field(None, description="nothing is kept between requests: send the whole chat")
    conversation: None = None
    prompt: None = None
    background: Literal[False] | None = None


class CompletionRequest(SamplingRequest):
    prompt: Prompt = Field(description="a text or token ids, or a list of them; texts get <s> in front")
    max_tokens: int | None = Field(
        16, ge=-1, description="null, -1: as much as fits; 0 with echo: only score the prompt"
    )
    echo: bool | None = Field(None, description="return the prompt in front of the answer")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="return the log-probabilities of this many tokens at each position; with echo "
        "also in the prompt"
    )  # fmt: skip
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="must equal n: answers are not ranked")


class EmbeddingRequest(Request):
    input: Prompt = Field(description="a text or token ids, or a list of them")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of little-endian float32")
    dimensions: int | None = Field(None, ge=1, description="only the model's own width")


# ---- answers: the types of OpenAI's own client, and here only what differs from them


class Logprobs(completion_choice.Logprobs):
    token_logprobs: list[float | None]  # the first token of a prompt has none
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(types.CompletionChoice):
    logprobs: Logprobs | None = None


class Completion(types.Completion):
    choices: list[CompletionChoice]


class Embedding(types.Embedding):
    embedding: list[float] | str


class EmbeddingList(types.CreateEmbeddingResponse):
    data: list[Embedding]


class ModelCard(types.Model):
    max_model_len: int = Field(description="maximum length of prompt and answer together, in tokens")


class ModelList(Schema):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Schema):
    status: Literal["ok", "shutting down", "failed"]


class ErrorBody(Schema):
    """Every error, whatever its status."""

    error: types.ErrorObject
