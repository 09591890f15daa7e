"""The routes of OpenAI's API, answered by an `Engine`.

    app = create_app(engine, ServedModel("full_sft_512", model, tokenizer), defaults=Sampling(temperature=0.7))

A request goes through `Gate` (key, size), a shape of `protocol` (types and limits), a method of `Api` (what it means for
this model: prompt, `SamplingParams`, refusals), and the engine; an `Answer` turns the engine's events into
chunks or one object.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import contextlib
import dataclasses
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from transformers import PreTrainedTokenizerFast

from inference.detokenizer import token_bytes
from inference.generator import TokenOutput
from inference.options import SamplingParams
from model.tokenizer import BOS_ID, check_messages, encode_text, encode_texts, render_chat
from serving import protocol
from serving.engine import Engine, EngineError, QueueFull, Scores, ShuttingDown, Stream
from serving.responses import (
    ApiError,
    ClientGone,
    Gate,
    SSEResponse,
    cancel_on_disconnect,
    error_body,
    json_response,
    to_json,
)

_json_text = json.JSONEncoder(ensure_ascii=False).encode
DONE = b"data: [DONE]\n\n"
LONG_TEXT = 20_000  # characters that are tokenized beside the event loop, not in it


@dataclass(frozen=True)
class ServedModel:
    """What is served: its public name, its tokenizer, and what identifies the weights."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    dim: int
    vocab_size: int
    fingerprint: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def token_bytes(self, token: int) -> bytes:
        """What a token is spelled with; special ones by their names."""
        return token_bytes(self.tokenizer.backend_tokenizer.id_to_token(token))

    @functools.cached_property
    def special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    def text_of(self, token: int) -> bytes:
        """What a token adds to a text: special ones nothing."""
        return b"" if token in self.special else self.token_bytes(token)

    def token_name(self, token: int) -> str:
        """A token as text, as `bytes:\\xe4\\xbd` if it is not whole characters: different for different tokens."""
        spelled = self.token_bytes(token)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def create_app(
    engine: Engine,
    model: ServedModel,
    defaults: SamplingParams,
    *,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The server as an ASGI application; it starts the engine and closes it.

    Args:
        defaults: for what a request does not say. Its max_new_tokens limits answers of requests that give no limit.
        api_key: what clients have to send; None: nothing.
        cors_origins: sites whose pages may call this server from a browser; "*": all.
    """
    metrics = Metrics(engine)
    api = Api(engine, model, defaults)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.close()

    middleware = [Middleware(Gate, api_key=api_key, count=metrics.count)]
    if cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
        middleware.insert(0, cors)
    app = FastAPI(
        title="MiniMind",
        version="1",
        description="OpenAI's API for a MiniMind: what is honoured, and what is refused, is in the README.",
        lifespan=lifespan,
        middleware=middleware,
        exception_handlers={
            RequestValidationError: _invalid,
            HTTPException: _http_error,
            EngineError: _engine_error,
            ClientGone: _gone,
            Exception: _bug,
        },
        redoc_url=None,
    )
    errors = {status: {"model": protocol.ErrorBody} for status in (400, 401, 404, 413, 415, 429, 500, 503)}
    open_errors = {status: errors[status] for status in (500, 503)}

    @app.get("/v1/models", response_model=protocol.ModelList, responses={401: errors[401]})
    async def models() -> Response:
        return json_response({"object": "list", "data": [api.card()]})

    @app.get("/v1/models/{name:path}", response_model=protocol.ModelCard, responses={s: errors[s] for s in (401, 404)})
    async def one_model(name: str) -> Response:
        api.check_model(name)
        return json_response(api.card())

    stream_too = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

    @app.post("/v1/chat/completions", response_model=protocol.ChatAnswer, responses=errors | stream_too)
    async def chat_completions(body: protocol.ChatRequest, request: Request) -> Response:
        return await api.chat(body, request)

    @app.post("/v1/completions", response_model=protocol.CompletionAnswer, responses=errors | stream_too)
    async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
        return await api.complete(body, request)

    @app.post("/v1/embeddings", response_model=protocol.EmbeddingAnswer, responses=errors)
    async def embeddings(body: protocol.EmbeddingRequest, request: Request) -> Response:
        return await api.embed(body, request)

    @app.get("/health", response_model=protocol.Health, responses={503: {"model": protocol.Health}})
    async def health() -> Response:
        status = "failed" if engine.failed else "shutting down" if engine.closing else "ok"
        return json_response({"status": status}, 200 if status == "ok" else 503)

    @app.get(
        "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 500: open_errors[500]}
    )
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.openapi = functools.partial(_openapi, app.openapi)
    return app


def _openapi(make: Callable[[], dict]) -> dict:
    """FastAPI's document without the 422 that it puts everywhere: here what does not validate is a 400."""
    document = make()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


# ---- errors


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    message, param = explain(error.errors())
    return ApiError(400, message, param).response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    message = error.detail
    if error.status_code in (404, 405):
        message = f"there is no {request.method} {request.url.path} here"
    elif error.status_code == 400:  # not UTF-8, nested too deeply, numbers of thousands of digits
        message = "the body cannot be read as JSON"
    return json_response(error_body(error.status_code, message), error.status_code, error.headers)


async def _engine_error(_: Request, error: EngineError) -> Response:
    status, code, headers = _engine_status(error)
    return ApiError(status, str(error), code=code, headers=headers).response()


def _engine_status(error: EngineError) -> tuple[int, str, dict[str, str]]:
    if isinstance(error, QueueFull):
        return 429, "rate_limit_exceeded", {"Retry-After": str(error.retry_after)}
    if isinstance(error, ShuttingDown):
        return 503, "shutting_down", {"Retry-After": "10"}
    return 500, "engine_failed", {}


async def _gone(_: Request, __: ClientGone) -> Response:
    return Response(status_code=499)  # nobody reads it; the log shows why the request ended


async def _bug(_: Request, __: Exception) -> Response:
    return ApiError(500, "an error inside the server: its log says more", code="internal_error").response()


EXPECTED = {
    "prompt": "a text, a list of texts, a list of token ids (none negative), or a list of such lists; none of them empty",
    "input": "a text, a list of texts, a list of token ids (none negative), or a list of such lists; none of them empty",
    "stop": f"a text of at most 1024 characters, or a list of at most {protocol.MAX_STOPS} of them",
    "content": 'a text, or a list of parts like {"type": "text", "text": "..."}',
}


def explain(errors: Sequence[dict]) -> tuple[str, str | None]:
    """The first of pydantic's errors as (message, param)."""
    error = errors[0]
    place = [part for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error.get('ctx', {}).get('error', error['msg'])}", None
    for depth, part in enumerate(place):
        if part in EXPECTED and error["type"] != "missing":
            name = _dotted(place[: depth + 1])
            return f"{name} must be {EXPECTED[part]}", name
    name = _dotted(place)
    if not place:
        return "the body must be a JSON object", None
    if error["type"] == "too_short":
        return f"{name} is empty", name
    if error["type"] == "missing":
        return f"{name} is missing", name
    return f"{name}: {error['msg'][:1].lower()}{error['msg'][1:]}", name


def _dotted(place: Sequence[str | int]) -> str:
    """messages, 0, role -> messages[0].role"""
    name = ""
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


# ---- what requests mean


class Api:
    """What a request means for this model."""

    def __init__(self, engine: Engine, model: ServedModel, defaults: SamplingParams) -> None:
        self.engine, self.model, self.defaults = engine, model, defaults
        self.context = engine.max_len

    def card(self) -> dict:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "minimind",
            "max_model_len": self.context,
        }

    def check_model(self, name: str) -> None:
        if name != self.model.name:
            raise ApiError(
                404, f"there is no model {name!r} here, only {self.model.name!r}", "model", "model_not_found"
            )

    def check_fields(self, body: protocol.Request) -> None:
        """Refuse a field that would have to be ignored."""
        for name, value in (body.model_extra or {}).items():
            if value is None or name in protocol.HARMLESS or value in protocol.UNSUPPORTED.get(name, ()):
                continue
            if name in protocol.UNSUPPORTED:
                raise ApiError(
                    400, f"{name} is not supported by this server: leave it out", name, "unsupported_parameter"
                )
            raise ApiError(400, f"there is no field {name!r} in this request", name, "unknown_parameter")

    # -- chat

    async def chat(self, body: protocol.ChatRequest, request: Request) -> Response:
        self.check_model(body.model)
        self.check_fields(body)
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens mean the same: give one of them", "max_tokens")
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        limit = getattr(body, param)
        if limit == 0:
            raise ApiError(400, f"{param} must be at least 1 (-1: as much as fits)", param)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        messages = [_plain_message(i, message) for i, message in enumerate(body.messages)]
        size = sum(len(message["content"]) for message in messages)
        prompt = await _tokenize(self._chat_prompt, messages, size, "messages")
        room = self._room(len(prompt), limit, param, "messages")
        top = (body.top_logprobs or 0) if body.logprobs else None
        samplings = [self._sampling(body, i, room, top) for i in range(body.n or 1)]
        answer = ChatAnswer(self.model, [Choice() for _ in samplings], len(prompt), body, top)
        return await self._run(answer, [prompt] * len(samplings), samplings, body, request)

    def _chat_prompt(self, messages: list[dict]) -> list[int]:
        """The ids that training has seen up to where the answer begins; if it has begun, up to its end so far."""
        tokenizer = self.model.tokenizer
        check_messages(messages)
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return render_chat(tokenizer, asked, add_generation_prompt=True)[0] + encode_text(tokenizer, begun)

    # -- completions

    async def complete(self, body: protocol.CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        self.check_fields(body)
        n, limit = body.n or 1, body.max_tokens
        if body.best_of not in (None, n):
            raise ApiError(
                400, "best_of is not supported by this server: leave it out", "best_of", "unsupported_parameter"
            )
        prompts = await self._prompts(body.prompt, "prompt")
        if len(prompts) * n > protocol.MAX_INPUTS:
            raise ApiError(400, f"{len(prompts) * n} answers at a time are too many ({protocol.MAX_INPUTS})", "prompt")
        rooms = [self._room(len(prompt), limit, "max_tokens", "prompt") for prompt in prompts]
        scores: list[Scores | None] = [None] * len(prompts)
        if body.echo and body.logprobs is not None:
            scores = await cancel_on_disconnect(request.receive, self.engine.score(prompts, body.logprobs))
        choices, samplings, all_prompts = [], [], []
        for prompt, room, score in zip(prompts, rooms, scores, strict=True):
            for i in range(n):
                choices.append(Choice())
                if body.echo:
                    choices[-1].begin_with(self.model, prompt, score)
                if room:
                    samplings.append(self._sampling(body, i, room, body.logprobs))
                    all_prompts.append(prompt)
                else:
                    choices[-1].finish = "length"
        answer = CompletionAnswer(self.model, choices, sum(map(len, prompts)), body, body.logprobs)
        return await self._run(answer, all_prompts, samplings, body, request)

    # -- embeddings

    async def embed(self, body: protocol.EmbeddingRequest, request: Request) -> Response:
        self.check_model(body.model)
        self.check_fields(body)
        if body.dimensions not in (None, self.model.dim):
            raise ApiError(400, f"dimensions can only be {self.model.dim}, the width of this model", "dimensions")
        texts = await self._prompts(body.input, "input")
        for i, text in enumerate(texts):
            if len(text) > self.context:
                raise ApiError(
                    400,
                    f"text {i} of input has {len(text)} tokens, and the model's context is {self.context}",
                    "input",
                    "context_length_exceeded",
                )
        vectors = await cancel_on_disconnect(request.receive, self.engine.embed(texts))
        table = F.normalize(torch.stack(vectors), dim=-1).numpy().astype("<f4")
        if body.encoding_format == "base64":
            rows = [base64.b64encode(row.tobytes()).decode() for row in table]
        else:
            rows = table.astype(np.float64).round(8).tolist()
        used = sum(map(len, texts))
        return json_response(
            {
                "object": "list",
                "model": self.model.name,
                "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        )

    # -- shared

    async def _prompts(self, prompt: protocol.Prompt, param: str) -> list[list[int]]:
        """Token ids of one or many texts, which begin with <s> as in training; ids stay as they are."""
        many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        if len(many) > protocol.MAX_INPUTS:
            raise ApiError(
                400, f"{param} has {len(many)} texts, at most {protocol.MAX_INPUTS} are taken at a time", param
            )
        if isinstance(many[0], str):
            encode = functools.partial(encode_texts, self.model.tokenizer)
            return [[BOS_ID, *ids] for ids in await _tokenize(encode, many, sum(map(len, many)), param)]
        for ids in many:
            if max(ids) >= self.model.vocab_size:
                raise ApiError(
                    400, f"token {max(ids)} is unknown, the model has 0 to {self.model.vocab_size - 1}", param
                )
        return many

    def _room(self, prompt: int, limit: int | None, limit_param: str, prompt_param: str) -> int:
        """How many tokens an answer may have. Raises ApiError if there is no room, or not as much as asked for."""
        fits, what = self.context - prompt, f"the context is {self.context} tokens, prompt and answer together"
        code = "context_length_exceeded"
        if fits < (limit != 0):  # nothing has to be left if nothing is to be written
            raise ApiError(400, f"{what}, and the prompt has {prompt}: shorten it", prompt_param, code)
        if limit is None:
            return min(self.defaults.max_new_tokens, fits)
        if limit == -1:
            return fits
        if limit > fits:
            advice = f"ask for at most {fits}, or for -1: as much as fits"
            raise ApiError(400, f"{what}; the prompt has {prompt}, {limit} are asked for: {advice}", limit_param, code)
        return limit

    def _sampling(self, body: protocol.SamplingRequest, index: int, room: int, top: int | None) -> SamplingParams:
        """How choice `index` of a request is made: as it says, and where it says nothing, by the server's defaults."""
        names = "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed stop".split()
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], 1e-9)  # OpenAI allows 0: the likeliest only
        if "stop" in given:
            stops = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
            given["stop"] = tuple(text for text in stops if text)  # some clients send "" for none
        if "seed" in given:
            given["seed"] = (given["seed"] + index) % 2**64
        given["logprobs"] = top
        return dataclasses.replace(self.defaults, max_new_tokens=room, **given)

    async def _run(
        self,
        answer: Answer,
        prompts: list[list[int]],
        samplings: list[SamplingParams],
        body: protocol.SamplingRequest,
        request: Request,
    ) -> Response:
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        limit = self.engine.rows + self.engine.max_queue
        if len(prompts) > limit:
            raise ApiError(
                400, f"{len(prompts)} answers are asked for, the server makes at most {limit} at a time", "n"
            )
        try:
            stream = self.engine.submit(prompts, samplings)
        except ValueError as error:  # checked above, but for what only the decoder knows
            raise ApiError(400, str(error)) from error
        if body.stream:
            return SSEResponse(answer.pieces(stream), on_end=stream.cancel)
        await cancel_on_disconnect(request.receive, answer.collect(stream))
        return json_response(answer.whole())


async def _tokenize(encode: Callable, what: object, size: int, param: str):
    """`encode(what)`; long texts (`size` characters) beside the event loop, which has other clients to serve."""
    try:
        return await asyncio.to_thread(encode, what) if size > LONG_TEXT else encode(what)
    except ValueError as error:
        raise ApiError(400, str(error), param) from error


def _plain_message(index: int, message: protocol.Message) -> dict[str, str]:
    """A message as `render_chat` takes it. Raises ApiError for what is no text."""
    where = f"messages[{index}]"
    if message.role in ("tool", "function"):
        raise ApiError(
            400, f"{where}: this model has no tools, so there are no {message.role} messages", f"{where}.role"
        )
    for name, value in (message.model_extra or {}).items():
        if value not in (None, [], {}, ""):
            raise ApiError(
                400, f"{where}.{name} is not supported by this server", f"{where}.{name}", "unsupported_parameter"
            )
    content = message.content
    if content is None:
        raise ApiError(400, f"{where}.content is missing: it must be a text", f"{where}.content")
    if not isinstance(content, str):
        for i, part in enumerate(content):
            if part.type != "text" or part.text is None:
                place = f"{where}.content[{i}]"
                raise ApiError(
                    400, f"{place} is of type {part.type!r}: this model reads parts of type text only", place
                )
        content = "".join(part.text for part in content)
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


# ---- answers


@dataclass(slots=True)
class Token:
    """A token, how probable it was (None for the first of a text), the likeliest there, and where its text begins."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]
    offset: int


@dataclass(slots=True)
class Choice:
    """One answer: what of it has come, and was not sent yet. `tokens` are kept only for log-probabilities."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    length: int = 0  # characters of all tokens so far; half of one at the end is not counted
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add_token(
        self, model: ServedModel, token: int, logprob: float | None, top: Sequence[tuple[int, float]]
    ) -> None:
        self.tokens.append(Token(token, logprob, top, self.length))
        self.length += len(self._utf8.decode(model.text_of(token)))

    def begin_with(self, model: ServedModel, prompt: Sequence[int], scores: Scores | None) -> None:
        """Echo a prompt."""
        self.text = b"".join(map(model.text_of, prompt)).decode("utf-8", "replace")
        if scores is not None:
            for token, logprob, top in zip(prompt, scores.logprobs, scores.top, strict=True):
                self.add_token(model, token, logprob, top or ())
            self.length = len(self.text)
            self._utf8.reset()


class Answer:
    """The answer to one request, as chunks or whole. A subclass knows the shapes."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(
        self,
        model: ServedModel,
        choices: list[Choice],
        prompt_tokens: int,
        body: protocol.SamplingRequest,
        top_logprobs: int | None,
    ) -> None:
        self.model, self.choices, self.top_logprobs = model, choices, top_logprobs
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.about = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"fp_{model.fingerprint}",
        }
        # Everything of a chunk that does not change is written once: there is one for every token of every stream.
        about = json.dumps(self.about | {"object": self.chunk_object}, ensure_ascii=False)
        self._head = f"data: {about[:-1]}, "
        self._tail = ', "usage": null}\n\n' if self.include_usage else "}\n\n"

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    def whole(self) -> dict:
        choices = [self.whole_choice(i, choice) for i, choice in enumerate(self.choices)]
        return self.about | {"choices": choices, "usage": self.usage()}

    async def collect(self, stream: Stream) -> None:
        async with stream:
            async for events in stream:
                self._take(events)

    async def pieces(self, stream: Stream) -> AsyncIterator[bytes]:
        """Server-sent events; the last is [DONE], after an error if there was one."""
        yield self._chunks([chunk for i, choice in enumerate(self.choices) for chunk in self.first_chunks(i, choice)])
        async with stream:
            try:
                async for events in stream:
                    touched = self._take(events)
                    yield self._chunks([chunk for i in touched for chunk in self.next_chunks(i, self.choices[i])])
            except EngineError as error:
                status, code, _ = _engine_status(error)
                yield b"data: " + to_json(error_body(status, str(error), code=code)) + b"\n\n" + DONE
                return
        last = self._head + f'"choices": [], "usage": {json.dumps(self.usage())}}}\n\n' if self.include_usage else ""
        yield last.encode() + DONE

    def _take(self, events: list[tuple[int, TokenOutput]]) -> dict[int, None]:
        """Note what has come; returns the choices it came for, in order."""
        self.completion_tokens += len(events)
        for index, event in events:
            choice = self.choices[index]
            choice.text += event.text
            choice.finish = event.finish
            if self.top_logprobs is not None:
                choice.add_token(self.model, event.token, event.logprob, event.top_logprobs)
        return dict.fromkeys(index for index, _ in events)

    def _chunks(self, choices: list[str]) -> bytes:
        return "".join(f'{self._head}"choices": [{choice}]{self._tail}' for choice in choices).encode()

    def _taken(self, choice: Choice) -> tuple[str, str]:
        """The new text and log-probabilities of a choice as JSON; they are sent then, and forgotten."""
        text = _json_text(choice.text)
        logprobs = "null" if self.top_logprobs is None else json.dumps(self.logprobs(choice), ensure_ascii=False)
        choice.text, choice.tokens = "", []
        return text, logprobs

    # The shapes:

    def whole_choice(self, index: int, choice: Choice) -> dict:
        raise NotImplementedError

    def logprobs(self, choice: Choice) -> dict | None:
        raise NotImplementedError

    def first_chunks(self, index: int, choice: Choice) -> list[str]:
        """What is sent before the model has begun."""
        raise NotImplementedError

    def next_chunks(self, index: int, choice: Choice) -> list[str]:
        raise NotImplementedError


class ChatAnswer(Answer):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole_choice(self, index: int, choice: Choice) -> dict:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self.logprobs(choice),
            "finish_reason": choice.finish,
        }

    def logprobs(self, choice: Choice) -> dict | None:
        if self.top_logprobs is None:
            return None
        content = [
            self._entry(token.id, token.logprob)
            | {"top_logprobs": [self._entry(*one) for one in token.top[: self.top_logprobs]]}
            for token in choice.tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict:
        spelled = self.model.token_bytes(token)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}

    def first_chunks(self, index: int, choice: Choice) -> list[str]:
        delta = '{"role": "assistant", "content": "", "refusal": null}'
        return [f'{{"index": {index}, "delta": {delta}, "logprobs": null, "finish_reason": null}}']

    def next_chunks(self, index: int, choice: Choice) -> list[str]:
        chunks = []
        if choice.text or choice.tokens:
            text, logprobs = self._taken(choice)
            chunks.append(
                f'{{"index": {index}, "delta": {{"content": {text}}}, "logprobs": {logprobs}, "finish_reason": null}}'
            )
        if choice.finish is not None:
            chunks.append(f'{{"index": {index}, "delta": {{}}, "logprobs": null, "finish_reason": "{choice.finish}"}}')
        return chunks


class CompletionAnswer(Answer):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def whole_choice(self, index: int, choice: Choice) -> dict:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self.logprobs(choice),
            "finish_reason": choice.finish,
        }

    def logprobs(self, choice: Choice) -> dict | None:
        """The older shape: lists side by side, and the likeliest as {token: logprob} with the chosen one among them."""
        if self.top_logprobs is None:
            return None
        name = self.model.token_name
        tops = []
        for token in choice.tokens:
            top = {name(other): logprob for other, logprob in token.top[: self.top_logprobs]}
            tops.append(None if token.logprob is None else top | {name(token.id): token.logprob})
        return {
            "tokens": [name(token.id) for token in choice.tokens],
            "token_logprobs": [token.logprob for token in choice.tokens],
            "top_logprobs": tops if self.top_logprobs else None,
            "text_offset": [token.offset for token in choice.tokens],
        }

    def first_chunks(self, index: int, choice: Choice) -> list[str]:
        return self.next_chunks(index, choice)  # an echoed prompt, if any

    def next_chunks(self, index: int, choice: Choice) -> list[str]:
        if not (choice.text or choice.tokens or choice.finish):
            return []
        text, logprobs = self._taken(choice)
        finish = _json_text(choice.finish)
        return [f'{{"index": {index}, "text": {text}, "logprobs": {logprobs}, "finish_reason": {finish}}}']


# ---- measurements


class Metrics:
    """What /metrics says, in a registry of its own."""

    PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/health", "/metrics")

    def __init__(self, engine: Engine) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        self._requests = Counter(
            "minimind_requests", "HTTP requests by path and status", ["path", "status"], registry=self.registry
        )
        waited = Histogram(
            "minimind_queue_seconds",
            "Time that sequences waited for their row",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self.registry,
        )
        engine.statistics.on_joined = waited.observe
        self.registry.register(self)

    def count(self, path: str, status: int) -> None:
        known = path if path in self.PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._requests.labels(known, str(status)).inc()

    def collect(self):
        """The engine's own numbers, read when somebody asks."""
        engine, totals = self.engine, self.engine.statistics
        gauges = {
            "minimind_rows_running": ("Sequences in the batch", engine.running),
            "minimind_rows_limit": ("Sequences that the batch can hold", engine.rows),
            "minimind_queue_waiting": ("Sequences and texts that wait", engine.waiting),
            "minimind_queue_limit": ("How many may wait", engine.max_queue),
        }
        counters = {
            "minimind_prompt_tokens": ("Tokens read", totals.prompt_tokens),
            "minimind_generated_tokens": ("Tokens written", totals.generated_tokens),
            "minimind_steps": ("Steps of the batch", totals.steps),
            "minimind_cancelled": ("Sequences given up because their client was gone", totals.cancelled),
            "minimind_failures": ("Steps that failed", totals.failures),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(name, help, value=value)
        for name, (help, value) in counters.items():
            yield CounterMetricFamily(name, help, value=value)
