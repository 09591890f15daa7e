"""Streams, which bring the results of a request to its caller, and the errors that may come in their place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

from inference.generator import TokenOutput

MAX_UNREAD = 32_000_000  # bytes of an answer that wait for a client which reads too slowly

T = TypeVar("T")


class EngineError(Exception):
    """A request was not carried out, or not to its end; the message says why."""


class QueueFull(EngineError):
    """Too many requests are waiting. `retry_after`: in how many seconds there will probably be room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(EngineError):
    """The engine accepts no more work, or dropped this request."""


class EngineFailed(EngineError):
    """The computation failed (for example: out of memory)."""


class EngineStopped(EngineFailed):
    """The engine failed for good: it answers no request any more."""


class TooSlow(EngineError):
    """The client reads its answer more slowly than it is written, and too much of it waits."""


class Stream(Generic[T]):
    """The results of one request of one or more items (sequences to continue, texts to read), interleaved as they come.

    Belongs to the event loop. Leave it by `async with`, or call `cancel`: its rows are then free before the next step.
    """

    def __init__(self, cancel: Callable[[Stream], None], size: int, is_last: Callable[[T], bool]) -> None:
        """
        Args:
            cancel: called when what is not finished is not wanted any more.
            size: items of the request.
            is_last: whether a result is the last of its item.
        """
        self._cancel, self._is_last = cancel, is_last
        self._results: list[tuple[int, T]] = []
        self._unread = 0  # bytes of them, roughly
        self._news = asyncio.Event()
        self._error: EngineError | None = None
        self.unfinished = size  # items whose last result has not come

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[int, T]]:
        """Return all (index of the item, result) that came since the last call; wait for at least one.

        Raises EngineError if the engine dropped the request, after returning the results that came before.
        """
        while not self._results:
            if self._error is not None:
                raise self._error
            if not self.unfinished:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        results, self._results = self._results, []
        self._unread = 0
        return results

    def cancel(self) -> None:
        """Drop what is not finished."""
        self._drop(ShuttingDown("the request was cancelled"))

    def _drop(self, error: EngineError) -> None:
        if self.unfinished and self._error is None:
            self._cancel(self)
            self.receive(error)

    def receive(self, news: list[tuple[int, T]] | EngineError) -> None:
        """Add results, or end with an error."""
        if isinstance(news, EngineError):
            if self.unfinished:
                self._error = self._error or news
        elif self._error is None:
            self._results += news
            self.unfinished -= sum(self._is_last(result) for _, result in news)
            self._unread += sum(_size(result) for _, result in news)
            if self._unread > MAX_UNREAD:
                self._drop(TooSlow(f"the client reads too slowly: {MAX_UNREAD / 1e6:.0f} MB of its answer wait for it"))
        self._news.set()


def _size(result: Any) -> int:
    """Return about how many bytes a result takes."""
    return 200 + 120 * len(result.top_logprobs) if isinstance(result, TokenOutput) else 0
