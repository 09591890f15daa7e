"""Continuous batching: one thread owns the model, and requests join and leave its running batch at any step.

    engine = Engine(lambda: Decoder(model, rows=32, tokenizer=tokenizer), max_queue=256)
    engine.start()                                   # in the event loop that will read the answers
    async with engine.submit([ids], [Sampling(max_new_tokens=64)]) as stream:
        async for events in stream:                  # [(0, Event), ...]: what came since the last look
            ...
    await engine.close(drain_seconds=30)

**Nobody waits for a reader.** The thread hands each step's tokens to the event loop in one call and goes on. What a slow
client has not read yet lies in its `Stream`, which can never hold more than the answer (`max_new_tokens` events a
sequence); its row of the batch is free as soon as the answer is complete.

**Nobody pays for a long prompt alone.** Prompts are read between two steps, at most `PROMPT_TOKENS` at a time, so that
running answers stall for a bounded time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.generator import BatchGenerator, TokenOutput
from inference.options import SamplingParams

PROMPT_TOKENS = 2048  # prompt tokens, padding included, that are read between two steps (one prompt is always read)

MAX_READINGS = 64  # texts that are only read (scored, embedded) in one pass

log = logging.getLogger("minimind")


class EngineError(Exception):
    """Why a request was not, or not wholly, carried out."""


class QueueFull(EngineError):
    """Too many are waiting. `retry_after`: in how many seconds there will probably be room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(EngineError):
    """The engine takes no more work, or had to let this request go."""


class EngineFailed(EngineError):
    """The computation broke down (for example: out of memory)."""


# ---- what callers hold


class Stream:
    """The answers to one request: one or more sequences, whose events come interleaved.

    Belongs to the event loop. Leave it by `async with`, or call `cancel`: then its rows are free before the next step.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        self._engine = engine
        self._events: list[tuple[int, TokenOutput]] = []
        self._waiter: asyncio.Future | None = None
        self._error: EngineError | None = None
        self.unfinished = size  # sequences whose last event has not come

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_) -> None:
        self.cancel()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[tuple[int, TokenOutput]]:
        """All (index of the sequence, event) that have come since the last call; waits for at least one.

        Raises EngineError if the engine gave the request up; the events before that have been returned then.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if not self.unfinished:
                raise StopAsyncIteration
            self._waiter = self._engine.loop.create_future()
            await self._waiter
        events, self._events = self._events, []
        return events

    def cancel(self) -> None:
        """Give up what is not finished."""
        if self.unfinished and self._error is None:
            self._engine._cancel(self)
            self._receive(ShuttingDown("the request was cancelled"))

    def _receive(self, what: list[tuple[int, TokenOutput]] | EngineError) -> None:
        if isinstance(what, EngineError):
            if self.unfinished:
                self._error = self._error or what
        elif self._error is None:
            self._events += what
            self.unfinished -= sum(event.finish is not None for _, event in what)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass
class Scores:
    """How probable a model finds the tokens of a text.

    Position t says how probable token t is after those before it, so there is none for the first token.
    """

    logprobs: list[float | None]
    top: list[list[tuple[int, float]] | None]  # the likeliest tokens there, from the likeliest down


class _Readings:
    """Texts of one request that are only read (scored, embedded); the results come together."""

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine, self.results, self.missing = engine, [None] * size, size
        self.done: asyncio.Future = engine.loop.create_future()

    async def wait(self) -> list:
        try:
            return await self.done
        finally:
            if self.missing:
                self.engine._cancel(self)

    def _receive(self, what: list[tuple[int, object]] | EngineError) -> None:
        if self.done.done():
            return
        if isinstance(what, EngineError):
            self.done.set_exception(what)
            return
        for index, result in what:
            self.results[index] = result
        self.missing -= len(what)
        if not self.missing:
            self.done.set_result(self.results)


# ---- what waits and what runs


@dataclass(slots=True, eq=False)
class _Sequence:
    """A prompt to be continued."""

    owner: Stream
    index: int
    prompt: Sequence[int]
    sampling: SamplingParams
    key: int
    submitted: float
    joined: float = 0.0


@dataclass(slots=True, eq=False)
class _Reading:
    """A text to be read, and what is made of it: `embedding`, or Scores with the `top` likeliest tokens."""

    owner: _Readings
    index: int
    prompt: Sequence[int]
    top: int
    embedding: bool


@dataclass
class Statistics:
    """Totals since the start, and durations in seconds for whoever listens; written by the thread alone."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    cancelled: int = 0
    failures: int = 0
    mean_seconds: float = 0.0  # that a sequence runs, lately
    on_joined: Callable[[float], None] = field(default=lambda seconds: None)  # waited so long for its row


class Engine:
    """Answers many requests with one model. All methods but `close` return at once; call them in the event loop."""

    def __init__(self, make_decoder: Callable[[], BatchGenerator], max_queue: int = 256) -> None:
        """
        Args:
            make_decoder: called by the thread that will use it (compiled models are particular about that), and again
                after a failure. What it raises, this constructor raises.
            max_queue: sequences and texts that may wait while all rows are taken.
        """
        if max_queue < 1:
            raise ValueError(f"--max_queue {max_queue} must be at least 1")
        self._make_decoder, self.max_queue = make_decoder, max_queue
        self.statistics = Statistics()
        self._wakeup = threading.Condition()
        # Guarded by _wakeup:
        self._waiting: deque[_Sequence] = deque()
        self._readings: deque[_Reading] = deque()
        self._cancelled: set[Stream | _Readings] = set()
        self._closing = self._stopping = False
        # The thread's own:
        self._running: dict[int, _Sequence] = {}
        self._next_key = 0
        self.failed = False
        made: Future[BatchGenerator] = Future()
        self._thread = threading.Thread(target=self._run, args=(made,), name="engine", daemon=True)
        self._thread.start()
        self.decoder: BatchGenerator | None = made.result()
        self.rows, self.max_len = self.decoder.capacity, self.decoder.max_len

    # -- for the event loop

    def start(self) -> None:
        """Call this once, in the event loop that will submit requests and read the answers."""
        self.loop = asyncio.get_running_loop()

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences and texts that wait for their turn."""
        return len(self._waiting) + len(self._readings)

    @property
    def closing(self) -> bool:
        return self._closing

    def check(self, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Raise ValueError for a prompt that cannot be decoded."""
        decoder = self.decoder
        if decoder is None:
            raise QueueFull("the engine starts anew after an error: try again", retry_after=1)
        decoder.check(prompt, sampling)

    def submit(self, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams]) -> Stream:
        """Queue sequences that belong together.

        Raises ValueError for a prompt that cannot be decoded, QueueFull, ShuttingDown, EngineFailed.
        """
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self.check(prompt, sampling)
        stream, now = Stream(self, len(prompts)), time.perf_counter()
        with self._wakeup:
            self._admit(len(prompts))
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                self._waiting.append(_Sequence(stream, index, prompt, sampling, self._next_key, now))
                self._next_key += 1
            self._wakeup.notify()
        return stream

    async def score(self, texts: Sequence[Sequence[int]], top: int = 0) -> list[Scores]:
        """How probable the tokens of each text are, with the `top` likeliest at each position. Raises like `submit`."""
        return await self._queue_readings(texts, top, embedding=False)

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """(dim,) float32 each: the mean over the text of the final hidden states. Raises like `submit`."""
        return await self._queue_readings(texts, 0, embedding=True)

    async def _queue_readings(self, texts: Sequence[Sequence[int]], top: int, embedding: bool) -> list:
        if not texts:
            return []
        readings = _Readings(self, len(texts))
        with self._wakeup:
            self._admit(len(texts))
            self._readings += [_Reading(readings, i, text, top, embedding) for i, text in enumerate(texts)]
            self._wakeup.notify()
        return await readings.wait()

    def _admit(self, new: int) -> None:
        """Raise unless `new` more may wait."""
        if self.failed:
            raise EngineFailed("the engine has stopped after an error: restart the server")
        if self._closing:
            raise ShuttingDown("the server is shutting down")
        room = self.max_queue + max(self.rows - self.running, 0) - self.waiting
        if new > room:
            raise QueueFull(
                f"{self.running} sequences are running and {self.waiting} are waiting, of at most {self.rows} and "
                f"{self.max_queue}: try again later",
                retry_after=self._seconds_until_room(new - room),
            )

    def _seconds_until_room(self, places: int) -> int:
        """An estimate from how long sequences ran lately."""
        return min(max(math.ceil(self.statistics.mean_seconds * places / self.rows), 1), 60)

    def _cancel(self, owner: Stream | _Readings) -> None:
        with self._wakeup:
            self._cancelled.add(owner)
            self._wakeup.notify()

    def refuse_new(self) -> None:
        """From now on take nothing new; what waits for its row is given up, what runs goes on. Any thread."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()

    async def close(self, drain_seconds: float = 0.0) -> None:
        """Let what runs finish, for at most so long; give up the rest, and end the thread."""
        self.refuse_new()
        deadline = time.monotonic() + drain_seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        while self._thread.is_alive():  # it finishes the step it is in, and tells everyone
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)  # its last words are already scheduled in this loop

    # -- the thread

    def _run(self, made: Future[BatchGenerator]) -> None:
        try:
            made.set_result(self._make_decoder())
        except BaseException as error:
            made.set_exception(error)
            return
        try:
            while self._turn():
                pass
            log.debug("engine ended")
            self._give_up(ShuttingDown("the server is shutting down"), everything=True)
        except BaseException:
            self.failed = True
            self._give_up(EngineFailed("the engine has stopped after an error: restart the server"), everything=True)
            raise

    def _turn(self) -> bool:
        """One step of everything; False at the end."""
        with self._wakeup:
            while not (self._waiting or self._readings or self._cancelled or self._running or self._closing):
                self._wakeup.wait()
            gone, self._cancelled = self._cancelled, set()
            if gone:
                self._waiting = deque(item for item in self._waiting if item.owner not in gone)
                self._readings = deque(item for item in self._readings if item.owner not in gone)
            refused = []
            if self._closing:
                refused = [*self._waiting, *self._readings]
                self._waiting.clear()
                self._readings.clear()
            stopping = self._stopping
        self._drop([key for key, item in self._running.items() if item.owner in gone])
        self._tell({item.owner: ShuttingDown("the server is shutting down") for item in refused})
        if stopping or (self._closing and not self._running):
            return False
        with self._wakeup:
            joining = _take(self._waiting, self.decoder.free)
            reading = _take(self._readings, MAX_READINGS, alike=lambda item: (item.top, item.embedding))
        try:
            self._tell(self._read(reading))
            self._tell(self._by_owner(self._join(joining)))
            self._tell(self._by_owner(self.decoder.step()))
            self.statistics.steps += 1
        except RuntimeError:  # of PyTorch: out of memory, a broken device
            log.exception("a step failed; its requests are given up")
            self.statistics.failures += 1
            self._give_up(EngineFailed("the computation failed: see the server's log"), extra=[*joining, *reading])
            self.decoder = None  # its memory has to go before that of the next is taken
            self.decoder = self._make_decoder()
        return True

    def _join(self, items: list[_Sequence]) -> list[TokenOutput]:
        """Read the prompts of new sequences; their first tokens."""
        if not items:
            return []
        now = time.perf_counter()
        for item in items:
            item.joined = now
            self._running[item.key] = item
            self.statistics.on_joined(now - item.submitted)
            self.statistics.prompt_tokens += len(item.prompt)
        prompts, samplings, keys = zip(*[(item.prompt, item.sampling, item.key) for item in items], strict=True)
        return self.decoder.add(prompts, samplings, keys)

    def _by_owner(self, events: list[TokenOutput]) -> dict[Stream, list[tuple[int, TokenOutput]]]:
        """Who receives what; sequences that ended with it run no longer."""
        news: dict[Stream, list[tuple[int, TokenOutput]]] = {}
        for event in events:
            item = self._running[event.key]
            if event.finish is not None:
                del self._running[event.key]
                seconds = time.perf_counter() - item.joined
                mean = self.statistics.mean_seconds
                self.statistics.mean_seconds = mean + 0.1 * (seconds - mean) if mean else seconds
            news.setdefault(item.owner, []).append((item.index, event))
        self.statistics.generated_tokens += len(events)
        return news

    def _read(self, items: list[_Reading]) -> dict[_Readings, list[tuple[int, object]]]:
        """Read texts that are not continued: {owner: [(index, result)]}."""
        news: dict[_Readings, list[tuple[int, object]]] = {}
        for item, result in zip(items, self._results(items) if items else [], strict=True):
            news.setdefault(item.owner, []).append((item.index, result))
        return news

    @torch.inference_mode()
    def _results(self, items: list[_Reading]) -> list[Scores] | list[Tensor]:
        """One pass over texts of any length; on the right they are filled up, which causal attention never sees."""
        model, device = self.decoder.model, self.decoder.device
        lengths = [len(item.prompt) for item in items]
        longest = max(lengths)
        ids = torch.tensor([[*item.prompt, *[0] * (longest - len(item.prompt))] for item in items], device=device)
        self.statistics.prompt_tokens += sum(lengths)
        if items[0].embedding:
            hidden = model(input_ids=ids, use_cache=False, logits_to_keep=1, output_hidden_states=True).hidden_states[
                -1
            ]
            return [states[:length].float().mean(0).cpu() for states, length in zip(hidden, lengths, strict=True)]
        logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0].tolist()
        top = min(items[0].top, logprobs.shape[-1])
        values, tokens = (part.tolist() for part in logprobs.topk(top))
        return [
            Scores(
                [None, *chosen[i][: length - 1]],
                [None, *[list(zip(tokens[i][t], values[i][t], strict=True)) for t in range(length - 1)]],
            )
            for i, length in enumerate(lengths)
        ]

    def _drop(self, keys: list[int]) -> None:
        for key in keys:
            self.decoder.cancel(key)
            del self._running[key]
        self.statistics.cancelled += len(keys)

    def _give_up(self, error: EngineError, extra: Iterable = (), everything: bool = False) -> None:
        """Tell all that run (and `extra`, and with `everything` all that wait) that it was for nothing."""
        owners = {item.owner for item in (*self._running.values(), *extra)}
        self._running.clear()
        if everything:
            with self._wakeup:
                self._closing = True
                owners |= {item.owner for item in (*self._waiting, *self._readings)}
                self._waiting.clear()
                self._readings.clear()
        self._tell(dict.fromkeys(owners, error))

    def _tell(self, news: dict) -> None:
        """Bring news to their owners: one call into the event loop, however many there are."""
        if news:
            try:
                self.loop.call_soon_threadsafe(_deliver, news)
            except RuntimeError:  # the loop is closed: nobody listens any more
                log.debug("the event loop has ended")


def _take(queue: deque, limit: int, alike: Callable = lambda item: None) -> list:
    """Remove the next items that can be read together: at most `limit`, `alike`, and not too long."""
    taken: list = []
    longest = 0
    while queue and len(taken) < limit and (not taken or alike(queue[0]) == alike(taken[0])):
        longest = max(longest, len(queue[0].prompt))
        if taken and longest * (len(taken) + 1) > PROMPT_TOKENS:
            break
        taken.append(queue.popleft())
    return taken


def _deliver(news: dict) -> None:
    for owner, what in news.items():
        owner._receive(what)
