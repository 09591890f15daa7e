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

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError
from inference.generator import TokenOutput
from inference.model_loader import TextGenerator
from inference.options import SamplingParams
from inference.prompts import Prompt, text_prompt
from inference.terminal import MAX_ROUNDS
from model.chat_format import Message, with_images
from model.chat_parser import ParsedAnswer, parse_answer
from model.chat_style import chat_style

# Why an answer ended: by the model (or a stop text), at max_new_tokens, because the context is full, by the user.
ENDED, LENGTH, CONTEXT, STOPPED = "ended", "length", "context", "stopped"
ROUNDS = "rounds"  # because it called tools again and again


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


@dataclass
class Exchange:
    """A question and its answer, a text that is being written. The fields are plain data, which can be saved.

    continues: the answer continues the text of the question; context: that of the model; prompt_tokens: length of the
    prompt; turns_seen, turns_left_out, tokens_left_out: see `inference.prompts.Prompt`; tools: those it could call;
    called: answers that called tools, and what these returned; text: the answer after them so far, as the model writes it;
    tokens: of all; seconds: computing time so far, reading the prompt included; finish: why it ended (ENDED, LENGTH,
    CONTEXT, ROUNDS, STOPPED); None while it is being written, and for ever if nobody finished it; error: why there is no
    answer; images: shown with the question, as data URLs.
    """

    question: str
    model_name: str
    continues: bool
    sampling: SamplingParams
    context: int
    prompt_tokens: int = 0
    turns_seen: int = 0
    turns_left_out: int = 0
    tokens_left_out: int = 0
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    finish: str | None = None
    error: str = ""
    called: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._outputs: Iterator[TokenOutput] | None = None
        self._answer_tokens = 0  # of `text`

    def begin(
        self,
        outputs: Iterator[TokenOutput],
        thread: Executor | None,
        begin_after: Callable[[list[Message]], Iterator[TokenOutput]] | None = None,
        call_tool: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        """Let `advance` take the answer from `outputs`.

        Args:
            begin_after: returns the tokens of the next answer, given the calls so far and what the tools returned.
            call_tool: runs a call {"name", "arguments"}; None: the model calls no tools.
        """
        self._outputs, self._thread = outputs, thread
        self._begin_after, self._call_tool = begin_after, call_tool

    def advance(self) -> bool:
        """Compute one more token. Return False, and do nothing, if the answer has ended."""
        if self._outputs is None:
            return False
        started = time.perf_counter()
        try:
            output = next(self._outputs) if self._thread is None else self._thread.submit(next, self._outputs).result()
        except Exception:
            self._end(STOPPED)
            raise
        self.seconds += time.perf_counter() - started
        self.tokens += 1
        self._answer_tokens += 1
        self.text += output.text
        if output.finish == "stop":
            self._run_calls()
        elif output.finish == "length":
            self._end(LENGTH if self._answer_tokens >= self.sampling.max_new_tokens else CONTEXT)
        return True

    def _run_calls(self) -> None:
        """Run the calls in an answer that is complete, and begin the next answer; without calls it was the last one."""
        answer = self.answer()
        if self._call_tool is None or self._begin_after is None or not answer.calls:
            self._end(ENDED)
        elif sum(message["role"] == "assistant" for message in self.called) >= MAX_ROUNDS:
            self._end(ROUNDS)
        else:
            responses = [{"role": "tool", "content": self._call_tool(call)} for call in answer.calls]
            called = [*self.called, answer.message(), *responses]
            try:
                self._outputs = self._begin_after(called)
            except ValueError:  # what the tools returned does not fit
                self._end(CONTEXT)
            else:
                self.called, self.text, self._answer_tokens = called, "", 0

    def answer(self) -> ParsedAnswer:
        """Return the answer so far: its thinking, its content, and its calls. A continued text is only content."""
        if self.continues:
            return ParsedAnswer(None, self.text, [])
        return parse_answer(self.text, calls=bool(self.tools), unfinished=self.running)

    @property
    def running(self) -> bool:
        return self._outputs is not None

    def stop(self) -> None:
        """Stop computing and keep the text so far. Nothing happens if the answer has ended."""
        if self.running:
            self._end(STOPPED)

    def _end(self, finish: str) -> None:
        self.finish, self._outputs = finish, None  # the iterator holds the cache: free it

    @property
    def rate(self) -> float:
        """Return tokens per second of computing."""
        return self.tokens / self.seconds if self.seconds else 0.0


def new_id() -> str:
    """Return a name for a chat that no other has, and that is safe as a file's."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


@dataclass
class Conversation:
    """All exchanges of one user.

    title: given by the user; system: the system message that the last answer has seen; id: name of its file; stamp: of
    that file, as it was last read or written here.
    """

    exchanges: list[Exchange] = field(default_factory=list)
    title: str = ""
    system: str = ""
    id: str = field(default_factory=new_id)
    stamp: tuple[int, int] | None = None

    @property
    def running(self) -> bool:
        """Return whether an answer is being written; only the last one can be."""
        return bool(self.exchanges) and self.exchanges[-1].running

    def answered(self) -> list[Exchange]:
        """Return the exchanges of the dialogue: no continued texts, and no questions without an answer."""
        return [one for one in self.exchanges if (one.text or one.called) and not one.continues]

    def turns(self, *, tags: bool = True, places: bool = False) -> list[Message]:
        """Return the dialogue so far, for the next question.

        Args:
            tags: the model knows thinking and calls; otherwise an answer is its text.
            places: `IMAGE` stands in the questions for every image of `images`.
        """
        turns: list[Message] = []
        for exchange in self.answered():
            question = with_images(exchange.question, len(exchange.images)) if places else exchange.question
            answer = exchange.answer().message() if tags else {"role": "assistant", "content": exchange.text}
            answer.pop("tool_calls", None)  # nothing answered them
            turns += [{"role": "user", "content": question}, *(exchange.called if tags else []), answer]
        return turns

    def images(self) -> list[str]:
        """Return the images of the dialogue so far, as data URLs."""
        return [url for exchange in self.answered() for url in exchange.images]

    def ask(
        self,
        question: str,
        model: ChatModel,
        sampling: SamplingParams,
        *,
        history_turns: int = 0,
        system: str | None = None,
        tools: Sequence[dict[str, Any]] = (),
        call_tool: Callable[[dict[str, Any]], str] | None = None,
        images: Sequence[str] = (),
    ) -> Exchange:
        """Begin an answer, and stop the one that is being written. If it cannot begin, the exchange has the error.

        Args:
            tools, call_tool: as for `inference.terminal.Chat`.
            images: data URLs of what is shown with the question.
        """
        self.stop()
        generator = model.generator
        tokenizer, context, sees = generator.tokenizer, generator.context, generator.image_processor is not None
        exchange = Exchange(question, model.name, model.continues, sampling, context, images=[*images], tools=[*tools])
        turns = self.turns(tags=bool(chat_style(tokenizer).tags), places=sees)
        asked: dict[str, Any] = {"history_turns": history_turns, "system": system, "tools": tools}
        asked["images"] = [*self.images(), *images]
        if sees:
            question = with_images(question, len(images))

        def begin(prompt: Prompt, outputs: Iterator[TokenOutput]) -> Iterator[TokenOutput]:
            exchange.prompt_tokens, exchange.tokens_left_out = len(prompt.ids), prompt.tokens_left_out
            exchange.turns_seen, exchange.turns_left_out = prompt.turns_seen, prompt.turns_left_out
            return outputs

        def begin_after(called: list[Message]) -> Iterator[TokenOutput]:
            turn = [{"role": "user", "content": question}, *called]
            return begin(*generator.answer(turns, turn, sampling, **asked))

        try:
            if images and not sees:
                raise UserError(f"{model.name} does not see images: choose a model of 9-sft_vlm.py")
            if model.continues:
                prompt = text_prompt(tokenizer, question, context=context, max_new_tokens=sampling.max_new_tokens)
                exchange.begin(begin(prompt, generator.generate(prompt.ids, sampling)), model.thread)
            else:
                self.system = system or ""
                exchange.begin(begin_after([]), model.thread, begin_after, call_tool)
        except ValueError as error:
            exchange.error = str(error)
        self.exchanges.append(exchange)
        return exchange

    def regenerate(self, *args: Any, **kwargs: Any) -> Exchange:
        """Ask the last question again and replace its answer. Takes the arguments of `ask` after the question."""
        self.stop()
        last = self.exchanges.pop()
        return self.ask(last.question, *args, images=last.images, **kwargs)

    def branch(self, index: int) -> Conversation:
        """Return a new conversation with the exchanges before `index`; this one stays as it is."""
        return Conversation(self.exchanges[:index], system=self.system)

    def stop(self) -> None:
        """End the answer that is being written; its text stays part of the conversation."""
        if self.running:
            self.exchanges[-1].stop()
