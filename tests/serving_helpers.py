"""A server on a tiny random model for the tests of serving/: in a thread, on a free port."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from inference.detokenizer import Detokenizer
from inference.generator import BatchGenerator, TokenOutput
from inference.options import SamplingParams
from inference.vision import ImageProcessor
from model.chat_format import render_chat
from model.chat_style import chat_style
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer
from model.vision import VisionLanguageModel
from serving.app import create_app
from serving.chat import ChatEndpoint
from serving.endpoint import ServedModel
from serving.engine import Engine
from serving.images import ImageReader
from serving.server import Server

TOKENIZER = load_tokenizer()
NAME = "tiny"
CONTEXT = 1500
IMAGE_IDS = [TOKENIZER.convert_tokens_to_ids("<image>")] * 4


def tiny_model(sees: bool = False) -> Transformer:
    torch.manual_seed(5)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=CONTEXT)
    vision = dict(encoder="vit", image_size=16, patch_size=8, width=16, n_layers=1, n_heads=2, image_ids=IMAGE_IDS)
    config = LMConfig(**shape, initializer_range=0.3, vision_config=vision if sees else None)
    return (VisionLanguageModel if sees else Transformer)(
        config
    ).eval()  # with this range of weights its answers are varied


def without_tags() -> PreTrainedTokenizerFast:
    """The same vocabulary without control tokens, as the published one."""
    content = json.loads(TOKENIZER.backend_tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(content))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TOKENIZER.chat_template, **names)


def png(seed: int, size: int = 16) -> bytes:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


QUESTION = [{"role": "user", "content": "What is 3 * (4 + 5)?"}]
SUM = {"name": "calculator", "arguments": {"expression": "3 * (4 + 5)"}}


def answer_ids(**fields) -> list[int]:
    """The ids of an answer with these fields, up to </s>."""
    ids, loss_mask = render_chat(TOKENIZER, [*QUESTION, {"role": "assistant", "content": "", **fields}])
    return [token for token, learned in zip(ids, loss_mask, strict=True) if learned]


def scripted_outputs(ids: list[int]) -> Iterator[TokenOutput]:
    """What a generator yields for an answer of these ids, the last of which is </s>."""
    detokenizer = Detokenizer(TOKENIZER)
    for i, token in enumerate(ids):
        yield TokenOutput(0, token, detokenizer.add(token), "stop" if i == len(ids) - 1 else None)


class GivenAnswers(BatchGenerator):
    """Writes answers that a subclass knows."""

    def answer_to(self, row) -> list[int]:
        """The ids of the answer to a row's prompt, up to </s>."""
        raise NotImplementedError

    def _sample(self, logits, first):
        logits = logits.clone()
        for i, row in enumerate(self.rows[first:]):
            logits[i, self.answer_to(row)[row.num_generated]] += 1e4
        return super()._sample(logits, first)


class Scripted(GivenAnswers):
    """Writes `script` after a question, and `answer` after what a tool returned."""

    script: ClassVar[list[int]] = []
    answer: ClassVar[str] = "It is 27。"

    def answer_to(self, row) -> list[int]:
        returned = chat_style(TOKENIZER).tags["<tool_response>"][0] in row.tokens
        return answer_ids(content=self.answer) if returned and self.answer else self.script


@dataclasses.dataclass
class Running:
    """A server that runs, and how to talk to it without a client library."""

    model: Transformer
    engine: Engine
    chat_endpoint: ChatEndpoint
    port: int
    server_thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def call(self, method: str, path: str, body: bytes | dict | None = None, **headers: str):
        """(status, headers, bytes) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {"Content-Type": "application/json"} if content is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, content, sent)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def post(self, path: str, **fields):
        """(status, object) of a request with a JSON body."""
        status, _, body = self.call("POST", path, {"model": NAME, **fields})
        return status, json.loads(body)

    def chat(self, content: str = "hi", **fields):
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **fields)

    def open(self, path: str, buffer: int | None = None, **fields) -> socket.socket:
        """A socket (with a receive buffer of so many bytes) on which a request has been sent, and nothing was read."""
        body = json.dumps({"model": NAME, **fields}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        sock = socket.socket()
        sock.settimeout(60)
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect(("127.0.0.1", self.port))
        sock.sendall(head.encode() + body)
        return sock

    def metric(self, name: str) -> float:
        text = self.call("GET", "/metrics")[2].decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])

    def until(self, name: str, value: float) -> None:
        """Wait for a metric to have a value."""
        end = time.monotonic() + 300
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} stays {found}"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    *,
    rows: int = 8,
    max_queue: int = 200,
    defaults: SamplingParams | None = None,
    generator=BatchGenerator,
    drain: float = 0,
    keep_alive: int = 60,
    sees: bool = False,
    allow_urls: bool = False,
    tokenizer=TOKENIZER,
    **settings,
) -> Iterator[Running]:
    """A running server; it is shut down in the end."""
    model = tiny_model(sees)
    engine = Engine(lambda: generator(model, rows, tokenizer=tokenizer), max_queue, prefix_bytes=10**6)
    reader = ImageReader(ImageProcessor(model, None), allow_urls) if sees else None
    served = ServedModel(NAME, tokenizer, model.config.dim, model.config.vocab_size, "abc", images=reader)
    defaults = defaults or SamplingParams(max_new_tokens=CONTEXT)
    app = create_app(engine, served, defaults, **settings)
    server = Server(app, engine, drain, port=0, log_level="warning", timeout_keep_alive=keep_alive)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(model, engine, ChatEndpoint(engine, served, defaults), port, thread)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
