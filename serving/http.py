"""Handle what all HTTP requests have in common: key, size, counting, errors in OpenAI's form, disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.stream import EngineError, EngineStopped, QueueFull, ShuttingDown, TooSlow

MAX_BODY = 1_000_000  # bytes of a request; a text of the longest context is far smaller
MAX_DISCARDED = 64_000_000  # bytes of a larger body that are read and dropped, so that the client can read the error
MAX_LOGGED = 500  # bytes of an error in the log
BODY_SECONDS = 60.0  # in which the body of a request must arrive

log = logging.getLogger("minimind")
T = TypeVar("T")


# ---- errors


class ApiError(HTTPException):
    """An error in OpenAI's form. `param`: the field that is wrong; `code`: a word that programs can test for."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @classmethod
    def from_engine(cls, error: EngineError) -> ApiError:
        if isinstance(error, QueueFull):
            headers = {"Retry-After": str(error.retry_after)}
            return cls(429, str(error), code="rate_limit_exceeded", headers=headers)
        if isinstance(error, ShuttingDown | EngineStopped):
            code = "shutting_down" if isinstance(error, ShuttingDown) else "engine_failed"
            return cls(503, str(error), code=code, headers={"Retry-After": "10"})
        return cls(500, str(error), code="client_too_slow" if isinstance(error, TooSlow) else "engine_failed")

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status_code, self.headers)


def to_json(content: Any) -> bytes:
    """Encode as JSON in UTF-8. Half of a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, media_type="application/json")


def add_header(request: Request, name: str, value: str) -> None:
    """Add a header to the response of a request, whichever it will be."""
    request.scope["response_headers"].append((name.lower().encode(), value.encode()))


# ---- before a request is handled


class Auth:
    """ASGI middleware: let requests in that have the key, a known Host and a JSON body of an acceptable size; count all."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        count: Callable[[str, int], None],
        allowed_hosts: Sequence[str],
        max_body: int = MAX_BODY,
    ) -> None:
        """
        Args:
            api_key: bearer token required for /v1; None: no key.
            count: called with the path and the status of every response.
            allowed_hosts: names by which clients may address this server; "*": all. Addresses always may.
            max_body: bytes of a request.
        """
        self.app, self.count, self.max_body = app, count, max_body
        self.key = None if api_key is None else api_key.encode()
        self.hosts = {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, status = uuid.uuid4().hex, 0
        added = scope["response_headers"] = [(b"x-request-id", request_id.encode())]

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *added]
            elif 400 <= status < 499:  # the body is an ApiError: its message and field as JSON, in one line
                body = message.get("body", b"")[:MAX_LOGGED].decode(errors="replace")
                log.info("%s %.100r: %d %s (request %s)", scope["method"], scope["path"], status, body, request_id)
            await send(message)

        headers = dict(scope["headers"])
        error = self._check(scope, headers)
        receive = _in_time(receive)
        if error is not None:
            with contextlib.suppress(ApiError):
                await _discard(receive, headers)
            await error.response()(scope, receive, send_counted)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                if message.get("more_body", False):
                    await _discard(receive, headers)
                size = headers.get(b"content-length", b"more than %d" % self.max_body).decode()
                text = f"the body has {size} bytes; the limit is {self.max_body}"
                raise ApiError(413, text, code="request_too_large")
            return message

        try:
            await self.app(scope, receive_limited, send_counted)
        except Exception:
            if status:
                raise
            log.exception("an internal error (request %s)", request_id)
            bug = ApiError(500, "an internal error of the server; see its log", code="internal_error")
            await bug.response()(scope, receive, send_counted)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if not self._knows(headers.get(b"host", b"").decode("latin-1")):
            message = "the server is not known by the name in the Host header: start it with --allowed_hosts NAME"
            return ApiError(403, message, code="unknown_host")
        if not scope["path"].startswith("/v1"):
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if self.key is not None and not (scheme.lower() == b"bearer" and hmac.compare_digest(key, self.key)):
            problem = "the API key is wrong" if b"authorization" in headers else "an API key is required"
            message = f"{problem}: send it as `Authorization: Bearer KEY`"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":  # a web page can send other types to any server without CORS permission
                return ApiError(415, "the body must be JSON, with the header `Content-Type: application/json`")
        return None

    def _knows(self, host: str) -> bool:
        """Return whether this is a name of the server: a site that only resolves to it (DNS rebinding) has another."""
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if not host or name in self.hosts or "*" in self.hosts:
            return True
        try:
            return bool(ipaddress.ip_address(name))  # no site has an address as its name
        except ValueError:
            return False


def _in_time(receive: Receive) -> Receive:
    """Return `receive` with a limit of `BODY_SECONDS` for all parts of a body together."""
    deadline: float | None = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive_in_time() -> Message:
        nonlocal deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            text = f"the body of the request did not arrive within {BODY_SECONDS:g} s"
            raise ApiError(408, text, headers={"Connection": "close"}) from None
        if not message.get("more_body", False):
            deadline = None
        return message

    return receive_in_time


async def _discard(receive: Receive, headers: dict[bytes, bytes]) -> None:
    """Read the rest of a rejected body: a client that cannot finish sending would not see the error."""
    length = headers.get(b"content-length", b"0")
    left = MAX_DISCARDED
    if length.isdigit() and int(length) > left:
        return
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


# ---- clients that disconnect


class ClientDisconnected(Exception):
    """The client closed the connection before its answer was complete."""


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of `work`. If the client disconnects first, cancel it and raise ClientDisconnected."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()


class SSEResponse(EventSourceResponse):
    """Server-sent events, sent until they end or the client disconnects.

    on_end: called in every case, even if the client disconnected before the first event.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()
