"""A conversation whose answers are written token by token: they can be paused, resumed later, and stopped.

    conversation = Conversation()
    answer = conversation.ask("Who are you?", chat_model, SamplingParams(temperature=0.7), history_turns=5)
    while answer.advance():
        print(answer.text)
    conversation.stop()

An interface may draw `answer.text` at any time, return later to the same answer (a web page is redrawn from scratch at
every click), or stop it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from inference.generator import TokenOutput
from inference.model_loader import TextGenerator
from inference.options import SamplingParams
from inference.prompts import Prompt, chat_prompt, text_prompt

# Why an answer ended: by the model (or a stop text), at max_new_tokens, because the context is full, by the user.
ENDED, LENGTH, CONTEXT, STOPPED = "ended", "length", "context", "stopped"


@dataclass(frozen=True)
class ChatModel:
    """A model to talk to.

    Args:
        name: as a user knows it.
        continues: it continues texts instead of answering questions.
        thread: where tokens are computed; None: in the caller's thread. With one thread for all, conversations at the same
            time take turns token by token and do not compete for the same cores.
    """

    generator: TextGenerator
    name: str = ""
    continues: bool = False
    thread: Executor | None = None


class Answer:
    """A text that is being written.

    tokens: how many so far; prompt: what it began with; seconds: computing time so far, reading the prompt included;
    finish: why it ended (ENDED, LENGTH, CONTEXT or STOPPED); None while it is being written.
    """

    def __init__(self, model: ChatModel, prompt: Prompt, sampling: SamplingParams) -> None:
        """Prepare an answer; nothing is computed yet. Raises ValueError for a prompt that leaves no room."""
        self.prompt, self.sampling, self.context = prompt, sampling, model.generator.context
        self.text, self.tokens, self.seconds = "", 0, 0.0
        self.finish: str | None = None
        self._thread = model.thread
        self._outputs: Iterator[TokenOutput] | None = model.generator.generate(prompt.ids, sampling)

    def advance(self) -> bool:
        """Compute one more token. Return False, and do nothing, if the answer has ended."""
        if self._outputs is None:
            return False
        started = time.perf_counter()
        if self._thread is None:
            output = next(self._outputs)
        else:
            output = self._thread.submit(next, self._outputs).result()
        self.seconds += time.perf_counter() - started
        self.tokens += 1
        self.text += output.text
        if output.finish == "stop":
            self._end(ENDED)
        elif output.finish == "length":
            self._end(LENGTH if self.tokens >= self.sampling.max_new_tokens else CONTEXT)
        return True

    def stop(self) -> None:
        """Stop computing and keep the text so far. Nothing happens if the answer has ended."""
        if self.finish is None:
            self._end(STOPPED)

    def _end(self, finish: str) -> None:
        self.finish, self._outputs = finish, None  # the iterator holds the cache: free it

    @property
    def rate(self) -> float:
        """Return tokens per second of computing."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Exchange:
    """A question with its answer, or with the error that prevented one. `continues` is that of the ChatModel."""

    question: str
    model_name: str
    continues: bool
    answer: Answer | None = None
    error: str = ""


@dataclass
class Conversation:
    """All exchanges of one user."""

    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def running(self) -> Answer | None:
        """Return the answer that is being written."""
        last = self.exchanges[-1].answer if self.exchanges else None
        return last if last is not None and last.finish is None else None

    def turns(self) -> list[dict]:
        """Return the dialogue so far, for the next question: without continued texts and without failed questions."""
        turns = []
        for exchange in self.exchanges:
            if exchange.answer is not None and not exchange.continues:
                turns.append({"role": "user", "content": exchange.question})
                turns.append({"role": "assistant", "content": exchange.answer.text})
        return turns

    def ask(
        self,
        question: str,
        model: ChatModel,
        sampling: SamplingParams,
        *,
        history_turns: int = 0,
        system: str | None = None,
    ) -> Answer | None:
        """Begin an answer, and stop the one that is being written. Return None, and keep the error, if it cannot begin."""
        self.stop()
        exchange = Exchange(question, model.name, model.continues)
        tokenizer = model.generator.tokenizer
        limits: dict[str, Any] = {"context": model.generator.context, "max_new_tokens": sampling.max_new_tokens}
        try:
            if model.continues:
                prompt = text_prompt(tokenizer, question, **limits)
            else:
                turns = self.turns()
                prompt = chat_prompt(tokenizer, turns, question, history_turns=history_turns, system=system, **limits)
            exchange.answer = Answer(model, prompt, sampling)
        except ValueError as error:
            exchange.error = str(error)
        self.exchanges.append(exchange)
        return exchange.answer

    def regenerate(self, *args: Any, **kwargs: Any) -> Answer | None:
        """Ask the last question again and replace its answer. Takes the arguments of `ask` after the question."""
        self.stop()
        return self.ask(self.exchanges.pop().question, *args, **kwargs)

    def stop(self) -> None:
        """End the answer that is being written; its text stays part of the conversation."""
        if self.running is not None:
            self.running.stop()

    def clear(self) -> None:
        """Forget everything."""
        self.stop()
        self.exchanges.clear()
