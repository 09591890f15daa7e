"""serving/engine.py: rows join and leave, nobody waits for a reader, failures are told."""

from __future__ import annotations

import asyncio
import weakref

import pytest
import torch
from decoding import generate_ids
from serving_helpers import TOKENIZER, tiny_model
from tolerances import assert_logits_close

from inference.chunked_prefill import ChunkedPrefill
from inference.generator import BatchGenerator
from inference.options import SamplingParams
from serving import engine as engine_module
from serving.engine import Engine
from serving.stream import EngineFailed, EngineStopped, QueueFull, ShuttingDown, Stream, TooSlow

MODEL = tiny_model()
PROMPTS = [[1, 10 + i, *range(20, 20 + i % 5)] for i in range(20)]


def make(rows: int = 4, max_queue: int = 100, generator=BatchGenerator) -> Engine:
    return Engine(lambda: generator(MODEL, rows, tokenizer=TOKENIZER), max_queue)


async def ids_of(stream: Stream) -> list[list[int]]:
    answers: dict[int, list[int]] = {}
    async with stream:
        async for events in stream:
            for index, event in events:
                answers.setdefault(index, []).append(event.token)
    return [answers[i] for i in sorted(answers)]


def run(scenario, engine: Engine) -> None:
    async def main():
        engine.start()
        try:
            await asyncio.wait_for(scenario(), 120)
        finally:
            await engine.close()

    asyncio.run(main())
    assert not engine._thread.is_alive()


def test_answers_are_those_of_the_model_alone_and_wake_the_loop_once_a_step():
    engine = make()
    samplings = [SamplingParams(max_new_tokens=3 + i) for i in range(20)]

    async def scenario():
        calls = 0
        original = engine.loop.call_soon_threadsafe

        def counted(function, *args):
            nonlocal calls
            calls += function is engine_module._deliver
            return original(function, *args)

        engine.loop.call_soon_threadsafe = counted
        streams = [engine.submit([p], [s]) for p, s in zip(PROMPTS, samplings, strict=True)]
        answers = await asyncio.gather(*map(ids_of, streams))
        expected = [generate_ids(MODEL, [p], s, eos_id=None)[0] for p, s in zip(PROMPTS, samplings, strict=True)]
        assert [answer[0] for answer in answers] == expected
        assert engine.statistics.generated_tokens == sum(map(len, expected))
        assert calls <= engine.statistics.steps + len(PROMPTS) < sum(map(len, expected))  # not one for every token
        assert engine.running == engine.waiting == 0

    run(scenario, engine)


def test_an_unread_stream_keeps_its_answer_and_nothing_else():
    engine = make(rows=1)

    async def scenario():
        unread = engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=50)])
        other = await ids_of(engine.submit([PROMPTS[1]], [SamplingParams(max_new_tokens=5)]))  # needs the only row
        assert len(other[0]) == 5 and unread.unfinished == 0
        assert len(await anext(unread)) == 50

    run(scenario, engine)


def test_leaving_a_stream_frees_its_rows_and_its_places_in_the_queue():
    engine = make(rows=2)

    async def scenario():
        forever = SamplingParams(max_new_tokens=1400)
        async with engine.submit(PROMPTS[:6], [forever] * 6) as stream:
            while engine.running < 2:
                await anext(stream)
            assert engine.waiting == 4
        with pytest.raises(ShuttingDown, match="cancelled"):
            while True:
                await anext(stream)
        assert len((await ids_of(engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=2)])))[0]) == 2
        assert engine.running == engine.waiting == 0 and engine.statistics.cancelled == 2
        reading = asyncio.ensure_future(engine.score([[1, 2, 3]]))
        await asyncio.sleep(0)
        reading.cancel()
        assert (await engine.score([[1, 2, 3]]))[0].logprobs[0] is None

    run(scenario, engine)


def test_the_queue_is_bounded():
    engine = make(rows=1, max_queue=2)

    async def scenario():
        with pytest.raises(QueueFull):
            engine.submit(PROMPTS[:4], [SamplingParams()] * 4)
        streams = [engine.submit([p], [SamplingParams(max_new_tokens=1400)]) for p in PROMPTS[:1]]
        await anext(streams[0])
        streams += [engine.submit([p], [SamplingParams(max_new_tokens=1)]) for p in PROMPTS[:2]]
        with pytest.raises(QueueFull, match="1 sequences are running and 2 are waiting") as caught:
            engine.submit([PROMPTS[0]], [SamplingParams()])
        assert 1 <= caught.value.retry_after <= 60
        with pytest.raises(QueueFull):
            await engine.embed([[1]])
        with pytest.raises(ValueError, match="the prompt is empty"):
            engine.submit([[]], [SamplingParams()])
        for stream in streams:
            stream.cancel()

    run(scenario, engine)


class Failing(BatchGenerator):
    """Fails at its fifth step, as a device that is out of memory."""

    error: type[Exception] = RuntimeError
    steps = 0

    def step(self):
        type(self).steps += 1
        if type(self).steps == 5:
            raise self.error("out of memory")
        return super().step()


def test_a_failed_step_costs_its_requests_and_no_others(caplog):
    memory: list[weakref.ref] = []

    class Once(Failing):
        def __init__(self, *args, **kwargs):
            assert not memory or memory[0]() is None  # what the failed one had is free for the next one
            super().__init__(*args, **kwargs)
            memory.append(weakref.ref(self._cache))

    engine = make(generator=Once)

    async def scenario():
        done = engine.submit([PROMPTS[1]], [SamplingParams(max_new_tokens=2)])
        with pytest.raises(EngineFailed, match="server's log"):
            await ids_of(engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=50)]))
        assert len((await ids_of(done))[0]) == 2  # finished before
        while engine.generator is None:  # it restarts; until then it refuses requests
            await asyncio.sleep(0.01)
        assert len((await ids_of(engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=9)])))[0]) == 9
        assert engine.statistics.failures == 1 and not engine.failed

    run(scenario, engine)
    assert "out of memory" in caplog.text and len(memory) == 2


@pytest.mark.parametrize("reason", ["a bug", "no memory for another generator"])
def test_an_engine_that_cannot_continue_ends_and_everyone_is_told(caplog, reason):
    class Broken(Failing):
        made = 0
        error = KeyError if reason == "a bug" else RuntimeError

        def __init__(self, *args, **kwargs):
            type(self).made += 1
            if type(self).made == 2:
                raise RuntimeError("still out of memory")
            super().__init__(*args, **kwargs)

    engine = make(rows=1, generator=Broken)

    async def scenario():
        streams = [engine.submit([p], [SamplingParams(max_new_tokens=50)]) for p in PROMPTS[:3]]
        embedding = asyncio.ensure_future(engine.embed([[5] * 1000] * 99))
        for found in await asyncio.gather(*map(ids_of, streams), embedding, return_exceptions=True):
            assert isinstance(found, EngineFailed) and "failed" in str(found)
        await asyncio.to_thread(engine._thread.join)
        assert engine.failed
        with pytest.raises(EngineStopped, match="failed"):
            engine.submit([PROMPTS[0]], [SamplingParams()])
        with pytest.raises(EngineStopped, match="failed"):
            await engine.score([[1]])

    run(scenario, engine)
    assert ("KeyError" if reason == "a bug" else "still out of memory") in caplog.text


def test_what_cannot_be_read_costs_only_its_request(monkeypatch, caplog):
    read, prefill_batch, poison = ChunkedPrefill.prefill, ChunkedPrefill.prefill_batch, 99

    def failing(self, n, logits_to_keep=0):
        if poison in self.tokens:
            raise RuntimeError("out of memory")
        return read(self, n, logits_to_keep)

    def failing_together(self, texts, logits):
        if any(poison in text for text in texts):
            raise RuntimeError("out of memory")
        return prefill_batch(self, texts, logits)

    monkeypatch.setattr(ChunkedPrefill, "prefill", failing)
    monkeypatch.setattr(ChunkedPrefill, "prefill_batch", failing_together)
    engine = make(max_queue=1)

    async def scenario():
        sampling = SamplingParams(max_new_tokens=1400)
        chat = engine.submit(PROMPTS[:2], [sampling] * 2)
        outputs = await anext(chat)
        for start in (
            lambda: engine.embed([[5] * 40, [poison] * 40, [6] * 40]),
            lambda: engine.embed([[5], [poison], [6]]),
            lambda: engine.score([[poison] * 40]),
            lambda: ids_of(engine.submit([PROMPTS[2], [poison]], [sampling] * 2)),
        ):
            with pytest.raises(EngineFailed, match="server's log"):
                await start()
        assert len(await engine.embed([[5] * 40])) == 1
        outputs += await anext(chat)
        assert engine.running == chat.unfinished == 2 and engine.waiting == engine.statistics.failures == 0
        for index in (0, 1):
            found = [output.token for i, output in outputs if i == index]
            alone = generate_ids(MODEL, [PROMPTS[index]], SamplingParams(max_new_tokens=len(found)), eos_id=None)
            assert [found] == alone
        chat.cancel()

    run(scenario, engine)
    assert caplog.text.count("RuntimeError: out of memory") == 4


def test_closing_finishes_what_runs_and_refuses_what_waits():
    engine = make(rows=1)

    async def scenario():
        running = engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=30)])
        await anext(running)
        waiting = engine.submit([PROMPTS[1]], [SamplingParams(max_new_tokens=30)])
        engine.start_draining()
        with pytest.raises(ShuttingDown):
            engine.submit([PROMPTS[0]], [SamplingParams()])
        with pytest.raises(ShuttingDown):
            await ids_of(waiting)
        await engine.close(drain_seconds=60)
        assert running.unfinished == 0

    run(scenario, engine)


def test_closing_at_once_tells_those_that_run():
    engine = make(rows=1)

    async def scenario():
        running = engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=1400)])
        await anext(running)
        await engine.close()
        with pytest.raises(ShuttingDown):
            await ids_of(running)

    run(scenario, engine)


# ---- fairness


@pytest.fixture
def tokens_read(monkeypatch) -> list[tuple[int, int, int]]:
    """What the engine does, in order: (0, number of running answers, 0) is a step, (1, tokens, their kind) a reading."""
    done: list[tuple[int, int, int]] = []
    step, read, prefill_batch = BatchGenerator.step, ChunkedPrefill.prefill, ChunkedPrefill.prefill_batch

    def counted_step(self):
        done.append((0, len(self.rows), 0))
        return step(self)

    def counted_read(self, n, logits_to_keep=0):
        done.append((1, n, self.tokens[0]))
        return read(self, n, logits_to_keep)

    def counted_together(self, texts, logits):
        done.append((1, sum(map(len, texts)), texts[0][0]))
        return prefill_batch(self, texts, logits)

    monkeypatch.setattr(BatchGenerator, "step", counted_step)
    monkeypatch.setattr(ChunkedPrefill, "prefill", counted_read)
    monkeypatch.setattr(ChunkedPrefill, "prefill_batch", counted_together)
    return done


def test_readings_share_the_steps_of_running_answers(tokens_read):
    """While an answer runs, at most `prefill_tokens` are read between two steps, half of them of prompts if texts wait."""
    engine = Engine(lambda: BatchGenerator(MODEL, 4, tokenizer=TOKENIZER), 100, prefill_tokens=8)
    prompt, text, short = [11] * 60, [12] * 70, [13] * 3

    async def scenario():
        chat = engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=200)])
        while engine.statistics.steps < 2:
            await anext(chat)
        many = asyncio.ensure_future(engine.embed([text] * 4))
        scores = asyncio.ensure_future(engine.score([text, short]))
        other = engine.submit([prompt], [SamplingParams(max_new_tokens=1)])
        await asyncio.gather(many, scores, ids_of(other))
        assert not many.cancelled() and chat.unfinished  # it ran all the time
        chat.cancel()

    run(scenario, engine)
    steps = [i for i, (kind, rows, _) in enumerate(tokens_read) if kind == 0 and rows]
    between = [tokens_read[a + 1 : b] for a, b in zip(steps, steps[1:], strict=False)]
    read = [sum(n for _, n, _ in part) for part in between]
    assert max(read) == 8 and sum(read) == len(prompt) + 5 * len(text) + len(short)
    both = [part for part in between if len({kind for _, _, kind in part}) == 2]
    assert both and all(max(n for _, n, _ in part) <= 4 for part in both)


def test_requests_with_texts_take_turns():
    engine = make(max_queue=2)

    async def scenario():
        finished = []
        many = asyncio.ensure_future(engine.embed([[7] * 300] * 20))
        many.add_done_callback(lambda _: finished.append("many"))
        await asyncio.sleep(0)
        await engine.embed([[8]])
        finished.append("one")
        await many
        assert finished == ["one", "many"]
        assert len(await engine.embed([[9]] * 2048)) == 2048  # one request, however many texts it has

    run(scenario, engine)


@pytest.mark.parametrize("prefill_tokens", [1, 7, 1000])
def test_parts_add_up(prefill_tokens):
    """Scores and embeddings are those of one pass over the text, however it was read, alone or beside an answer."""
    engine = Engine(lambda: BatchGenerator(MODEL, 2, tokenizer=TOKENIZER), 9, prefill_tokens=prefill_tokens)
    texts = [[1, *range(20, 20 + n)] for n in (0, 30, 9)]

    async def scenario():
        for beside in (False, True):
            chat = engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=1400)]) if beside else None
            if chat is not None:
                await anext(chat)
            vectors, scores = await asyncio.gather(engine.embed(texts), engine.score(texts, top=2))
            if chat is not None:
                chat.cancel()
            assert scores[0].logprobs == scores[0].top == [None]
            for text, vector, found in list(zip(texts, vectors, scores, strict=True))[1:]:
                with torch.inference_mode():
                    out = MODEL(torch.tensor([text]), output_hidden_states=True)
                assert_logits_close(vector, out.hidden_states[-1][0].mean(0), MODEL.config)
                logprobs = out.logits[0, :-1].log_softmax(-1)
                assert found.logprobs[0] is found.top[0] is None and len(found.top) == len(text)
                expected = logprobs[range(len(text) - 1), text[1:]]
                assert_logits_close(torch.tensor(found.logprobs[1:]), expected, MODEL.config)
                best = torch.tensor([[value for _, value in top] for top in found.top[1:]]).view(-1, 2)
                assert_logits_close(best, logprobs.topk(2).values, MODEL.config)

    run(scenario, engine)


def test_answers_of_a_client_that_does_not_read_are_bounded(monkeypatch):
    monkeypatch.setattr("serving.stream.MAX_UNREAD", 50_000)
    engine = make(rows=1)

    async def scenario():
        lazy = engine.submit([PROMPTS[0]], [SamplingParams(max_new_tokens=1400, logprobs=20)])
        await ids_of(engine.submit([PROMPTS[1]], [SamplingParams(max_new_tokens=1)]))  # needs the row
        with pytest.raises(TooSlow):
            while True:
                await anext(lazy)

    run(scenario, engine)


def test_a_decoder_that_cannot_be_made_is_an_error_at_once():
    with pytest.raises(ValueError, match="at least 1 row"):
        make(rows=0)
