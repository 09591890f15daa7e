"""/v1/responses: OpenAI's newer form of a chat, translated to a chat request and back. Nothing is kept between requests."""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from inference.generator import TokenOutput
from serving import protocol
from serving.chat import ChatBuilder, ChatEndpoint
from serving.endpoint import Choice
from serving.http import ApiError, to_json
from serving.stream import EngineError, Stream


class ResponsesEndpoint(ChatEndpoint):
    async def create(self, body: protocol.ResponsesRequest, request: Request) -> Response:  # type: ignore[override]
        self.check(body, request)
        first = [protocol.Message(role="system", content=body.instructions)] if body.instructions else []
        asked = [protocol.Message(role="user", content=body.input)] if isinstance(body.input, str) else body.input
        same = ("model", "stream", "stop", "truncate_prompt_tokens", *protocol.SAMPLING_FIELDS)
        fields: dict[str, Any] = {name: getattr(body, name) for name in same}
        if body.truncation == "auto":
            fields["truncate_prompt_tokens"] = -1
        logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())
        chat = protocol.ChatRequest(
            **fields, messages=[*first, *asked], max_tokens=body.max_output_tokens,
            logprobs=logprobs, top_logprobs=body.top_logprobs,
        )  # fmt: skip
        return await self.answer(chat, request, functools.partial(ResponsesBuilder, asked=body), "input")


class ResponsesBuilder(ChatBuilder):
    prefix, object_name = "resp", "response"

    def __init__(self, *args: Any, asked: protocol.ResponsesRequest) -> None:
        super().__init__(*args)
        self.asked, self.item_id = asked, f"msg_{uuid.uuid4().hex}"

    async def collect(self, stream: Stream[TokenOutput]) -> dict:
        await super().collect(stream)
        return self.response(self.status())

    async def events(self, stream: Stream[TokenOutput]) -> AsyncIterator[bytes]:
        choice, numbers = self.choices[0], itertools.count()
        item = {"output_index": 0}
        part = item | {"item_id": self.item_id, "content_index": 0}

        def event(kind: str, **fields: Any) -> bytes:
            data = to_json({"type": kind, "sequence_number": next(numbers), **fields})
            return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)

        yield event("response.created", response=self.response("in_progress"))
        yield event("response.in_progress", response=self.response("in_progress"))
        yield event("response.output_item.added", item=self.item("in_progress", []), **item)
        yield event("response.content_part.added", part=self.part(Choice()), **part)
        characters = tokens = 0  # sent so far
        async with stream:
            try:
                async for outputs in stream:
                    self._add(outputs)
                    if new := choice.text[characters:]:
                        logprobs = self.entries(choice.tokens[tokens:])
                        yield event("response.output_text.delta", delta=new, logprobs=logprobs, **part)
                        characters, tokens = len(choice.text), len(choice.tokens)
            except EngineError as error:
                problem = {"code": "server_error", "message": ApiError.from_engine(error).detail}
                yield event("response.failed", response=self.response("failed", problem))
                return
        logprobs, status = self.entries(choice.tokens), self.status()
        yield event("response.output_text.done", text=choice.text, logprobs=logprobs, **part)
        yield event("response.content_part.done", part=self.part(choice), **part)
        yield event("response.output_item.done", item=self.item(status, [self.part(choice)]), **item)
        yield event(f"response.{status}", response=self.response(status))

    def status(self) -> str:
        return "completed" if self.choices[0].finish == "stop" else "incomplete"

    def entries(self, tokens: list) -> list[dict]:
        found = self.logprobs(Choice(tokens=tokens))
        return found["content"] if found else []

    def part(self, choice: Choice) -> dict:
        logprobs = self.entries(choice.tokens)
        return {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": logprobs}

    def item(self, status: str, content: list[dict]) -> dict:
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def response(self, status: str, error: dict | None = None) -> dict:
        """Return the whole response; it has its text and usage unless it is still in progress."""
        begun = status != "in_progress"
        asked, used = self.asked, self.usage()
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "model": self.head["model"],
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": (asked.model_extra or {}).get("metadata") or {},
            "output": [self.item("incomplete" if error else status, [self.part(self.choices[0])])] if begun else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": usage if begun else None,
        }
