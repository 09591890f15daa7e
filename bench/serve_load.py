"""Measure my_openai_api.py under load: many streaming clients at once, compared with a single one.

    python bench/serve_load.py --weights out/full_sft_512.pth

one client    one streaming request after the other
all clients   --clients of them at the same time, for --seconds; every answer is compared with the greedy answer that the
              model gives alone, without a server
killed        the same clients close their connections at random moments; measures how soon all rows are free afterwards

Then, on another server with a longer context: a chat alone, while another client has texts embedded or scored, and with idle
connections and clients that do not read; and the time to the first text behind a system message that is new, or that the
prefix cache has.

The server is a process of its own, in float32, and so are the clients, which share the machine with it. Without --weights,
minimind-v1-small has random weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.stages import running_server  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import run_script  # noqa: E402
from inference.detokenizer import Detokenizer  # noqa: E402
from inference.generator import generate  # noqa: E402
from inference.options import SamplingParams  # noqa: E402
from model.chat_format import render_chat  # noqa: E402
from model.LMConfig import preset  # noqa: E402
from model.model import Transformer  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402
from model.weights import load_checkpoint  # noqa: E402
from model.weights_file import save_checkpoint  # noqa: E402

QUESTIONS = [
    "你好",
    "请介绍一下你自己。",
    "中国的首都是哪里？它有多少年的历史？请详细说明。",
    "Who are you?",
    "Tell me a story about a cat and a dog who become friends, and what they learn on the way.",
    "写一首关于春天的诗",
    "12 加 7 等于多少？",
    "水为什么会结冰？请用简单的话解释给小学生听，并举两个生活中的例子。",
]


@dataclass
class Result:
    """The result of one phase."""

    seconds: float = 0.0
    tokens: int = 0
    answers: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: int = 0  # answers that differ from the one computed alone
    first: list[float] = field(default_factory=list)  # seconds to the first text
    gaps: list[float] = field(default_factory=list)  # seconds between two pieces of text


class Reference:
    """Return the greedy answers, computed one sequence at a time, without a server."""

    def __init__(self, model: Transformer, tokenizer, length: int) -> None:
        self.tokenizer = tokenizer
        self.answers = []
        for question in QUESTIONS:
            ids = render_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)[0]
            self.answers.append(
                list(generate(model, [ids], SamplingParams(max_new_tokens=length), tokenizer=tokenizer))
            )

    def text(self, question: int, limit: int) -> tuple[str, int, str]:
        """Return (text, tokens, finish_reason) of an answer of at most `limit` tokens."""
        events = self.answers[question][:limit]
        if events[-1].finish is not None:
            return "".join(event.text for event in events), len(events), events[-1].finish
        stream = Detokenizer(self.tokenizer)
        return "".join(stream.add(event.token) for event in events) + stream.finish(complete=False), limit, "length"


class Load:
    """Clients on plain sockets, which need little CPU time: they share the machine with the server."""

    def __init__(self, port: int, model: str, reference: Reference, length: int) -> None:
        self.port, self.model, self.reference, self.length = port, model, reference, length

    async def post(self, path: str, fields: dict, abort: bool = False) -> AsyncIterator[bytes]:
        """Send a request; yield its answer as it comes. `abort`: close the connection so if the caller stops early.

        Raises OSError for another status than 200.
        """
        body = json.dumps({"model": self.model, **fields}).encode()
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.encode() + body)
            status = await reader.readline()
            while await reader.readline() != b"\r\n":
                pass
            if b" 200 " not in status:
                raise OSError(status.decode().strip())
            while part := await reader.read(2**16):
                yield part
        finally:
            if abort:
                writer.transport.abort()
            writer.close()

    async def chat(self, messages: list[dict], limit: int, abort: bool = False) -> AsyncIterator[dict]:
        """Yield the chunks of a greedy answer; ValueError if it does not end as it should."""
        fields = {"messages": messages, "max_tokens": limit, "temperature": 0, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        received = b""
        async with contextlib.aclosing(self.post("chat/completions", fields, abort)) as parts:
            async for part in parts:
                *lines, received = (received + part).split(b"\n")
                for line in lines:  # those between are the sizes of HTTP's chunks
                    if line == b"data: [DONE]":
                        return
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])
        raise ValueError("the stream ended early")

    async def ask(self, rng: random.Random, result: Result, kill: bool = False) -> None:
        """Send one request and compare its answer, or, with `kill`, disconnect somewhere in the middle."""
        question, limit = rng.randrange(len(QUESTIONS)), rng.randint(self.length // 2, self.length)
        leave = rng.randint(1, limit - 1) if kill else None
        text, finish, usage, pieces = "", None, {}, 0
        latest = started = time.perf_counter()
        messages = [{"role": "user", "content": QUESTIONS[question]}]
        try:
            async with contextlib.aclosing(self.chat(messages, limit, abort=kill)) as chunks:
                async for chunk in chunks:
                    if "error" in chunk:
                        raise ValueError(chunk["error"]["message"])
                    usage = chunk["usage"] or usage
                    for choice in chunk["choices"]:
                        new, now = choice["delta"].get("content", ""), time.perf_counter()
                        if new:
                            (result.gaps if text else result.first).append(now - (latest if text else started))
                            latest = now
                        text += new
                        pieces += 1
                        finish = choice["finish_reason"] or finish
                    if leave is not None and pieces > leave:
                        return
        except (OSError, ValueError) as error:
            result.errors.append(repr(error))
            return
        expected = self.reference.text(question, limit)
        if (text, usage["completion_tokens"], finish) != expected:
            result.wrong += 1
            print(f"differs: {(text, usage, finish)} instead of {expected}", file=sys.stderr)
        result.tokens += usage["completion_tokens"]
        result.answers += 1

    async def run(self, clients: int, seconds: float, kill: bool = False) -> Result:
        """Ask one question after the other until the time is over, then wait for the last answers."""
        result, started = Result(), time.perf_counter()

        async def client(seed: int) -> None:
            rng = random.Random(seed)
            while time.perf_counter() - started < seconds:
                await self.ask(rng, result, kill)

        await asyncio.gather(*(client(seed) for seed in range(clients)))
        result.seconds = time.perf_counter() - started
        return result


def metric(port: int, name: str) -> float:
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return float(re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)[1])


async def watch_memory(process: psutil.Process, every: float = 1.0) -> list[float]:
    """Sample the resident memory in MB, until cancelled."""
    samples = []
    try:
        while True:
            samples.append(process.memory_info().rss / 1e6)
            await asyncio.sleep(every)
    except asyncio.CancelledError:
        return samples


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """Return the median and the 95% quantile."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)]


def line(name: str, result: Result, single: float | None) -> str:
    rate = result.tokens / result.seconds
    ratio = f"{rate / single:.2f}" if single else "1"
    typical, late = quantiles(result.first)
    return (
        f"| {name} | {result.answers} | {result.tokens} | {rate:.0f} | {ratio} | {typical:.2f} s | {late:.2f} s | "
        f"{len(result.errors)} | {result.wrong} |"
    )


async def measure(port: int, model: str, reference: Reference, server: psutil.Process, args) -> None:
    load = Load(port, model, reference, args.length)
    await load.run(args.clients, 0.1)  # warm up: memory, kernels
    print("| clients | answers | tokens | tokens/s | ratio | first text, median | 95% | errors | different |")
    print("|---|---|---|---|---|---|---|---|---|")
    one = await load.run(1, args.seconds / 4)
    single = one.tokens / one.seconds
    print(line("1", one, None), flush=True)
    watch = asyncio.ensure_future(watch_memory(server))
    many = await load.run(args.clients, args.seconds)
    watch.cancel()
    samples = await watch
    print(line(str(args.clients), many, single), flush=True)
    third = len(samples) // 3
    print(f"\nmemory of the server: {samples[third]:.0f} MB after a third of the time, {samples[-1]:.0f} MB at the end")
    killed = await load.run(args.clients, args.seconds / 4, kill=True)
    waited = time.perf_counter()
    while (running := metric(port, "minimind_rows_running")) and time.perf_counter() - waited < 10:
        pass
    waited = time.perf_counter() - waited
    cancelled = metric(port, "minimind_cancelled_total")
    print(
        f"killed at random for {args.seconds / 4:.0f} s: {cancelled:.0f} answers cancelled, {len(killed.errors)} errors; "
        f"{1000 * waited:.0f} ms after the last one {running:.0f} rows were in use"
    )
    for problem in (one.errors + many.errors + killed.errors)[:5]:
        print(f"error: {problem}", file=sys.stderr)


async def measure_readings(port: int, model: str, reference: Reference, args) -> None:
    """One chat, alone and while another client has texts read; then system messages that are new and that are known."""
    load = Load(port, model, reference, args.length)

    async def read_texts(path: str, fields: dict) -> None:
        while True:
            async for _ in load.post(path, fields):
                pass

    async def embed_and_hold(*request) -> None:
        """Embed, beside 500 connections without a request and 8 clients that do not read their answers."""
        waiting = [asyncio.open_connection("127.0.0.1", port) for _ in range(500)]
        idle = [writer for _, writer in await asyncio.gather(*waiting)]
        wordy = {
            "messages": [{"role": "user", "content": "?"}],
            "max_tokens": 400,
            "logprobs": True,
            "top_logprobs": 20,
        }
        stalled = [load.post("chat/completions", wordy | {"stream": True}) for _ in range(8)]
        await asyncio.gather(*map(anext, stalled))
        try:
            await read_texts(*request)
        finally:
            for writer in idle:
                writer.close()
            for answer in stalled:
                await answer.aclose()

    print("\n| a chat | answers | between two texts, median | 95% | ratios | first text, median | tokens read/s |")
    print("|---|---|---|---|---|---|---|")
    embeds = ("embeddings", {"input": [[5 + i % 90] * 500 for i in range(200)]})
    scores = {"prompt": [[5 + i] * 4000 for i in range(4)], "echo": True, "logprobs": 1, "max_tokens": 0}
    alone = None
    for name, start in {
        "alone": None,
        "while another embeds 200 texts of 500 tokens": lambda: read_texts(*embeds),
        "while another scores 4 texts of 4,000 tokens": lambda: read_texts("completions", scores),
        "embeddings, 500 idle connections, 8 clients that do not read": lambda: embed_and_hold(*embeds),
    }.items():
        work = start and asyncio.ensure_future(start())
        await asyncio.sleep(1)
        while metric(port, "minimind_rows_running"):
            await asyncio.sleep(0.1)
        read = metric(port, "minimind_prompt_tokens_total")
        result = await load.run(1, args.seconds / 4)
        read = metric(port, "minimind_prompt_tokens_total") - read
        if work is not None:
            work.cancel()
            await asyncio.wait([work])
        gaps, (first, _) = quantiles(result.gaps), quantiles(result.first)
        alone = alone or gaps
        cells = [name, str(result.answers), *(f"{1000 * gap:.1f} ms" for gap in gaps)]
        cells += [" · ".join(f"{gap / one:.2f}" for gap, one in zip(gaps, alone, strict=True)), f"{first:.3f} s"]
        print("| " + " | ".join([*cells, f"{read / result.seconds:,.0f}"]) + " |", flush=True)
        for problem in result.errors[:5]:
            print(f"error: {problem}", file=sys.stderr)

    print("\n| system message of about 300 tokens | first text, median |\n|---|---|")
    for name in ("new", "as before"):
        times = []
        for i in range(30):
            system = {"role": "system", "content": f"{i if name == 'new' else 'the same'}: " + "你是一个助手。" * 50}
            started = time.perf_counter()
            async with contextlib.aclosing(load.chat([system, {"role": "user", "content": f"{i}?"}], 2)) as chunks:
                async for chunk in chunks:
                    if any(choice["delta"].get("content") for choice in chunk["choices"]):
                        times.append(time.perf_counter() - started)
                        break
        print(f"| {name} | {quantiles(times)[0]:.3f} s |", flush=True)


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", type=Path, help=".pth file (default: random weights of minimind-v1-small)")
    add("--clients", type=int, default=64, help="number of clients at the same time (default: 64)")
    add(
        "--seconds",
        type=float,
        default=60,
        help="duration of the load; the other phases take a quarter each (default: 60)",
    )
    add("--length", type=int, default=96, help="longest answer in tokens; the shortest is half of it (default: 96)")
    add("--server_flags", default="", metavar="FLAGS", help="further flags for my_openai_api.py, as one argument")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if args.weights is None:
            torch.manual_seed(0)
            args.weights = Path(folder) / "full_sft_512.pth"
            save_checkpoint(args.weights, Transformer(preset("minimind-v1-small")), info={})
        tokenizer = load_tokenizer()
        reference = Reference(load_checkpoint(args.weights, dtype=torch.float32).model, tokenizer, args.length)
        flags = ["--weights", args.weights, "--dtype", "float32", "--log_level", "warning"]
        wide, long = ["--max_rows", args.clients], ["--max_rows", 16, "--max_seq_len", 4100]
        with running_server(*flags, *wide, *args.server_flags.split()) as (address, name, process):
            asyncio.run(measure(urlsplit(address).port, name, reference, psutil.Process(process.pid), args))
        with running_server(*flags, *long, *args.server_flags.split()) as (address, name, _):
            asyncio.run(measure_readings(urlsplit(address).port, name, reference, args))


if __name__ == "__main__":
    run_script(main)
