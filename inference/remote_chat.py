"""A conversation on the terminal with a server of OpenAI's API."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import openai

from common.errors import UserError
from inference.terminal import Chat, print_parts
from model.chat_format import Message, split_turns
from model.chat_parser import AnswerPart

EXTENSIONS = ("top_k", "min_p", "repetition_penalty")  # not OpenAI's


class RemoteChat(Chat):
    """A conversation with a server."""

    def __init__(
        self,
        client: openai.OpenAI,
        model: str | None,
        sampling: dict[str, Any],
        system: str | None,
        history_turns: int,
        **tools: Any,
    ) -> None:
        """Ask the server for its models. Raises UserError if it does not answer, or has no such model.

        Args:
            model: None: the first one the server has.
            sampling: fields of `SamplingParams` to send; the server decides the others.
            system, history_turns, tools: as for `Chat`.
        """
        super().__init__(system, history_turns, **tools)
        self.client, self.base_url = client, str(client.base_url).rstrip("/")
        try:
            models = {found.id: found for found in client.models.list()}
        except openai.APIError as error:
            raise UserError(self.explain(error)) from error
        except AttributeError as error:  # the library takes any page with status 200 for a reply
            raise UserError(f"{self.base_url} is not an OpenAI-compatible API: it replied with a page") from error
        if not models:
            raise UserError(f"{self.base_url} has no models")
        self.model = model or next(iter(models))
        if self.model not in models:
            raise UserError(f"--model {self.model}: {self.base_url} has {', '.join(models)}")
        self.context = getattr(models[self.model], "max_model_len", None)  # only this server and a few others send it
        # Where the server says how much it holds, half is kept for the answer; if that does not fit beside the question and
        # its history, `reply` leaves turns out.
        limit = sampling.get("max_new_tokens") or (self.context and self.context // 2)
        own = ("max_new_tokens", *EXTENSIONS)
        self.settings = {name: value for name, value in sampling.items() if name not in own}
        self.settings["extra_body"] = {name: sampling[name] for name in EXTENSIONS if name in sampling}
        if limit:
            self.settings["max_tokens"] = limit
        if self.tools:
            self.settings["tools"] = [{"type": "function", "function": tool} for tool in self.tools]

    def reply(self, turn: list[Message]) -> Message:
        history = split_turns(self.turns)[1][-self.history_turns :] if self.history_turns else []
        create: Any = self.client.chat.completions.with_raw_response.create  # its overloads know no dict of settings
        left_out = 0
        while True:
            messages = [*map(as_sent, (*self.system, *itertools.chain(*history[left_out:]), *turn))]
            try:
                response = create(
                    model=self.model, messages=messages, stream=True, stream_options={"include_usage": True},
                    **self.settings,
                )  # fmt: skip
                chunks = response.parse()
                if "x-max-tokens" not in response.headers or left_out == len(history):  # there is room for the answer
                    break
                chunks.close()
                left_out += 1
            except openai.BadRequestError as error:
                if error.code != "context_length_exceeded" or left_out == len(history):
                    raise ValueError(self.explain(error)) from error
                left_out += 1
            except openai.APIError as error:
                raise ValueError(self.explain(error)) from error
            except UnicodeEncodeError as error:
                raise ValueError(f"the question is not Unicode at character {error.start}: write it again") from error
            except KeyboardInterrupt:
                raise ValueError("stopped") from None
        if left_out:
            print(f"[the context is full: {left_out} of {len(history)} earlier turns left out]")
        return self.print(chunks)

    def print(self, chunks: openai.Stream) -> Message:
        """Print an answer as it comes, why it was cut off (if it was), its length and speed; return it as a message."""
        started = time.perf_counter()
        finish = usage = failure = None
        calls: dict[int, dict[str, Any]] = {}

        def parts() -> Iterator[AnswerPart]:
            nonlocal finish, usage, failure
            try:
                for chunk in chunks:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        finish = choice.finish_reason or finish
                        if thoughts := getattr(choice.delta, "reasoning_content", None):  # an extension of OpenAI's API
                            yield "reasoning_content", thoughts
                        if choice.delta.content:
                            yield "content", choice.delta.content
                        for call in choice.delta.tool_calls or []:
                            add_call(calls, call)
            except openai.APIError as error:
                failure = self.explain(error)
            if finish == "tool_calls":
                for call in calls.values():
                    yield "tool_calls", call | {"arguments": arguments_of(call["arguments"])}

        message, stopped = print_parts(parts())
        chunks.close()  # the server stops generating then
        if stopped:
            end = " [stopped]"
        elif failure or finish not in ("stop", "tool_calls"):
            end = f" [cut off: {failure or finish or 'the server ended the answer early'}]"
        else:
            end = ""
        speed = usage.completion_tokens / (time.perf_counter() - started) if usage else 0
        facts = f"[{usage.completion_tokens} tokens, {speed:.1f} tokens/s]" if usage else ""
        print(f"{end}\n{facts}\n", flush=True)
        return message

    def explain(self, error: openai.APIError) -> str:
        """Return what went wrong, and what to do."""
        if isinstance(error, openai.APITimeoutError):
            return f"{self.base_url} did not answer in time: it may be busy; --timeout gives it longer"
        if isinstance(error, openai.APIConnectionError):
            return f"no server at {self.base_url}: start one (python my_openai_api.py), or name another with --base_url"
        reason = error.body.get("message") if isinstance(error.body, dict) else None
        message = str(reason or error.message)
        if isinstance(error, openai.AuthenticationError):
            return f"{self.base_url} refuses the key ({message}): give it with --api_key or in MINIMIND_API_KEY"
        if isinstance(error, openai.NotFoundError):
            return f"{self.base_url} says: {message}; does the address end in /v1?"
        return f"{self.base_url} says: {message}"


def as_sent(message: Message) -> Message:
    """Return a message in OpenAI's form, where the arguments of a call are a text."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
        }
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def add_call(calls: dict[int, dict[str, Any]], delta: Any) -> None:
    """Add a piece of a call to those that a stream has brought so far, by their index."""
    call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
    call["id"] = delta.id or call["id"]
    if delta.function is not None:
        call["name"] += delta.function.name or ""
        call["arguments"] += delta.function.arguments or ""


def arguments_of(text: str) -> dict[str, Any]:
    """Return the arguments of a call; {"": text} for what is no JSON object, so that the tool says what is wrong."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"": text}
