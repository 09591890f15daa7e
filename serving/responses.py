"""What every request passes, whatever it is about: key, size, counting, errors in OpenAI's shape, and vanished clients."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import uvicorn
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.engine import Engine

MAX_BODY = 1_000_000  # bytes of a request; a text of the longest context is far smaller
MAX_DISCARDED = 64_000_000  # bytes of a longer body that are read and dropped, so that the client can read the refusal
STALL_SECONDS = 60.0  # a client that takes nothing for so long is given up

log = logging.getLogger("minimind")
T = TypeVar("T")


class ApiError(HTTPException):
    """An error in OpenAI's shape. `param`: the field that is wrong, `code`: a word that programs can test for."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def response(self) -> Response:
        return json_response(
            error_body(self.status_code, self.detail, self.param, self.code), self.status_code, self.headers
        )


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_json(content: Any) -> bytes:
    """JSON in UTF-8. Half of a surrogate pair, which UTF-8 cannot have, becomes its JSON escape."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "backslashreplace"
    )


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, media_type="application/json")


class Gate:
    """ASGI middleware: lets requests in that have the key, a JSON body, and not too much of it; counts all of them."""

    def __init__(self, app: ASGIApp, api_key: str | None, count: Callable[[str, int], None]) -> None:
        """
        Args:
            api_key: what /v1 asks for as bearer token; None: nothing.
            count: called with the path and the status of every response.
        """
        self.app, self.count = app, count
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex.encode()

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        headers = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _discard(receive, headers)
            await refusal.response()(scope, receive, send_counted)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                if message.get("more_body", False):
                    await _discard(receive, headers)
                raise _too_large(f"more than {MAX_BODY}")
            return message

        await self.app(scope, receive_limited, send_counted)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if not scope["path"].startswith("/v1"):
            return None
        if self.key is not None and not hmac.compare_digest(headers.get(b"authorization", b""), self.key):
            message = "the API key is wrong" if b"authorization" in headers else "an API key is needed"
            return ApiError(
                401,
                f"{message}: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":  # a page in a browser can send other types without asking
                return ApiError(415, "the body must be JSON, with the header `Content-Type: application/json`")
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > MAX_BODY:
                return _too_large(length.decode())
        return None


def _too_large(size: str) -> ApiError:
    return ApiError(413, f"the body has {size} bytes, at most {MAX_BODY} are taken", code="request_too_large")


async def _discard(receive: Receive, headers: dict[bytes, bytes]) -> None:
    """Read a body that nobody wants: a client that cannot finish sending would not see the answer."""
    length = headers.get(b"content-length", b"0")
    left = MAX_DISCARDED
    if length.isdigit() and int(length) > left:
        return
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


# ---- clients that vanish, and clients that do not read


class ClientGone(Exception):
    """The client has closed the connection."""


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone (or has its whole answer)."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T], *other_ends: Awaitable[None]) -> T:
    """The result of `work`. If the client closes the connection first (or another end comes), it is cancelled.

    Raises ClientGone then.
    """
    task, *ends = (asyncio.ensure_future(part) for part in (work, disconnected(receive), *other_ends))
    try:
        await asyncio.wait((task, *ends), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for part in (task, *ends):
            part.cancel()


class SSEResponse(Response):
    """Server-sent events, written as they come, until a client is gone or takes nothing for a minute.

    on_end: called in any case, even if not one piece was asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.pieces, self.on_end = pieces, on_end
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(receive, self._write(send), self._stalled())
        except ClientGone:
            pass
        finally:
            self.on_end()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self.pieces:
            self._sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            self._sending_since = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stalled(self) -> None:
        """Return when the client has not taken a piece for too long."""
        while True:
            await asyncio.sleep(STALL_SECONDS / 6)
            if self._sending_since is not None and time.monotonic() - self._sending_since > STALL_SECONDS:
                log.warning("a client took nothing for %d s: its request is given up", STALL_SECONDS)
                return


class Server(uvicorn.Server):
    """Uvicorn, whose first SIGTERM or Ctrl-C lets running answers finish, for at most `drain_seconds`.

    New connections are closed to it from then on; requests on open ones get a 503; what is still running at the end is told
    so. A second Ctrl-C ends at once.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine, self.drain_seconds = engine, drain_seconds

    def handle_exit(self, sig: int, frame) -> None:
        if self.should_exit and sig == signal.SIGINT:  # there is nothing to save
            os.write(2, b"ended at once\n")
            os._exit(128 + sig)
        self.engine.refuse_new()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None) -> None:
        draining = asyncio.ensure_future(self.engine.close(self.drain_seconds))
        await super().shutdown(sockets)
        await draining
