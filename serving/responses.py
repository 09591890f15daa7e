"""/v1/responses: OpenAI's newer form of a chat, translated to a chat request and back. Nothing is kept between requests."""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from inference.generator import TokenOutput
from serving import protocol
from serving.chat import ChatBuilder, ChatEndpoint, call_object
from serving.endpoint import Choice
from serving.http import ApiError, to_json
from serving.stream import EngineError, Stream

TEXT_ITEMS = {"content": ("message", "msg", "output_text"), "reasoning_content": ("reasoning", "rs", "reasoning_text")}


class ResponsesEndpoint(ChatEndpoint):
    format_field, strict_field = "text", "tools.strict"

    async def create(self, body: protocol.ResponsesRequest, request: Request) -> Response:  # type: ignore[override]
        self.check(body, request)
        same = {*protocol.SamplingRequest.model_fields, "parallel_tool_calls"} - {"stream_options"}
        fields: dict[str, Any] = {name: getattr(body, name) for name in same}
        if body.truncation == "auto":
            fields["truncate_prompt_tokens"] = -1
        if body.text is not None and body.text.format is not None:
            form = body.text.format
            fields["response_format"] = {"type": form.type, "json_schema": {"schema": form.schema_}}
        if body.reasoning is not None:
            fields["reasoning_effort"] = body.reasoning.effort
        if isinstance(body.tool_choice, protocol.NamedFunction):
            fields["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
        else:
            fields["tool_choice"] = body.tool_choice
        tools = [{"type": "function", "function": dict(tool)} for tool in body.tools or []]
        logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())
        chat = protocol.ChatRequest(
            **fields, messages=input_messages(body), max_tokens=body.max_output_tokens, tools=tools,
            logprobs=logprobs, top_logprobs=body.top_logprobs,
        )  # fmt: skip
        return await self.answer(chat, request, functools.partial(ResponsesBuilder, asked=body), "input")


def input_messages(body: protocol.ResponsesRequest) -> list[protocol.Message]:
    """Return the input as messages of a chat; what stands in several items of one answer is joined later."""
    messages = [protocol.Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, protocol.Message(role="user", content=body.input)]
    for item in body.input:
        if isinstance(item, protocol.FunctionCallItem):
            function = protocol.CalledFunction(name=item.name, arguments=item.arguments)
            call = protocol.ToolCall(id=item.call_id, function=function)
            messages.append(protocol.Message(role="assistant", content="", tool_calls=[call]))
        elif isinstance(item, protocol.FunctionOutputItem):
            messages.append(protocol.Message(role="tool", content=item.output, tool_call_id=item.call_id))
        elif isinstance(item, protocol.ReasoningItem):
            if thoughts := "".join(part.text for part in item.content or []):
                messages.append(protocol.Message(role="assistant", content="", reasoning_content=thoughts))
        else:
            messages.append(item)
    if not messages:
        raise ApiError(400, "input has no message: its thoughts have no text", "input")
    return messages


class ResponsesBuilder(ChatBuilder):
    """The answer as a list of items: its thinking, its text, its calls."""

    prefix, object_name = "resp", "response"

    def __init__(self, *args: Any, asked: protocol.ResponsesRequest) -> None:
        super().__init__(*args)
        self.asked = asked
        self.items: list[dict[str, Any]] = []
        self.open = False  # the last item is being written

    async def collect(self, stream: Stream[TokenOutput]) -> dict:
        async with stream:
            async for outputs in stream:
                for _ in self.advance(outputs):
                    pass
        return self.response(self.status())

    async def events(self, stream: Stream[TokenOutput]) -> AsyncIterator[bytes]:
        numbers = itertools.count()

        def event(kind: str, **fields: Any) -> bytes:
            data = to_json({"type": kind, "sequence_number": next(numbers), **fields})
            return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)

        yield event("response.created", response=self.response("in_progress"))
        yield event("response.in_progress", response=self.response("in_progress"))
        async with stream:
            try:
                async for outputs in stream:
                    for kind, fields in self.advance(outputs):
                        yield event(kind, **fields)
            except EngineError as error:
                for item in self.items[-1:] if self.open else []:
                    item["status"] = "incomplete"
                problem = {"code": "server_error", "message": ApiError.from_engine(error).detail}
                yield event("response.failed", response=self.response("failed", problem))
                return
        yield event(f"response.{self.status()}", response=self.response(self.status()))

    def advance(self, outputs: list[tuple[int, TokenOutput]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Add tokens to `items`, one by one, so that each counts for the item that it is a part of; yield the events."""
        for index, output in outputs:
            choice: Any = self.choices[index]
            was_thinking = choice.parser.thinking
            self._add([(index, output)])
            if was_thinking:  # the tag that ends the thoughts is no part of the text
                choice.tokens = []
            yield from self.updates()

    def updates(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Add what is new in the answer to `items`; yield the events that say so."""
        choice: Any = self.choices[0]
        for name, new in self.parts(choice):
            if name == "tool_calls":
                yield from self.end_item()
                call = call_object(new)
                function = {"type": "function_call", "call_id": call["id"], "name": new["name"], "arguments": ""}
                yield from self.begin_item("fc", function)
                self.items[-1]["arguments"] = arguments = call["function"]["arguments"]
                yield "response.function_call_arguments.delta", self.place() | {"delta": arguments}
                yield from self.end_item()
            else:
                yield from self.add_text(name, new, self.entries(choice.tokens))
            choice.tokens = []
        if choice.finish is not None:
            if not self.items or (self.open and self.items[-1]["type"] == "message"):
                yield from self.add_text("content", "", self.entries(choice.tokens))  # the end token has no text
            yield from self.end_item(cut=choice.finish == "length")

    def add_text(self, name: str, new: str, logprobs: list[dict]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Add to the text or the thoughts that are being written, or begin them."""
        kind, prefix, part_kind = TEXT_ITEMS[name]
        if not self.open or self.items[-1]["type"] != kind:
            yield from self.end_item()
            own = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self.begin_item(prefix, {"type": kind, **own, "content": []})
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            yield "response.content_part.added", self.place(content_index=0) | {"part": dict(part)}
            self.items[-1]["content"] = [part]
        part = self.items[-1]["content"][0]
        part["text"] += new
        if kind == "message":
            part["logprobs"] = part["logprobs"] + logprobs
        if new:
            own = {"logprobs": logprobs} if kind == "message" else {}
            yield f"response.{part_kind}.delta", self.place(content_index=0) | {"delta": new, **own}

    def begin_item(self, prefix: str, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        self.items.append({"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **item})
        self.open = True
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(self.items[-1])}

    def end_item(self, cut: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """End the item that is being written, if there is one; `cut`: the limit of tokens has ended it."""
        if not self.open:
            return
        item, self.open = self.items[-1], False
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", self.place() | done
        else:
            part = item["content"][0]
            text = {name: part[name] for name in ("text", "logprobs") if name in part}
            yield f"response.{part['type']}.done", self.place(content_index=0) | text
            yield "response.content_part.done", self.place(content_index=0) | {"part": part}
        item["status"] = "incomplete" if cut and item["type"] != "function_call" else "completed"
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def place(self, **fields: int) -> dict[str, Any]:
        """Return what tells a client which item an event belongs to."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def status(self) -> str:
        return "completed" if self.choices[0].finish == "stop" else "incomplete"

    def entries(self, tokens: list) -> list[dict]:
        found = self.logprobs(Choice(tokens=tokens))
        return found["content"] if found else []

    def response(self, status: str, error: dict | None = None) -> dict:
        """Return the whole response; it has its text and usage unless it is still in progress."""
        begun = status != "in_progress"
        asked, used, choice = self.asked, self.usage(), self.asked.tool_choice
        form = asked.text.format if asked.text is not None else None
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": used["completion_tokens_details"],
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
            "output": self.items if begun else [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [dict(tool) for tool in asked.tools or []],
            "top_p": asked.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": usage if begun else None,
        }
