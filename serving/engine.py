"""Continuous batching: one thread owns the model, and requests join and leave its running batch at any step.

    engine = Engine(lambda: BatchGenerator(model, 32, tokenizer=tokenizer), max_queue=256)
    engine.start()                                   # in the event loop that will read the answers
    async with engine.submit([ids], [SamplingParams(max_new_tokens=64)]) as stream:
        async for outputs in stream:                 # [(0, TokenOutput), ...]: everything new since the last iteration
            ...
    await engine.close(drain_seconds=30)

**The batch never waits for a reader.** The thread hands the tokens of each step to the event loop in one call and
continues. What a slow client has not read yet stays in its `Stream`, up to a number of bytes; its row of the batch is free
as soon as the answer is complete.

**Reading shares the steps.** Prompts, and texts that are scored or embedded, are read in parts between two steps: at most
`prefill_tokens` while answers are running, so that these pause for a bounded time only. Prompts and texts get half each, and
requests with many texts take turns.

**A failure costs what it must.** A text or prompt that cannot be read costs its own request. A step that fails costs the
running answers, and the engine is built anew; if that fails, `failed` is true and every request is an EngineStopped.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inference.chunked_prefill import ChunkedPrefill
from inference.generator import BatchGenerator, Images, TokenOutput
from inference.kv_cache import PrefixCache
from inference.options import SamplingParams
from serving.scoring import Scores, TextRequest, TextState
from serving.stream import EngineError, EngineFailed, EngineStopped, QueueFull, ShuttingDown, Stream

PREFILL_TOKENS = {"cpu": 8, "gpu": 256}  # defaults: reading takes about as long as a step
IDLE_TOKENS = {"cpu": 128, "gpu": 2048}  # read at a time while no answer is running; a new request waits that long
# A token attends to all those before it: behind this many it counts twice, behind twice as many three times.
DOUBLE_COST_AT = 512
MAX_TOGETHER = 64  # texts that are read in one pass

SHUTTING_DOWN = "the server is shutting down"
STOPPED = "the engine failed and the server is shutting down: its log says why"
COMPUTATION_FAILED = "the computation failed: see the server's log"

log = logging.getLogger("minimind")


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
    images: Images | None = None
    joined: float = 0.0
    latest: float = 0.0  # when its last token came


@dataclass
class Statistics:
    """Totals since the start; written by the thread alone."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that the prefix cache had
    generated_tokens: int = 0
    steps: int = 0
    cancelled: int = 0
    failures: int = 0
    mean_seconds: float = 0.0  # moving average of how long a sequence runs
    # Called with how long a sequence waited until its prompt was read, for its first token, and for each of the others.
    on_joined: Callable[[float], None] = field(default=lambda seconds: None)
    on_first_token: Callable[[float], None] = field(default=lambda seconds: None)
    on_next_token: Callable[[float], None] = field(default=lambda seconds: None)


class Engine:
    """Answer many requests with one model. All methods but `close` return at once; call them in the event loop."""

    def __init__(
        self,
        make_generator: Callable[[], BatchGenerator],
        max_queue: int = 256,
        *,
        prefill_tokens: int | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        """
        Args:
            make_generator: called by the thread that will use it (compiled models require that), and again after a
                failure. This constructor raises what it raises.
            max_queue: sequences and requests with texts that may wait while all rows are taken.
            prefill_tokens: tokens of prompts and texts that are read between two steps of running answers, or two for each
                of these if that is more; None: a default for the device.
            prefix_bytes: memory for prompts and answers with which later prompts may begin.
        """
        self._make_generator, self.max_queue = make_generator, max_queue
        self.statistics = Statistics()
        self._wakeup = threading.Condition()
        # Guarded by _wakeup:
        self._waiting: deque[_Sequence] = deque()
        self._texts: deque[TextRequest] = deque()
        self._cancelled: set[Stream] = set()
        self.closing = self._stopping = False
        # The thread's own:
        self._running: dict[int, _Sequence] = {}
        self._joining: _Sequence | None = None  # the one of them whose prompt is being read
        self._text: TextState | None = None  # the one that is being read
        self._next_key = 0
        self.failed = False
        self._prefix_bytes = prefix_bytes
        self.generator: BatchGenerator | None = None
        made: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(made,), name="engine", daemon=True)
        self._thread.start()
        made.result()
        self.rows, self.max_len = self.generator.capacity, self.generator.max_len
        kind = "cpu" if self.generator.device.type == "cpu" else "gpu"
        self.prefill_tokens, self.idle_tokens = prefill_tokens or PREFILL_TOKENS[kind], IDLE_TOKENS[kind]
        self._pass_tokens = PREFILL_TOKENS[kind]  # what a pass costs at least, because it reads all weights

    # -- for the event loop

    def start(self) -> None:
        """Bind the engine to the running event loop, which will submit requests and read the answers. Call it once."""
        self.loop = asyncio.get_running_loop()

    @property
    def running(self) -> int:
        """Return the number of sequences in the batch."""
        return len(self._running)

    @property
    def prefix_bytes(self) -> int:
        """Return the size of the prefix cache."""
        generator = self.generator
        return 0 if generator is None or generator.prefixes is None else generator.prefixes.nbytes

    @property
    def waiting(self) -> int:
        """Return the number of sequences, and of requests with texts, that wait."""
        return len(self._waiting) + len(self._texts)

    def submit(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams], images: Images | None = None
    ) -> Stream[TokenOutput]:
        """Queue sequences that belong together, and each have the same images.

        Raises ValueError for a prompt that cannot be decoded, QueueFull, ShuttingDown, EngineStopped.
        """
        generator = self.generator
        if generator is None:
            self._check_open()
            raise QueueFull("the engine is restarting after an error: try again", retry_after=1)
        for prompt, sampling in zip(prompts, samplings, strict=True):
            generator.check(prompt, sampling, images)
        stream: Stream[TokenOutput] = Stream(
            self._cancel, len(prompts), is_last=lambda output: output.finish is not None
        )
        now = time.perf_counter()
        with self._wakeup:
            self._check_room(len(prompts))
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                self._waiting.append(_Sequence(stream, index, prompt, sampling, self._next_key, now, images))
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
        stream: Stream = Stream(self._cancel, len(texts), is_last=lambda _: True)
        with self._wakeup:
            self._check_room(1)
            self._texts.append(TextRequest(stream, texts, top))
            self._wakeup.notify()
        found: dict[int, Any] = {}
        async with stream:
            async for results in stream:
                found.update(results)
        return [found[i] for i in range(len(texts))]

    def _check_open(self) -> None:
        """Raise if the engine accepts no more requests."""
        if self.failed:
            raise EngineStopped(STOPPED)
        if self.closing:
            raise ShuttingDown(SHUTTING_DOWN)

    def _check_room(self, new: int) -> None:
        """Raise unless `new` more may wait."""
        self._check_open()
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

    def _run(self, made: Future[None]) -> None:
        try:
            self._build()
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(None)
        try:
            while self._step():
                pass
            log.debug("engine ended")
        except BaseException:
            self.failed = True
            log.critical("the engine failed\n%s", traceback.format_exc())
        finally:
            with self._wakeup:
                self.closing = True
                owners = [*self._clear_queues(), *self._clear_running()]
            self._fail(owners, EngineStopped(STOPPED) if self.failed else ShuttingDown(SHUTTING_DOWN))

    def _build(self) -> None:
        self.generator = self._make_generator()
        self.generator.prefixes = PrefixCache(self._prefix_bytes) if self._prefix_bytes else None
        self._prompt_prefill, self._text_prefill = ChunkedPrefill(self.generator), ChunkedPrefill(self.generator)

    def _step(self) -> bool:
        """Let requests leave and join, and compute one token for each sequence. Return False at the end."""
        with self._wakeup:
            while not (self._waiting or self._texts or self._text or self._cancelled or self._running or self.closing):
                self._wakeup.wait()
            cancelled, self._cancelled = self._cancelled, set()
            rejected = self._clear_queues() if self.closing else []
            stopping = self._stopping
        self.statistics.cancelled += self._remove(cancelled)
        self._remove(set(rejected))
        self._fail(rejected, ShuttingDown(SHUTTING_DOWN))
        if stopping or (self.closing and not self._running and self._text is None):
            return False
        failed = False
        try:
            self._compute()
        except Exception:
            log.error("a step failed; its requests are dropped\n%s", traceback.format_exc())
            failed = True
        if failed:  # and the exception is gone, whose traceback holds the generator
            self._rebuild()
        return True

    def _remove(self, owners: set[Stream]) -> int:
        """Forget the sequences and texts of these requests; return how many sequences were running."""
        if not owners:
            return 0
        self._remove_waiting(owners)
        if self._joining is not None and self._joining.owner in owners:
            self._joining = None
        if self._text is not None and self._text.owner in owners:
            self._text = None
        keys = [key for key, item in self._running.items() if item.owner in owners]
        for key in keys:
            self.generator.cancel(key)
            del self._running[key]
        return len(keys)

    def _remove_waiting(self, owners: set[Stream]) -> None:
        with self._wakeup:
            self._waiting = deque(item for item in self._waiting if item.owner not in owners)
            self._texts = deque(item for item in self._texts if item.owner not in owners)

    def _compute(self) -> None:
        """Read prompts and texts, and compute the next tokens."""
        generator = self.generator
        answering = len(generator.rows)
        budget = max(self.prefill_tokens, 2 * answering) if answering else self.idle_tokens
        while budget > 0:
            joining = self._next_prompt(generator)
            # Texts wait for the next token of an answer that has begun in this step.
            reading = len(generator.rows) == answering and self._next_text()
            share = max(budget // 2, 1) if joining and reading else budget
            if joining:
                budget -= self._prefill_prompt(generator, share)
            if reading:
                budget -= self._prefill_texts(share)
            if not (joining or reading):
                break
        self._publish_tokens(generator.step())
        self.statistics.steps += 1

    def _rebuild(self) -> None:
        """Start again with an empty batch, after a failure."""
        self.statistics.failures += 1
        owners = self._clear_running()
        self._remove_waiting(set(owners))
        self._fail(owners, EngineFailed(COMPUTATION_FAILED))
        # The memory must be free before it is allocated again.
        self.generator = None
        del self._prompt_prefill, self._text_prefill
        gc.collect()
        torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()
        self._build()

    def _next_prompt(self, generator: BatchGenerator) -> bool:
        """Return whether there is a prompt to read; begin the next one if none is being read."""
        if self._joining is None and generator.free:
            with self._wakeup:
                item = self._joining = self._waiting.popleft() if self._waiting else None
            if item is not None:
                item.joined = time.perf_counter()
                self._running[item.key] = item
                self.statistics.on_joined(item.joined - item.submitted)
                self.statistics.prompt_tokens += len(item.prompt)
                self.statistics.cached_tokens += self._prompt_prefill.start(
                    item.prompt, shared=True, images=item.images
                )
        return self._joining is not None

    def _prefill_prompt(self, generator: BatchGenerator, limit: int) -> int:
        """Read at most `limit` tokens of the prompt; let its sequence join after the last. Return what they cost."""
        item, chunked = self._joining, self._prompt_prefill
        n, cost = self._chunk(chunked, limit)
        last = n == chunked.left
        try:
            _, logits = chunked.prefill(n, logits_to_keep=int(last))
        except Exception:
            self._prefill_failed(item.owner)
            return cost
        if last:
            self._joining = None
            joined = generator.join(item.prompt, item.sampling, item.key, chunked.cache, logits, item.images)
            self._publish_tokens(joined)
        return cost

    def _next_text(self) -> bool:
        """Return whether there is a text to read; begin the next one if none is being read."""
        if self._text is None:
            with self._wakeup:
                if not self._texts:
                    return False
                request = self._texts.popleft()
                self._text = TextState(request)
                if request.taken < len(request.texts):
                    self._texts.append(request)  # for its next text it waits behind the others
            self._text_prefill.start(self._text.tokens)
        return True

    def _prefill_texts(self, limit: int) -> int:
        """Read at most `limit` tokens of the text, or the next whole texts in one pass. Return what they cost."""
        text, chunked = self._text, self._text_prefill
        together = self._texts_together(text, limit) if chunked.can_batch else [text]
        n, cost = self._chunk(chunked, limit)
        try:
            if len(together) > 1:
                found = chunked.prefill_batch([one.tokens for one in together], logits=text.top is not None)
                n = sum(len(one.tokens) for one in together)
                cost = max(n, self._pass_tokens)
            else:
                found = [chunked.prefill(n, logits_to_keep=0 if text.top is None else n)]
            for one, (hidden, logits) in zip(together, found, strict=True):
                one.add(hidden, logits)
        except Exception:
            self._prefill_failed(text.owner)
            return cost
        self.statistics.prompt_tokens += n
        done = [one for one in together if one.position == len(one.tokens)]
        if done:
            self._text = None
            self._publish(_by_owner((one, one.result) for one in done))
        return cost

    def _texts_together(self, first: TextState, limit: int) -> list[TextState]:
        """Return `first` and the next texts of its request that fit with it into `limit`, padding included."""
        taken, longest = [first], len(first.tokens)
        with self._wakeup:
            request = next((one for one in self._texts if one.owner is first.owner), None)
            while request is not None and first.position == 0 and len(taken) < MAX_TOGETHER:
                longest = max(longest, len(request.texts[request.taken]))
                if longest * (len(taken) + 1) > limit:
                    break
                taken.append(TextState(request))
                if request.taken == len(request.texts):
                    self._texts.remove(request)
                    break
        return taken

    def _chunk(self, chunked: ChunkedPrefill, limit: int) -> tuple[int, int]:
        """Return how many of the next tokens a budget allows, at least one, and how much of it they use."""
        weight = 1 + chunked.position / DOUBLE_COST_AT
        n = min(max(int(limit / weight), 1), chunked.left)
        return n, max(math.ceil(n * weight), self._pass_tokens)

    def _prefill_failed(self, owner: Stream) -> None:
        """Drop a request whose prompt or text cannot be read; the others continue."""
        log.error("a prompt or text could not be read; its request is dropped\n%s", traceback.format_exc())
        self._remove({owner})
        self._fail([owner], EngineFailed(COMPUTATION_FAILED))
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize(self.generator.device)  # if the error broke the GPU's context, the engine has failed

    def _publish_tokens(self, outputs: list[TokenOutput]) -> None:
        """Deliver new tokens; sequences that ended with them no longer run."""
        items, now, statistics = [self._running[output.key] for output in outputs], time.perf_counter(), self.statistics
        for item, output in zip(items, outputs, strict=True):
            if item.latest:
                statistics.on_next_token(now - item.latest)
            else:
                statistics.on_first_token(now - item.submitted)
            item.latest = now
            if output.finish is not None:
                del self._running[output.key]
                seconds, mean = now - item.joined, statistics.mean_seconds
                statistics.mean_seconds = mean + 0.1 * (seconds - mean) if mean else seconds
        statistics.generated_tokens += len(outputs)
        self._publish(_by_owner(zip(items, outputs, strict=True)))

    def _clear_queues(self) -> list[Stream]:
        """Empty the queues and return to whom it belonged. The caller holds `_wakeup`."""
        owners = [item.owner for item in (*self._waiting, *self._texts)]
        self._waiting.clear()
        self._texts.clear()
        return owners

    def _clear_running(self) -> list[Stream]:
        """Forget what runs and return to whom it belonged."""
        owners = [item.owner for item in self._running.values()]
        if self._text is not None:
            owners.append(self._text.owner)
        self._running.clear()
        self._joining = self._text = None
        return owners

    def _fail(self, owners: Iterable[Stream], error: EngineError) -> None:
        self._publish(dict.fromkeys(owners, error))

    def _publish(self, news: dict[Stream, Any]) -> None:
        """Deliver results or errors to their streams: one call into the event loop, however many there are."""
        if news:
            try:
                self.loop.call_soon_threadsafe(_deliver, news)
            except RuntimeError:  # the loop is closed: nothing receives them any more
                log.debug("the event loop has ended")


def _by_owner(results: Iterable[tuple[_Sequence | TextState, Any]]) -> dict[Stream, Any]:
    news: dict[Stream, list[tuple[int, Any]]] = {}
    for item, result in results:
        news.setdefault(item.owner, []).append((item.index, result))
    return news


def _deliver(news: dict[Stream, Any]) -> None:
    for owner, results in news.items():
        owner.receive(results)
