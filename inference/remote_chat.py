"""A conversation on the terminal with a server of OpenAI's API."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import openai

from common.errors import UserError
from inference.terminal import Chat, print_pieces
from model.chat_format import split_turns

EXTENSIONS = ("top_k", "min_p", "repetition_penalty")  # not OpenAI's


class RemoteChat(Chat):
    """A conversation with a server."""

    def __init__(
        self, client: openai.OpenAI, model: str | None, sampling: dict[str, Any], system: str | None, history_turns: int
    ) -> None:
        """Ask the server for its models. Raises UserError if it does not answer, or has no such model.

        Args:
            model: None: the first one the server has.
            sampling: fields of `SamplingParams` to send; the server decides the others.
            system, history_turns: as for `Chat`.
        """
        super().__init__(system, history_turns)
        self.client, self.base_url = client, str(client.base_url).rstrip("/")
        try:
            models = {found.id: found for found in client.models.list()}
        except openai.APIError as error:
            raise UserError(self.explain(error)) from error
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

    def reply(self, question: str) -> str:
        history = split_turns(self.turns)[1][-self.history_turns :] if self.history_turns else []
        create: Any = self.client.chat.completions.with_raw_response.create  # its overloads know no dict of settings
        left_out = 0
        while True:
            messages = [*self.system, *itertools.chain(*history[left_out:]), {"role": "user", "content": question}]
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

    def print(self, chunks: openai.Stream) -> str:
        """Print an answer as it comes, why it was cut off (if it was), its length and speed; return its text."""
        started = time.perf_counter()
        finish = usage = failure = None

        def pieces() -> Iterator[str]:
            nonlocal finish, usage, failure
            try:
                for chunk in chunks:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        finish = choice.finish_reason or finish
                        yield choice.delta.content or ""
            except openai.APIError as error:
                failure = self.explain(error)

        text, stopped = print_pieces(pieces())
        chunks.close()  # the server stops generating then
        if stopped:
            end = " [stopped]"
        elif failure or finish != "stop":
            end = f" [cut off: {failure or finish or 'the server ended the answer early'}]"
        else:
            end = ""
        speed = usage.completion_tokens / (time.perf_counter() - started) if usage else 0
        facts = f"[{usage.completion_tokens} tokens, {speed:.1f} tokens/s]" if usage else ""
        print(f"{end}\n{facts}\n", flush=True)
        return text

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
