"""Continuous batching: one thread owns the model, and requests join and leave its running batch at any step.

    engine = Engine(lambda: BatchGenerator(model, 32, tokenizer=tokenizer), max_queue=256)
    engine.start()                                   # in the event loop that will read the answers
    async with engine.submit([ids], [SamplingParams(max_new_tokens=64)]) as stream:
        async for outputs in stream:                 # [(0, TokenOutput), ...]: everything new since the last iteration
            ...
    await engine.close(drain_seconds=30)

**The batch never waits for a reader.** The thread hands the tokens of each step to the event loop in one call and
continues. What a slow client has not read yet stays in its `Stream`, which never holds more than the answer
(`max_new_tokens` outputs per sequence); its row of the batch is free as soon as the answer is complete.

**A long prompt does not block the others.** Prompts are read between two steps, at most `PROMPT_TOKENS` at a time, so
that running answers pause for a bounded time only.
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
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from inference.generator import BatchGenerator, TokenOutput
from inference.options import SamplingParams

PROMPT_TOKENS = 2048  # prompt tokens, padding included, that are read between two steps (at least one prompt is read)
MAX_PASS_TEXTS = 64  # texts that are scored or embedded in one forward pass

SHUTTING_DOWN = "the server is shutting down"
STOPPED = "the engine has stopped after an error: restart the server"

log = logging.getLogger("minimind")
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


# ---- what callers hold


class Stream(Generic[T]):
    """The results of one request of one or more items (sequences to continue, texts to read), interleaved as they come.

    Belongs to the event loop. Leave it by `async with`, or call `cancel`: its rows are then free before the next step.
    """

    def __init__(self, engine: Engine, size: int, is_last: Callable[[T], bool]) -> None:
        """
        Args:
            size: items of the request.
            is_last: whether a result is the last of its item.
        """
        self._engine, self._is_last = engine, is_last
        self._results: list[tuple[int, T]] = []
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
        return results

    def cancel(self) -> None:
        """Drop what is not finished."""
        if self.unfinished and self._error is None:
            self._engine._cancel(self)
            self._receive(ShuttingDown("the request was cancelled"))

    def _receive(self, news: list[tuple[int, T]] | EngineError) -> None:
        if isinstance(news, EngineError):
            if self.unfinished:
                self._error = self._error or news
        elif self._error is None:
            self._results += news
            self.unfinished -= sum(self._is_last(result) for _, result in news)
        self._news.set()


@dataclass
class Scores:
    """Log-probabilities of the tokens of a text.

    Position t holds that of token t given those before it, so there is none for the first token.
    """

    logprobs: list[float | None]
    top: list[list[tuple[int, float]] | None]  # the most probable tokens at each position, most probable first


# ---- what waits and what runs


@dataclass(slots=True, eq=False)
class _Sequence:
    """A prompt to continue."""

    owner: Stream[TokenOutput]
    index: int
    prompt: Sequence[int]
    sampling: SamplingParams
    key: int
    submitted: float
    joined: float = 0.0


@dataclass(slots=True, eq=False)
class _Text:
    """A text to read: for its Scores with the `top` most probable tokens, or for its embedding (None)."""

    owner: Stream
    index: int
    prompt: Sequence[int]
    top: int | None


@dataclass
class Statistics:
    """Totals since the start; written by the thread alone."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    cancelled: int = 0
    failures: int = 0
    mean_seconds: float = 0.0  # moving average of how long a sequence runs
    on_joined: Callable[[float], None] = field(default=lambda seconds: None)  # called with how long a sequence waited


class Engine:
    """Answer many requests with one model. All methods but `close` return at once; call them in the event loop."""

    def __init__(self, make_generator: Callable[[], BatchGenerator], max_queue: int = 256) -> None:
        """
        Args:
            make_generator: called by the thread that will use it (compiled models require that), and again after a
                failure. This constructor raises what it raises.
            max_queue: sequences and texts that may wait while all rows are taken.
        """
        if max_queue < 1:
            raise ValueError(f"--max_queue {max_queue} must be at least 1")
        self._make_generator, self.max_queue = make_generator, max_queue
        self.statistics = Statistics()
        self._wakeup = threading.Condition()
        # Guarded by _wakeup:
        self._waiting: deque[_Sequence] = deque()
        self._texts: deque[_Text] = deque()
        self._cancelled: set[Stream] = set()
        self.closing = self._stopping = False
        # The thread's own:
        self._running: dict[int, _Sequence] = {}
        self._next_key = 0
        self.failed = False
        made: Future[BatchGenerator] = Future()
        self._thread = threading.Thread(target=self._run, args=(made,), name="engine", daemon=True)
        self._thread.start()
        self.generator: BatchGenerator | None = made.result()
        self.rows, self.max_len = self.generator.capacity, self.generator.max_len

    # -- for the event loop

    def start(self) -> None:
        """Bind the engine to the running event loop, which will submit requests and read the answers. Call it once."""
        self.loop = asyncio.get_running_loop()

    @property
    def running(self) -> int:
        """Return the number of sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Return the number of sequences and texts that wait."""
        return len(self._waiting) + len(self._texts)

    def submit(self, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams]) -> Stream[TokenOutput]:
        """Queue sequences that belong together.

        Raises ValueError for a prompt that cannot be decoded, QueueFull, ShuttingDown, EngineFailed.
        """
        generator = self.generator
        if generator is None:
            raise QueueFull("the engine is restarting after an error: try again", retry_after=1)
        for prompt, sampling in zip(prompts, samplings, strict=True):
            generator.check(prompt, sampling)
        stream: Stream[TokenOutput] = Stream(self, len(prompts), is_last=lambda output: output.finish is not None)
        now = time.perf_counter()
        with self._wakeup:
            self._check_room(len(prompts))
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                self._waiting.append(_Sequence(stream, index, prompt, sampling, self._next_key, now))
                self._next_key += 1
            self._wakeup.notify()
        return stream

    async def score(self, texts: Sequence[Sequence[int]], top: int = 0) -> list[Scores]:
        """Return the scores of each text, with the `top` most probable tokens at each position. Raises like `submit`."""
        return await self._read_texts(texts, top)

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return (dim,) float32 for each text: the mean of its final hidden states. Raises like `submit`."""
        return await self._read_texts(texts, None)

    async def _read_texts(self, texts: Sequence[Sequence[int]], top: int | None) -> list:
        stream: Stream = Stream(self, len(texts), is_last=lambda _: True)
        with self._wakeup:
            self._check_room(len(texts))
            self._texts += [_Text(stream, i, text, top) for i, text in enumerate(texts)]
            self._wakeup.notify()
        found: dict[int, Any] = {}
        async with stream:
            async for results in stream:
                found.update(results)
        return [found[i] for i in range(len(texts))]

    def _check_room(self, new: int) -> None:
        """Raise unless `new` more may wait."""
        if self.failed:
            raise EngineFailed(STOPPED)
        if self.closing:
            raise ShuttingDown(SHUTTING_DOWN)
        room = self.max_queue + max(self.rows - self.running, 0) - self.waiting
        if new > room:
            seconds = math.ceil(self.statistics.mean_seconds * (new - room) / self.rows)  # until there may be room
            raise QueueFull(
                f"{self.running} sequences are running and {self.waiting} are waiting, of at most {self.rows} and "
                f"{self.max_queue}: try again later",
                retry_after=min(max(seconds, 1), 60),
            )

    def _cancel(self, owner: Stream) -> None:
        with self._wakeup:
            self._cancelled.add(owner)
            self._wakeup.notify()

    def start_draining(self) -> None:
        """Accept nothing new from now on and drop what waits for a row; what runs continues. Any thread may call this."""
        with self._wakeup:
            self.closing = True
            self._wakeup.notify()

    async def close(self, drain_seconds: float = 0.0) -> None:
        """Let what runs finish, for at most `drain_seconds`; drop the rest, and end the thread."""
        self.start_draining()
        await asyncio.to_thread(self._thread.join, drain_seconds)
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        await asyncio.to_thread(self._thread.join)  # it finishes its current step, and notifies every stream
        await asyncio.sleep(0)  # those notifications are already scheduled in this loop

    # -- the thread

    def _run(self, made: Future[BatchGenerator]) -> None:
        try:
            made.set_result(self._make_generator())
        except BaseException as error:
            made.set_exception(error)
            return
        try:
            while self._step():
                pass
            log.debug("engine ended")
        except BaseException:
            self.failed = True
            raise
        finally:
            with self._wakeup:
                self.closing = True
                items = [*self._running.values(), *self._clear_queues()]
            self._running.clear()
            self._fail(items, EngineFailed(STOPPED) if self.failed else ShuttingDown(SHUTTING_DOWN))

    def _step(self) -> bool:
        """Let requests leave and join, and compute one token for each sequence. Return False at the end."""
        with self._wakeup:
            while not (self._waiting or self._texts or self._cancelled or self._running or self.closing):
                self._wakeup.wait()
            cancelled, self._cancelled = self._cancelled, set()
            if cancelled:
                self._waiting = deque(item for item in self._waiting if item.owner not in cancelled)
                self._texts = deque(item for item in self._texts if item.owner not in cancelled)
            rejected = self._clear_queues() if self.closing else []
            stopping = self._stopping
        generator = self.generator
        assert generator is not None
        for key in [key for key, item in self._running.items() if item.owner in cancelled]:
            generator.cancel(key)
            del self._running[key]
            self.statistics.cancelled += 1
        self._fail(rejected, ShuttingDown(SHUTTING_DOWN))
        if stopping or (self.closing and not self._running):
            return False
        with self._wakeup:
            joining = _next_batch(self._waiting, generator.free)
            texts = _next_batch(self._texts, MAX_PASS_TEXTS, group=lambda item: item.top)
        try:
            if texts:
                self._publish(_by_owner(zip(texts, self._read(generator, texts), strict=True)))
            if joining:
                self._publish_tokens(self._join(generator, joining))
            self._publish_tokens(generator.step())
            self.statistics.steps += 1
        except RuntimeError:  # from PyTorch: out of memory, a broken device
            log.exception("a step failed; its requests are dropped")
            self.statistics.failures += 1
            failed = [*self._running.values(), *joining, *texts]
            self._running.clear()
            self._fail(failed, EngineFailed("the computation failed: see the server's log"))
            self.generator = generator = None  # its memory must be free before the next one allocates its own
            self.generator = self._make_generator()
        return True

    def _join(self, generator: BatchGenerator, items: list[_Sequence]) -> list[TokenOutput]:
        """Read the prompts of new sequences; return their first tokens."""
        now = time.perf_counter()
        for item in items:
            item.joined = now
            self._running[item.key] = item
            self.statistics.on_joined(now - item.submitted)
            self.statistics.prompt_tokens += len(item.prompt)
        prompts, samplings, keys = zip(*[(item.prompt, item.sampling, item.key) for item in items], strict=True)
        return generator.add(prompts, samplings, keys)

    def _publish_tokens(self, outputs: list[TokenOutput]) -> None:
        """Deliver new tokens; sequences that ended with them no longer run."""
        items = [self._running[output.key] for output in outputs]
        for item, output in zip(items, outputs, strict=True):
            if output.finish is not None:
                del self._running[output.key]
                seconds, mean = time.perf_counter() - item.joined, self.statistics.mean_seconds
                self.statistics.mean_seconds = mean + 0.1 * (seconds - mean) if mean else seconds
        self.statistics.generated_tokens += len(outputs)
        self._publish(_by_owner(zip(items, outputs, strict=True)))

    @torch.inference_mode()
    def _read(self, generator: BatchGenerator, items: list[_Text]) -> list[Scores] | list[Tensor]:
        """Run one forward pass over texts of any lengths, padded on the right, where causal attention never looks."""
        model, device = generator.model, generator.device
        lengths = [len(item.prompt) for item in items]
        longest = max(lengths)
        ids = torch.tensor([[*item.prompt, *[0] * (longest - len(item.prompt))] for item in items], device=device)
        self.statistics.prompt_tokens += sum(lengths)
        if items[0].top is None:
            output = model(input_ids=ids, use_cache=False, logits_to_keep=1, output_hidden_states=True)
            hidden = output.hidden_states[-1]  # (texts, longest, dim)
            return [states[:length].float().mean(0).cpu() for states, length in zip(hidden, lengths, strict=True)]
        logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0].tolist()  # (texts, longest - 1)
        top = min(items[0].top, logprobs.shape[-1])
        values, tokens = (part.tolist() for part in logprobs.topk(top))  # (texts, longest - 1, top)
        return [
            Scores(
                [None, *chosen[i][: length - 1]],
                [None, *[list(zip(tokens[i][t], values[i][t], strict=True)) for t in range(length - 1)]],
            )
            for i, length in enumerate(lengths)
        ]

    def _clear_queues(self) -> list[_Sequence | _Text]:
        """Empty the queues and return what waited in them. The caller holds `_wakeup`."""
        items = [*self._waiting, *self._texts]
        self._waiting.clear()
        self._texts.clear()
        return items

    def _fail(self, items: Iterable[_Sequence | _Text], error: EngineError) -> None:
        self._publish({item.owner: error for item in items})

    def _publish(self, news: dict[Stream, Any]) -> None:
        """Deliver results or errors to their streams: one call into the event loop, however many there are."""
        if news:
            try:
                self.loop.call_soon_threadsafe(_deliver, news)
            except RuntimeError:  # the loop is closed: nothing receives them any more
                log.debug("the event loop has ended")


def _by_owner(results: Iterable[tuple[_Sequence | _Text, Any]]) -> dict[Stream, Any]:
    news: dict[Stream, list[tuple[int, Any]]] = {}
    for item, result in results:
        news.setdefault(item.owner, []).append((item.index, result))
    return news


def _next_batch(queue: deque, limit: int, group: Callable[[Any], object] = lambda item: None) -> list:
    """Remove the next items that can be read in one pass: at most `limit`, of one `group`, and not too long."""
    taken: list = []
    longest = 0
    while queue and len(taken) < limit and (not taken or group(queue[0]) == group(taken[0])):
        longest = max(longest, len(queue[0].prompt))
        if taken and longest * (len(taken) + 1) > PROMPT_TOKENS:
            break
        taken.append(queue.popleft())
    return taken


def _deliver(news: dict[Stream, Any]) -> None:
    for owner, results in news.items():
        owner._receive(results)
