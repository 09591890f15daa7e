"""A conversation and the answers in it, which are written a token at a time and can be left and taken up again.

    conversation = Conversation()
    answer = conversation.ask("Who are you?", writer, Sampling(temperature=0.7), history_turns=5)
    while answer.advance():
        print(answer.text)
    conversation.stop()

Nothing here knows of a page or a terminal: an interface may draw `answer.text` whenever it likes, come back later to the
same answer (a web page is redrawn from scratch at every click), or stop it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from inference.backends import Backend
from inference.generator import TokenOutput, generate
from inference.options import SamplingParams
from inference.prompts import Prompt, chat_prompt, text_prompt
from model.model import Transformer

# Why an answer ended.
ENDED, LENGTH, CONTEXT, STOPPED = "ended", "length", "context", "stopped"


@dataclass(frozen=True)
class ChatModel:
    """A model with what is needed to write with it.

    name: what a user calls it.
    context: tokens of prompt and answer together.
    continues: it goes on with a text instead of answering.
    thread: where the computing is done; None: wherever `advance` is called. With one thread for all, conversations that
        go on at the same time take turns token by token, and do not fight for the same cores.
    backend: what `inference.backends.choose_backend` made of the model, if anything.
    """

    model: Transformer
    tokenizer: PreTrainedTokenizerFast
    context: int
    name: str = ""
    continues: bool = False
    thread: Executor | None = None
    backend: Backend | None = None


class Answer:
    """Text that is being written.

    tokens: made so far; prompt: what it began with; seconds: spent on computing, reading the prompt included;
    finish: None while it goes on, then ENDED by the model (or a stop string), LENGTH (max_new_tokens), CONTEXT (full) or
    STOPPED.
    """

    def __init__(self, writer: ChatModel, prompt: Prompt, sampling: SamplingParams) -> None:
        """Nothing is computed yet. Raises ValueError for a prompt that leaves no room."""
        self.prompt, self.sampling, self.context = prompt, sampling, writer.context
        self.text, self.tokens, self.seconds = "", 0, 0.0
        self.finish: str | None = None
        self._thread = writer.thread
        self._events: Iterator[TokenOutput] | None = generate(
            writer.model,
            [prompt.ids],
            sampling,
            tokenizer=writer.tokenizer,
            max_len=writer.context,
            backend=writer.backend,
        )

    def advance(self) -> bool:
        """Compute one token more. False, and nothing happens, if there is none to come."""
        if self._events is None:
            return False
        started = time.perf_counter()
        if self._thread is None:
            event = next(self._events)
        else:
            event = self._thread.submit(next, self._events).result()
        self.seconds += time.perf_counter() - started
        self.tokens += 1
        self.text += event.text
        if event.finish == "stop":
            self._end(ENDED)
        elif event.finish == "length":
            self._end(LENGTH if self.tokens >= self.sampling.max_new_tokens else CONTEXT)
        return True

    def stop(self) -> None:
        """Compute no more; what was written stays. Nothing happens if it has ended."""
        if self.finish is None:
            self._end(STOPPED)

    def _end(self, finish: str) -> None:
        self.finish, self._events = finish, None  # the iterator holds the cache: let it go

    @property
    def rate(self) -> float:
        """Tokens per second of computing."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Exchange:
    """A question and its answer, or why there is none. `writer` is the name of the model, `continues` as there."""

    question: str
    writer: str
    continues: bool
    answer: Answer | None = None
    problem: str = ""


@dataclass
class Conversation:
    """All exchanges of one user."""

    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def running(self) -> Answer | None:
        """The answer that is not finished."""
        last = self.exchanges[-1].answer if self.exchanges else None
        return last if last is not None and last.finish is None else None

    def turns(self) -> list[dict]:
        """What was said, for the next question. Continued texts are no dialogue, and neither is what has no answer."""
        said = []
        for exchange in self.exchanges:
            if exchange.answer is not None and not exchange.continues:
                said.append({"role": "user", "content": exchange.question})
                said.append({"role": "assistant", "content": exchange.answer.text})
        return said

    def ask(
        self,
        question: str,
        writer: ChatModel,
        sampling: SamplingParams,
        *,
        history_turns: int = 0,
        system: str | None = None,
    ) -> Answer | None:
        """Begin an answer; one that is going on is stopped. None, and a `problem` in its exchange, if there can be none."""
        self.stop()
        limits = {"context": writer.context, "max_new_tokens": sampling.max_new_tokens}
        exchange = Exchange(question, writer.name, writer.continues)
        try:
            if writer.continues:
                prompt = text_prompt(writer.tokenizer, question, **limits)
            else:
                prompt = chat_prompt(
                    writer.tokenizer, self.turns(), question, history_turns=history_turns, system=system, **limits
                )
            exchange.answer = Answer(writer, prompt, sampling)
        except ValueError as error:
            exchange.problem = str(error)
        self.exchanges.append(exchange)
        return exchange.answer

    def again(self, *args, **kwargs) -> Answer | None:
        """Ask the last question once more, in place of its answer. Arguments as for `ask`, without the question."""
        self.stop()
        return self.ask(self.exchanges.pop().question, *args, **kwargs)

    def stop(self) -> None:
        """End the answer that is going on; its text stays and is part of the conversation."""
        if self.running is not None:
            self.running.stop()

    def clear(self) -> None:
        """Forget everything."""
        self.stop()
        self.exchanges.clear()
