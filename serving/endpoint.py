"""Shared by all endpoints that run the model: checks of a request, prompts, and answers as one object or as chunks.

A new endpoint is one file: a subclass of `Endpoint` that turns its request into prompts and `SamplingParams`, and a
subclass of `ResponseBuilder` that knows the form of its answer. `app.py` gives it a route, `protocol.py` its schemas.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import functools
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from transformers import PreTrainedTokenizerFast

from inference.detokenizer import token_bytes
from inference.generator import Images, TokenOutput
from inference.options import SamplingParams
from model.tokenizer import BOS_ID, encode_texts
from model.vision import count_image_tokens
from serving import protocol
from serving.engine import Engine
from serving.http import ApiError, SSEResponse, add_header, cancel_on_disconnect, json_response, log, to_json
from serving.images import ImageReader
from serving.scoring import Scores
from serving.stream import EngineError, Stream

DONE = b"data: [DONE]\n\n"
LONG_TEXT = 20_000  # characters; longer texts are tokenized in a thread, so that the event loop can serve other clients
MAX_EVENT = 64  # tokens that are sent together
MAX_NAMES = 100  # ignored fields that are named in a response, and in the log

_json_text = json.JSONEncoder(ensure_ascii=False).encode
Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


@dataclass(frozen=True)
class ServedModel:
    """The served model: its public name, its tokenizer, and what identifies its weights."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    dim: int
    vocab_size: int
    fingerprint: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    images: ImageReader | None = None  # for a model that sees

    @functools.cached_property
    def special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Return the tokens that stand for an image; none if the model does not see."""
        return self.images.image_ids if self.images is not None else ()

    def count_images(self, prompt: Sequence[int]) -> int:
        """Return for how many images a prompt has places."""
        return count_image_tokens(prompt, self.image_ids) // len(self.image_ids) if self.image_ids else 0

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for; for a special token its name."""
        return token_bytes(self.tokenizer.backend_tokenizer.id_to_token(token))

    def text_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text: none for a special token."""
        return b"" if token in self.special else self.token_bytes(token)

    def token_name(self, token: int) -> str:
        """Return a token as text, or as `bytes:\\xe4\\xbd` if it is not whole characters. Names are unique."""
        spelled = self.token_bytes(token)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


# ---- answers


@dataclass(slots=True)
class Token:
    """A token with its log-probability (None for the first of a text), the most probable ones, and where its text begins."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]
    offset: int


@dataclass(slots=True)
class Choice:
    """One answer: what has come of it and was not sent yet. `tokens` are kept only for log-probabilities."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    length: int = 0  # characters of all tokens so far; an incomplete one at the end is not counted
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add_token(
        self, model: ServedModel, token: int, logprob: float | None, top: Sequence[tuple[int, float]]
    ) -> None:
        """Take one more token of the answer."""
        self.tokens.append(Token(token, logprob, top, self.length))
        self.length += len(self._utf8.decode(model.text_bytes(token)))

    def echo(self, model: ServedModel, prompt: Sequence[int], scores: Scores | None) -> None:
        """Begin with the text of the prompt."""
        self.text = b"".join(map(model.text_bytes, prompt)).decode("utf-8", "replace")
        if scores is not None:
            for token, logprob, top in zip(prompt, scores.logprobs, scores.top, strict=True):
                self.add_token(model, token, logprob, top or ())
            self.length = len(self.text)
            self._utf8.reset()


class ResponseBuilder:
    """The answer to one request, as chunks or as one object. A subclass knows their form."""

    prefix, object_name, chunk_name = "", "", ""

    def __init__(
        self,
        model: ServedModel,
        choices: list[Choice],
        prompt_tokens: int,
        body: protocol.SamplingRequest,
        top_logprobs: int | None,
    ) -> None:
        """
        Args:
            top_logprobs: most probable tokens to list at each position; None: no log-probabilities at all.
        """
        self.model, self.choices, self.body, self.top_logprobs = model, choices, body, top_logprobs
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.continuous_usage = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.object_name,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"fp_{model.fingerprint}",
        }

    def whole_choice(self, index: int, choice: Choice) -> dict:
        raise NotImplementedError

    def chunk_choices(self, index: int, choice: Choice, first: bool) -> list[dict]:
        """Return what is new in a choice as entries of chunks. `first`: before the model has written anything."""
        raise NotImplementedError

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens, as OpenAI reports them."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def collect(self, stream: Stream[TokenOutput]) -> dict:
        """Return the whole answer."""
        async with stream:
            async for outputs in stream:
                self._add(outputs)
        return self.whole()

    def whole(self) -> dict:
        """Return the answer, now that all of it has come."""
        choices = [self.whole_choice(i, choice) for i, choice in enumerate(self.choices)]
        return self.head | {"choices": choices, "usage": self.usage()}

    async def events(self, stream: Stream[TokenOutput]) -> AsyncIterator[bytes]:
        """Yield server-sent events; the last is [DONE], after an error if there was one."""
        # The part that all chunks share is encoded once: there is a chunk for every token of every stream.
        head = f"data: {_json_text(self.head | {'object': self.chunk_name})[:-1]}, "

        def encode(indices: Sequence[int], first: bool = False) -> bytes:
            chunks = []
            usage = _json_text(self.usage()) if self.continuous_usage else "null"
            tail = f', "usage": {usage}}}\n\n' if self.include_usage else "}\n\n"
            for i in indices:
                entries = self.chunk_choices(i, self.choices[i], first)
                chunks += [f'{head}"choices": [{_json_text(entry)}]{tail}' for entry in entries]
                self.choices[i].text, self.choices[i].tokens = "", []
            return "".join(chunks).encode()

        yield encode(range(len(self.choices)), first=True)
        async with stream:
            try:
                async for outputs in stream:
                    for i in range(0, len(outputs), MAX_EVENT):  # a slow reader has many at once
                        yield encode(self._add(outputs[i : i + MAX_EVENT]))
            except EngineError as error:
                yield b"data: " + to_json(ApiError.from_engine(error).body()) + b"\n\n" + DONE
                return
        last = f'{head}"choices": [], "usage": {_json_text(self.usage())}}}\n\n' if self.include_usage else ""
        yield last.encode() + DONE

    def _add(self, outputs: list[tuple[int, TokenOutput]]) -> list[int]:
        """Add new tokens to their choices; return the indices of these choices, each once, in order."""
        self.completion_tokens += len(outputs)
        for index, output in outputs:
            choice = self.choices[index]
            choice.text += output.text
            choice.finish = output.finish
            if self.top_logprobs is not None:
                choice.add_token(self.model, output.token, output.logprob, output.top_logprobs)
        return list(dict.fromkeys(index for index, _ in outputs))


# ---- requests


@dataclass(frozen=True)
class Endpoint:
    """One route of the API: what its requests mean for this model. `defaults` is for what a request does not set."""

    engine: Engine
    model: ServedModel
    defaults: SamplingParams
    strict: bool = False  # refuse fields that would be ignored
    logged: set[str] = field(default_factory=set)  # ignored fields that the log has

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) if a request names another model."""
        if name != self.model.name:
            message = f"there is no model {name!r} on this server, only {self.model.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check(self, body: protocol.Request, request: Request) -> None:
        """Raise ApiError for another model, or for what `ignore` refuses."""
        self.check_model(body.model)
        if ignored := [_printable(name) for name in dict.fromkeys(body.ignored_fields())]:
            self.ignore(ignored, request)

    def ignore(self, ignored: list[str], request: Request) -> None:
        """Name fields that are ignored in the response and, once each, in the log. With `strict` raise ApiError instead."""
        if self.strict:
            message = f"the field {ignored[0]!r} would have no effect here, and --strict refuses such fields"
            raise ApiError(400, message, ignored[0], "unknown_parameter")
        add_header(request, "X-Ignored-Fields", ", ".join(ignored[:MAX_NAMES]))
        for name in ignored:
            if name not in self.logged and len(self.logged) < MAX_NAMES:
                self.logged.add(name)
                log.info("requests have the field %s, which is ignored", name)

    async def encode_prompts(self, prompt: protocol.Prompt, param: str, keep: int | None) -> list[list[int]]:
        """Return the token ids of one or more texts, each beginning with <s> as in training; ids stay as they are.

        keep: how many tokens of each, its last ones; None: all.
        """
        many: Any = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        if len(many) > protocol.MAX_INPUTS:
            message = f"{param} has {len(many)} texts; at most {protocol.MAX_INPUTS} are accepted in one request"
            raise ApiError(400, message, param)
        if isinstance(many[0], str):
            encode = functools.partial(encode_texts, self.model.tokenizer)
            texts = await tokenize(encode, many, sum(map(len, many)), param)
            many = [[BOS_ID, *(ids if keep is None else ids[max(len(ids) + 1 - keep, 0) :])] for ids in texts]
            keep = None
        for ids in many:
            if max(ids) >= self.model.vocab_size:
                message = f"token {max(ids)} does not exist; the model has 0 to {self.model.vocab_size - 1}"
                raise ApiError(400, message, param)
            if self.model.count_images(ids):
                message = f"{param} has the tokens that stand for an image: only /v1/chat/completions takes images"
                raise ApiError(400, message, param)
        return many if keep is None else [ids[max(len(ids) - keep, 0) :] for ids in many]

    def prompt_limit(self, body: protocol.Request, answer: int | None = None) -> int | None:
        """Return how many tokens of the prompt a request wants to keep; None: all.

        Args:
            answer: its limit for the answer, which gets that room, up to half of the context.
        """
        if body.truncate_prompt_tokens is None:
            return None
        context = self.engine.max_len
        room = context - min(max(answer or 1, 1), context // 2)
        return room if body.truncate_prompt_tokens == -1 else max(min(body.truncate_prompt_tokens, room), 1)

    def token_limit(self, prompt: int, limit: int | None, param: str, request: Request | None) -> int:
        """Return how many tokens an answer may have; the response to `request` says so if it is less than `limit`.

        Raises ApiError, which names `param`, if the prompt leaves no room.

        Args:
            prompt: length of the prompt in tokens.
            limit: that of the request; None: the server's default; -1: as much as fits.
        """
        context = self.engine.max_len
        fits = context - prompt
        if fits < (limit != 0):  # with a limit of 0 the prompt may fill the context
            message = f"the context is {context} tokens, prompt and answer together, and the prompt has {prompt}: "
            advice = "shorten it, or send truncate_prompt_tokens: -1"
            raise ApiError(400, message + advice, param, "context_length_exceeded")
        if limit is None:
            return min(self.defaults.max_new_tokens, fits)
        if limit > fits and request is not None:
            add_header(request, "X-Max-Tokens", str(fits))
        return fits if limit == -1 else min(limit, fits)

    def sampling_params(
        self, body: protocol.SamplingRequest, index: int, max_new_tokens: int, top_logprobs: int | None
    ) -> SamplingParams:
        """Return how choice `index` of a request is sampled: as it says, and otherwise as the server was started."""
        names = (*protocol.SAMPLING_FIELDS, "stop")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(body, name)) is not None}
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], 1e-9)  # OpenAI allows 0: only the most probable token
        if "top_k" in given:
            given["top_k"] = max(given["top_k"], 0)
        if "stop" in given:
            stops = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
            given["stop"] = tuple(text for text in stops if text)  # some clients send "" for none
        if (seed := given.get("seed", self.defaults.seed)) is not None:
            given["seed"] = (seed + index) % 2**64
        if body.logit_bias:
            given["logit_bias"] = bias = {int(token): value for token, value in body.logit_bias.items()}
            if max(bias) >= self.model.vocab_size:
                message = f"token {max(bias)} does not exist; the model has 0 to {self.model.vocab_size - 1}"
                raise ApiError(400, message, "logit_bias")
        return dataclasses.replace(self.defaults, max_new_tokens=max_new_tokens, logprobs=top_logprobs, **given)

    async def respond(
        self,
        builder: ResponseBuilder,
        prompts: list[list[int]],
        samplings: list[SamplingParams],
        body: protocol.SamplingRequest,
        request: Request,
        images: Images | None = None,
    ) -> Response:
        """Run the model on the prompts, each with the same images; return the answer, or the response that streams it."""
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        most = self.engine.rows + self.engine.max_queue
        if len(prompts) > most:
            message = f"the request asks for {len(prompts)} answers; this server takes at most {most} at a time"
            raise ApiError(400, message, "n")
        try:
            stream = self.engine.submit(prompts, samplings, images)
        except ValueError as error:  # checked above, except for what only the generator knows
            raise ApiError(400, str(error)) from error
        if body.stream:
            return SSEResponse(builder.events(stream), on_end=stream.cancel)
        return json_response(await cancel_on_disconnect(request.receive, builder.collect(stream)))


def _printable(name: str) -> str:
    """Return the name of a field as a header and a log may have it."""
    return re.sub(r"[^\w.-]", "?", name[:64], flags=re.ASCII) or "?"


async def tokenize(encode: Callable[[Item], Encoded], item: Item, size: int, param: str) -> Encoded:
    """Return `encode(item)`, computed in a thread if the texts are long (`size` characters)."""
    try:
        return await asyncio.to_thread(encode, item) if size > LONG_TEXT else encode(item)
    except ValueError as error:
        raise ApiError(400, str(error), param) from error
