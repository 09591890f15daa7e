"""Ask a model behind an OpenAI-compatible API to answer prompts, and keep its answers as dialogues to train on.

Distillation without the teacher's weights: https://arxiv.org/abs/2212.10560 made an instruction data set like this.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jsonlines
import openai

from common.errors import UserError
from common.progress import Progress
from data_pipeline.cleaning import Summary, writing
from data_pipeline.readers import iter_records
from data_pipeline.records import PROMPT_COLUMNS, parse_prompt
from data_pipeline.text_files import BadLine
from model.chat_format import Message

_BEGINNING = b'{"messages": '  # of every line of the output
RETRIES = 6  # of one request, after 0.5, 1, 2, 4, 8 and 8 seconds, or when the server says


@dataclass(frozen=True)
class TeacherAPI:
    """A model behind an API.

    Attributes:
        requests_per_minute: at most this many; 0: no limit.
        parallel: requests at a time.
        settings: other fields of a request: max_tokens, temperature, ...
    """

    base_url: str
    model: str
    api_key: str = "none"
    requests_per_minute: float = 0
    parallel: int = 4
    settings: dict[str, Any] = field(default_factory=dict)


def collect_answers(inputs: list[Path], output: Path, endpoint: TeacherAPI, system: str | None = None) -> Summary:
    """Write the answers to all prompts of `inputs` to `output`, JSONL with `messages`.

    Answers are written as they come, and what the output has is not asked again: a run that was stopped continues where it
    was. A prompt is asked once, however often it occurs. Prompts that cannot be read or answered are counted and listed
    beside the output.

    system: message for prompts without one.

    Raises UserError if an input is unusable, the output has answers of another model or with other settings, the server does
    not answer or refuses the key or the model, or no prompt got an answer.
    """
    kept = f"the answers so far are in {output}; the same command continues from there"
    with contextlib.ExitStack() as stack:
        summary = stack.enter_context(writing(inputs, PROMPT_COLUMNS, [output], kept))
        asked = {"model": endpoint.model} | endpoint.settings
        done = _read_done(output, asked)
        if done:
            print(f"{len(done):,} answers are there already, in {output}")
        stack.callback(_delete_if_empty, output)
        writer = stack.enter_context(jsonlines.open(output, "a", flush=True))
        n_rows = sum(1 for path in inputs for _ in iter_records(path, lambda bad: None))
        progress = stack.enter_context(Progress("answers", n_rows, "prompts"))
        client = stack.enter_context(
            openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=RETRIES)
        )
        prompts = _prompts(inputs, system, done, summary, progress)
        unanswered: str | None = None
        for path, line, messages, answer in _ask_all(client, endpoint, prompts):
            progress.update(1)
            if isinstance(answer, str):
                unanswered = unanswered or f"; the first that was asked is {path}:{line}: {answer}"
                summary.drop(path, "no answer", BadLine(line, answer))
            else:
                writer.write({"messages": [*messages, answer], "asked": asked})
                summary.kept += 1
        if not (summary.kept or done):
            hint = unanswered or summary.first_bad_hint()
            raise UserError(f"no prompt of {', '.join(map(str, inputs))} got an answer{hint}")
    summary.kept += len(done)
    summary.written.append(f"wrote {output}: {summary.kept:,} dialogues")
    return summary


def _delete_if_empty(path: Path) -> None:
    if path.exists() and not path.stat().st_size:
        path.unlink()


def _key(messages: list[Message]) -> bytes:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()[:16]


def _read_done(output: Path, asked: dict[str, Any]) -> set[bytes]:
    """Return the keys of the prompts that earlier runs have answered; remove a line that a killed one left incomplete.

    Raises UserError, and changes nothing, if a line is not an answer of this model with these settings.
    """
    if not output.exists():
        return set()
    done: set[bytes] = set()
    n_bytes = 0
    with open(output, "rb") as file:
        for number, line in enumerate(file, 1):
            whole = line.endswith(b"\n")
            try:
                answer = json.loads(line)
                by = answer.get("asked") or "an unknown model"
                key = _key(answer["messages"][:-1])
            except (ValueError, LookupError, TypeError, AttributeError):
                if not whole and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:
                    break  # a run that was killed left it incomplete
                by = "an unknown model"
            if by != asked:
                raise UserError(
                    f"{output}, line {number}: an answer of {by}, and this run asks {asked}: choose another --output"
                )
            if not whole:
                break  # only the end of the line is missing: it is asked again
            done.add(key)
            n_bytes += len(line)
    os.truncate(output, n_bytes)
    return done


def _prompts(
    inputs: list[Path], system: str | None, done: set[bytes], summary: Summary, progress: Progress
) -> Iterator[tuple[Path, int, list[Message]]]:
    """Yield (file, line, messages) of the prompts to ask; count the others."""
    seen = set(done)
    for path in inputs:
        for record in iter_records(path, partial(summary.drop, path, "cannot be read")):
            try:
                messages = parse_prompt(record.data)
            except UserError as reason:
                summary.drop(path, "not a prompt", BadLine(record.line, str(reason)))
                progress.update(1)
                continue
            if system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            key = _key(messages)
            if key in seen:
                if key not in done:
                    summary.dropped["duplicate"] += 1
                progress.update(1)
                continue
            seen.add(key)
            yield path, record.line, messages


def _ask_all(
    client: openai.OpenAI, endpoint: TeacherAPI, prompts: Iterator[tuple[Path, int, list[Message]]]
) -> Iterator[tuple[Path, int, list[Message], Message | str]]:
    """Yield (file, line, messages, answer) as the answers come; instead of an answer, why there is none."""
    pause = 60 / endpoint.requests_per_minute if endpoint.requests_per_minute else 0.0
    questions: queue.Queue[tuple[Path, int, list[Message]]] = queue.Queue()
    answers: queue.Queue[tuple[tuple[Path, int, list[Message]], Message | str | BaseException]] = queue.Queue()

    def work() -> None:
        while True:
            prompt = questions.get()
            try:
                answers.put((prompt, _ask(client, endpoint, prompt[2])))
            except BaseException as error:
                answers.put((prompt, error))

    # Threads of a pool would keep the program from ending until their requests, and all further tries, have ended.
    for number in range(endpoint.parallel):
        threading.Thread(target=work, daemon=True, name=f"request {number}").start()
    waiting, next_start = 0, time.monotonic()
    for prompt in itertools.chain(prompts, itertools.repeat(None)):
        while waiting:  # pass on what comes until the next request may start
            must_wait = prompt is None or waiting >= endpoint.parallel
            try:
                asked, answer = answers.get(timeout=None if must_wait else max(next_start - time.monotonic(), 0))
            except queue.Empty:
                break
            waiting -= 1
            if isinstance(answer, BaseException):
                while not answers.empty():  # what has come until now is kept
                    asked, other = answers.get()
                    if not isinstance(other, BaseException):
                        yield *asked, other
                raise answer
            yield *asked, answer
        if prompt is None:
            return
        time.sleep(max(next_start - time.monotonic(), 0))
        next_start = max(next_start, time.monotonic()) + pause
        questions.put(prompt)
        waiting += 1


def _as_request(messages: list[Message]) -> dict[str, Any]:
    """Return messages and tools as OpenAI's API has them: tools beside the messages, arguments as text, calls with ids."""
    tools: list[dict] = []
    sent: list[Message] = []
    ids: Iterator[str] = iter(())
    for message in messages:
        tools += [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in message.get("tools", [])
        ]
        message = {name: value for name, value in message.items() if name != "tools"}
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                {
                    "id": f"call_{len(sent)}_{number}",
                    "type": "function",
                    "function": call["function"]
                    | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
                }
                for number, call in enumerate(calls)
            ]
            ids = (call["id"] for call in message["tool_calls"])
        elif message["role"] == "tool":
            message["tool_call_id"] = next(ids, "call_unknown")
        sent.append(message)
    return {"messages": sent} | ({"tools": tools} if tools else {})


def _ask(client: openai.OpenAI, endpoint: TeacherAPI, messages: list[Message]) -> Message | str:
    """Return the answer of the model, or why there is none. Raises UserError for what would go wrong for every prompt."""
    create: Any = client.chat.completions.create  # its overloads know no dict of settings
    try:
        reply = create(model=endpoint.model, **_as_request(messages), **endpoint.settings)
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
        raise UserError(
            f"{endpoint.base_url} refuses the model {endpoint.model} or the key: {error.message}"
            + ("; does the address end in /v1?" if isinstance(error, openai.NotFoundError) else "")
        ) from error
    except openai.APIConnectionError as error:
        reason = error.__cause__ or error
        raise UserError(
            f"{endpoint.base_url} does not answer ({reason}), not even when asked {RETRIES + 1} times"
        ) from error
    except openai.RateLimitError as error:
        raise UserError(
            f"{endpoint.base_url} gives no more answers now, after {RETRIES} more tries: {error.message}. Lower "
            "--requests_per_minute or --parallel, or wait"
        ) from error
    except openai.APIStatusError as error:
        return f"the server answered {error.status_code}: {error.message:.200}"
    if isinstance(reply, str):  # the library takes any page with status 200 for a reply
        raise UserError(f"{endpoint.base_url} is not an OpenAI-compatible API: it replied {reply[:80]!r}")
    if not reply.choices:
        return f"the server's reply is no answer: {str(reply)!r:.200}"
    choice = reply.choices[0]
    if choice.finish_reason == "length":
        return "the answer was cut off at --max_tokens"
    answer = {"role": "assistant", "content": choice.message.content or ""}
    if reasoning := getattr(choice.message, "reasoning_content", None):
        answer["reasoning_content"] = reasoning
    if choice.message.tool_calls:
        answer["tool_calls"] = [
            call.model_dump(include={"id", "type", "function"}) for call in choice.message.tool_calls
        ]
    elif not answer["content"].strip():
        return "the answer is empty"
    return answer
