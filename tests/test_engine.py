"""serving/engine.py: rows join and leave, nobody waits for a reader, failures are told."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from decoding import generate_ids
from serving_helpers import TOKENIZER, tiny_model

from inference.generator import BatchGenerator
from inference.options import SamplingParams
from serving import engine as engine_module
from serving.engine import Engine, EngineFailed, QueueFull, ShuttingDown, Stream

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
            await anext(stream)
            assert engine.running == 2 and engine.waiting == 4
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
    engine = make(generator=type("Once", (Failing,), {}))

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
    assert "out of memory" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_ends_the_engine_and_everyone_is_told():
    engine = make(rows=1, generator=type("Bug", (Failing,), {"error": KeyError}))

    async def scenario():
        streams = [engine.submit([p], [SamplingParams(max_new_tokens=50)]) for p in PROMPTS[:3]]
        for found in await asyncio.gather(*map(ids_of, streams), return_exceptions=True):
            assert isinstance(found, EngineFailed)
        assert engine.failed
        with pytest.raises(EngineFailed, match="restart"):
            engine.submit([PROMPTS[0]], [SamplingParams()])

    run(scenario, engine)


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


def test_long_prompts_are_read_in_portions(monkeypatch):
    class MultipleChoice:
        def __init__(self, length: int, kind: int = 0) -> None:
            self.prompt, self.kind = [5] * length, kind

    monkeypatch.setattr(engine_module, "PROMPT_TOKENS", 100)

    def portions(lengths, limit=10):
        queue = deque(MultipleChoice(n) for n in lengths)
        found = []
        while queue:
            found.append([len(item.prompt) for item in engine_module._next_batch(queue, limit)])
        return found

    assert portions([10] * 12) == [[10] * 10, [10] * 2]
    assert portions([10, 60, 10]) == [[10], [60], [10]]  # padded to 60 they would be 120
    assert portions([500, 1]) == [[500], [1]]
    assert portions([1, 1, 1], limit=2) == [[1, 1], [1]]
    mixed = deque([MultipleChoice(1), MultipleChoice(1, kind=1), MultipleChoice(1)])
    assert len(engine_module._next_batch(mixed, 9, group=lambda item: item.kind)) == 1


def test_a_decoder_that_cannot_be_made_is_an_error_at_once():
    with pytest.raises(ValueError, match="at least 1 row"):
        make(rows=0)
    with pytest.raises(ValueError, match="--max_queue"):
        make(max_queue=0)
