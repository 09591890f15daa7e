"""Uvicorn with an engine: connections that wait or stall are closed, and the server ends as its engine does."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serving.engine import Engine

STALL_SECONDS = 60.0  # a client that reads nothing for this long is disconnected
QUIET_SECONDS = 60.0  # between two lines about connections that cannot be accepted

log = logging.getLogger("minimind")


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that is closed if the head of a request does not arrive in time, or the client does not read its answer.

    Uvicorn itself only closes one on which nothing arrives after an answer. Here `timeout_keep_alive` is also the time for
    the whole head of a request, however slowly it arrives, and for the first one.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def _time_head(self) -> None:
        """Start the timer if a request is to come, stop it if there is one."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not answering and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.timeout_keep_alive, self._abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch(self.transport.get_write_buffer_size())  # it is not closed before the client has read everything

    def _watch(self, unsent: int) -> None:
        """Disconnect the client if no more than now has been sent after `STALL_SECONDS`."""

        def check() -> None:
            left = self.transport.get_write_buffer_size()
            if left < unsent:
                self._watch(left)
            else:
                log.warning("a client read nothing for %g s: it is disconnected", STALL_SECONDS)
                self._abort()

        self._stop_watching()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, check)

    def _stop_watching(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _abort(self) -> None:
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()
        if self._head_timer is not None:
            self._head_timer.cancel()


class Server(uvicorn.Server):
    """Uvicorn, whose first SIGTERM or Ctrl-C lets running answers finish, for at most `drain_seconds`.

    From then on it accepts no connections, and requests on open ones get a 503; an answer that is still running at the end
    gets an error. A second Ctrl-C ends the process at once. A server whose engine has failed ends, too.
    """

    def __init__(self, app: FastAPI, engine: Engine, drain_seconds: float, **settings: Any) -> None:
        """
        Args:
            settings: of `uvicorn.Config`.
        """
        # Answers end when the engine does; the time after that is for clients that do not even read that.
        grace = int(drain_seconds + STALL_SECONDS) + 5
        super().__init__(uvicorn.Config(app, http=Connection, timeout_graceful_shutdown=grace, **settings))
        self.engine, self.drain_seconds = engine, drain_seconds

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit and sig == signal.SIGINT:  # there is nothing to save
            os.write(2, b"stopped immediately\n")
            os._exit(128 + sig)
        self.engine.start_draining()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_ErrorLog())
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        return self.engine.failed or await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        draining = asyncio.ensure_future(self.engine.close(self.drain_seconds))
        await super().shutdown(sockets)
        await draining


class _ErrorLog:
    """Log what goes wrong in an event loop; without free files, which is tried again every second, once in a while."""

    logged = -QUIET_SECONDS

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" not in context["message"]:
            loop.default_exception_handler(context)
        elif time.monotonic() - self.logged >= QUIET_SECONDS:
            self.logged = time.monotonic()
            log.warning("connections wait until others are closed: %s", context["exception"])
