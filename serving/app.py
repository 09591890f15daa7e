"""The routes of OpenAI's API, answered by an `Engine`.

    app = create_app(engine, ServedModel("full_sft_512", ...), defaults=SamplingParams(temperature=0.7))

A request passes `http.Auth` (key, size), a schema of `protocol` (types and ranges) and an `Endpoint`, which turns it into
prompts for the engine; a `ResponseBuilder` turns the engine's tokens into chunks or one object.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from inference.options import SamplingParams
from serving import protocol
from serving.chat import ChatEndpoint
from serving.completions import CompletionEndpoint
from serving.embeddings import EmbeddingEndpoint
from serving.endpoint import ServedModel
from serving.engine import Engine
from serving.http import MAX_BODY, ApiError, Auth, ClientDisconnected, json_response
from serving.images import MAX_IMAGE_BODY
from serving.metrics import Metrics
from serving.pages import docs_page, index_page
from serving.responses import ResponsesEndpoint
from serving.stream import EngineError


def create_app(
    engine: Engine,
    model: ServedModel,
    defaults: SamplingParams,
    *,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] = ("localhost",),
    strict: bool = False,
) -> FastAPI:
    """Return the server as an ASGI application; it starts the engine and closes it.

    Args:
        defaults: for what a request does not set. Its max_new_tokens limits answers of requests that set no limit.
        api_key: required from clients; None: no key.
        cors_origins: sites whose pages may call this server from a browser; "*": all.
        allowed_hosts: names by which clients may address this server, besides addresses; "*": all.
        strict: refuse fields that would be ignored.
    """
    metrics = Metrics(engine)
    chat = ChatEndpoint(engine, model, defaults, strict)
    responses = ResponsesEndpoint(engine, model, defaults, strict)
    completions = CompletionEndpoint(engine, model, defaults, strict)
    embeddings = EmbeddingEndpoint(engine, model, defaults, strict)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.close()

    limit = MAX_BODY if model.images is None else MAX_IMAGE_BODY
    auth = dict(api_key=api_key, count=metrics.count, allowed_hosts=allowed_hosts, max_body=limit)
    middleware = [Middleware(Auth, **auth)]
    if cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id", "X-Ignored-Fields", "X-Max-Tokens"],
        )
        middleware.insert(0, cors)
    app = FastAPI(
        title="MiniMind",
        version="1",
        description="OpenAI's API for a MiniMind model. The README lists the fields that have an effect.",
        lifespan=lifespan,
        middleware=middleware,
        exception_handlers={
            RequestValidationError: _on_invalid_body,
            HTTPException: _on_http_error,
            EngineError: _on_engine_error,
            ClientDisconnected: _on_disconnect,
        },
        docs_url=None,
        redoc_url=None,
    )
    # "4XX" also keeps FastAPI from adding its own 422: here an invalid body is a 400.
    errors: dict[int | str, dict[str, Any]] = {status: {"model": protocol.ErrorBody} for status in ("4XX", "5XX")}
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "minimind",
        "max_model_len": engine.max_len,
    }

    @app.get("/v1/models", response_model=protocol.ModelList, responses=errors)
    async def models() -> Response:
        return json_response({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}", response_model=protocol.ModelCard, responses=errors)
    async def one_model(name: str) -> Response:
        chat.check_model(name)
        return json_response(card)

    or_stream = errors | {200: {"content": {"text/event-stream": {}}}}
    app.post("/v1/chat/completions", name="chat_completions", response_model=ChatCompletion, responses=or_stream)(
        chat.create
    )
    app.post("/v1/responses", name="create_response", response_model=None, responses=or_stream)(responses.create)
    app.post("/v1/completions", name="completions", response_model=protocol.Completion, responses=or_stream)(
        completions.create
    )
    app.post("/v1/embeddings", name="embeddings", response_model=protocol.EmbeddingList, responses=errors)(
        embeddings.create
    )

    @app.get("/health", response_model=protocol.Health, responses={503: {"model": protocol.Health}})
    async def health() -> Response:
        status = "failed" if engine.failed else "shutting down" if engine.closing else "ok"
        return json_response({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses=errors | {200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return index_page(app.openapi(), model.name, engine.max_len)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return docs_page(app.openapi())

    return app


# ---- errors


async def _on_invalid_body(request: Request, error: RequestValidationError) -> Response:
    message, param = explain(error.errors(), RESPONSES_EXPECTED if "/responses" in request.url.path else EXPECTED)
    return ApiError(400, message, param).response()


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    message = error.detail
    if error.status_code in (404, 405):
        message = f"this server has no {request.method} {request.url.path}"
    elif error.status_code == 400:  # not UTF-8, nested too deeply, numbers with thousands of digits
        message = "the body cannot be read as JSON"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_engine_error(_: Request, error: EngineError) -> Response:
    return ApiError.from_engine(error).response()


async def _on_disconnect(_: Request, __: ClientDisconnected) -> Response:
    return Response(status_code=499)  # for the log: the client has closed the connection


_TEXTS_OR_IDS = (
    "a text, a list of texts, a list of token ids (none negative), or a list of such lists; none may be empty"
)
EXPECTED = {
    "prompt": _TEXTS_OR_IDS,
    "input": _TEXTS_OR_IDS,
    "stop": f"a text of at most 1024 characters, or a list of at most {protocol.MAX_STOPS} such texts",
    "content": 'a text, or a list of parts like {"type": "text", "text": "..."} or {"type": "image_url", "image_url": '
    '{"url": "data:image/png;base64,..."}}',
    "role": "system, developer, user, assistant or tool",
    "tool_calls": 'a list like [{"type": "function", "function": {"name": "...", "arguments": "{...}"}}]',
    "tools": 'at most 128 of {"type": "function", "function": {"name": "...", "parameters": {...}}}; names are at most '
    "64 letters, digits, and _ . -",
    "tool_choice": '"auto", "none", "required" or {"type": "function", "function": {"name": "..."}}',
    "function_call": '"auto" or "none": it has no effect here, use tools and tool_choice',
    "response_format": '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": '
    '{"schema": {...}}}',
    "logit_bias": "an object of token ids and numbers from -100 to 100",
    "reasoning_effort": "none, minimal, low, medium, high or xhigh",
    "modalities": '["text"]: this model writes nothing else',
    "suffix": "empty: this model only continues texts",
}


RESPONSES_EXPECTED = EXPECTED | {
    "input": 'a text, or a list of messages like {"role": "user", "content": "..."}, calls and what tools returned: this '
    "model reads nothing else",
    "text": '{"format": {"type": "text"}}, {"format": {"type": "json_object"}} or {"format": {"type": "json_schema", '
    '"schema": {...}}}',
    "tools": 'at most 128 of {"type": "function", "name": "...", "parameters": {...}}; names are at most 64 letters, '
    "digits, and _ . -",
    "tool_choice": '"auto", "none", "required" or {"type": "function", "name": "..."}',
    "previous_response_id": "null: this server keeps nothing between requests, so send the whole chat as input",
    "conversation": "null: this server keeps nothing between requests, so send the whole chat as input",
    "prompt": "null: this server has no stored prompts",
}


def explain(errors: Sequence[dict], expected: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the first of pydantic's errors as (message, param).

    expected: what the value of a field must be, in words.
    """
    error = errors[0]
    path = [part for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error.get('ctx', {}).get('error', error['msg'])}", None
    if not path:
        return "the body must be a JSON object", None
    for depth, part in enumerate(path):
        if part in expected and error["type"] != "missing":
            name = _dotted(path[: depth + 1])
            return f"{name} must be {expected[part]}", name
    name = _dotted(path)
    if error["type"] == "too_short":
        return f"{name} is empty", name
    if error["type"] == "missing":
        return f"{name} is missing", name
    return f"{name}: {error['msg'][:1].lower()}{error['msg'][1:]}", name


def _dotted(path: Sequence[str | int]) -> str:
    """Return the path of a field as text: messages, 0, role -> messages[0].role"""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name
