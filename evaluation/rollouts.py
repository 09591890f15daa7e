"""Rollouts: questions with the way to check their answers, and a model's answers to them, tools included.

    prompts = read_prompts([Path("rlvr.jsonl")], tokenizer, max_tokens=256)
    generator = BatchGenerator(model, rows=64, backend=choose_backend(model))
    for rollout in run_rollouts(generator, tokenizer, prompts, [SamplingParams(max_new_tokens=64)] * len(prompts)):
        print(rollout.text, rollout.reward.correct)

A rollout ends when the model answers without calling a tool. Until then its calls are run, and it goes on after their
responses. Used to measure a model, and by `trainer.rollouts` to train one.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from data_pipeline.readers import Record
from data_pipeline.records import Malformed, parse_prompt
from data_pipeline.sequences import content_hash
from data_pipeline.tokenize_chats import NothingToTrainOn, collect_rows
from evaluation.judges import JudgeFunction
from evaluation.tools import TOOLS, Tool, call_tool, tool_schema
from evaluation.verifiers import Reward, Verifier, parse_verifier
from inference.backends import choose_backend
from inference.generator import BatchGenerator, TokenOutput
from inference.options import SamplingParams
from model.chat_format import Message, check_messages, render_chat, with_tools
from model.chat_parser import THINK, parse_answer
from model.tokenizer import EOS_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model.model import Transformer

MAX_TOOL_CALLS = 4  # in one rollout
ASKED_AT_A_TIME = 8  # judges
NO_ROOM = "too long: the question leaves no room for an answer"
NOT_A_PROMPT = "not a valid prompt"


@dataclass(frozen=True)
class RolloutPrompt:
    """A question, and how its answer is checked.

    Attributes:
        ids: of the chat, with the header of the answer.
        answer: the reference that `verifier` compares with.
        tools: those that the model may call, by name.
        opening: the text in `ids` with which the answer begins: "<think>" where it has to think, or nothing.
    """

    messages: list[Message]
    ids: list[int]
    answer: str
    verifier: Verifier
    tools: Mapping[str, Tool]
    opening: str = ""

    def content_hash(self) -> int:
        """Return a 64-bit hash of the content: duplicates have the same."""
        return content_hash([self.ids, self.answer, self.verifier.spec])


def read_prompts(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    *,
    verifier: Verifier | None = None,
    judges: Mapping[str, JudgeFunction] | None = None,
    tools: Mapping[str, Tool] = TOOLS,
    max_dropped: float = 0.0,
) -> list[RolloutPrompt]:
    """Return the prompts of JSONL files with `messages`, `answer` and perhaps `verifier`, `tools`, `enable_thinking`.

    Args:
        max_tokens: of a prompt.
        verifier: for rows that do not name one.
        judges, tools: that rows may name.

    Raises UserError if a file has none, or more than the share `max_dropped` of the rows cannot be used.
    """

    if max_tokens < 1:
        raise UserError(
            "--max_new_tokens leaves nothing of the context for the question: lower it, or raise --max_seq_len"
        )

    def make(record: Record) -> RolloutPrompt:
        prompt = _read_prompt(record, tokenizer, verifier, judges, tools)
        if len(prompt.ids) > max_tokens:
            raise NothingToTrainOn(
                NO_ROOM,
                f": it has {len(prompt.ids)} tokens, and {max_tokens} is the limit, what --max_new_tokens leaves",
            )
        return prompt

    prompts = collect_rows(paths, make, "prompt", NOT_A_PROMPT, max_dropped)
    if verifier is not None and (n_own := sum(prompt.verifier is not verifier for prompt in prompts)):
        print(f"--verifier is for rows without one: {n_own:,} of {len(prompts):,} name their own")
    return prompts


def _read_prompt(
    record: Record,
    tokenizer: PreTrainedTokenizerFast,
    verifier: Verifier | None,
    judges: Mapping[str, JudgeFunction] | None,
    tools: Mapping[str, Tool],
) -> RolloutPrompt:
    data = record.data
    spec, names, thinking = data.get("verifier"), data.get("tools") or [], data.get("enable_thinking")
    messages = parse_prompt({name: value for name, value in data.items() if name != "tools"})
    if not isinstance(names, list):
        raise Malformed("tools must be a list of names")
    if unknown := [name for name in map(_tool_name, names) if name not in tools]:
        raise Malformed(f"there is no tool {unknown[0]}; tools: {', '.join(tools)}; more with --tools")
    mine = {name: tools[name] for name in map(_tool_name, names)}
    messages = with_tools(messages, [tool_schema(function) for function in mine.values()])
    check_messages(messages, answered=False)
    if spec is None and verifier is None:
        raise Malformed("no verifier in the row: add one, or name one for all with --verifier")
    own = parse_verifier(str(spec), judges=judges) if spec is not None else verifier
    assert own is not None
    answer = data.get("answer")
    if answer is None:
        if own.needs_reference:
            raise Malformed("no answer to compare with")
        answer = ""
    reference = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    # GSM8K: the result stands after the way to it.
    if "####" in reference and any(part.name == "number" for part in own.parts):
        reference = reference.rpartition("####")[2].strip().replace(",", "")
    own.check(reference)
    if thinking not in (True, False, None):
        raise Malformed(f"enable_thinking is {thinking!r}; use true, false, or leave it out: then the model chooses")
    ids, _ = render_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)
    return RolloutPrompt(messages, ids, reference, own, mine, THINK if thinking else "")


def _tool_name(tool: Any) -> str:
    """Return the name of a tool that is given by name or by its schema."""
    if isinstance(tool, dict):
        function = tool.get("function")
        tool = (function if isinstance(function, dict) else tool).get("name")
    return str(tool)


@dataclass
class Rollout:
    """A model's way to an answer: what it wrote, and between that what tools returned.

    Attributes:
        ids: of the prompt and of everything after it.
        sampled: which of them the model chose.
        logps: log-probabilities of the chosen ones, if the sampling parameters asked for them.
        text: of the last answer, with its thinking and calls.
        calling: what stands between the prompt and the last answer: answers that call tools, and what the tools return.
        cut: it was stopped, by the limit of an answer, of the context or of calls, and has no reward.
        calls, failed_calls: how many tools it called; how many of these could not be read or returned an error.
    """

    prompt: RolloutPrompt
    ids: list[int]
    sampled: list[bool]
    logps: list[float] = field(default_factory=list)
    text: str = ""
    calling: list[Message] = field(default_factory=list)
    cut: bool = False
    calls: int = 0
    failed_calls: int = 0
    reward: Reward = Reward(0.0, False)

    @property
    def n_sampled(self) -> int:
        return sum(self.sampled)

    def append(self, ids: Sequence[int], sampled: bool) -> None:
        """Add tokens that the model chose, or that were given to it."""
        self.ids += ids
        self.sampled += [sampled] * len(ids)


def run_rollouts(
    generator: BatchGenerator,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[RolloutPrompt],
    samplings: Sequence[SamplingParams],
    max_tool_calls: int = MAX_TOOL_CALLS,
    heartbeat: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """Return a rollout of each prompt with its reward; all are decoded together, as many at a time as there are rows.

    Args:
        samplings: of each prompt; the answers after calls get seeds of their own. `max_new_tokens` is the limit of one
            answer.
        heartbeat: called for every token and every reward.
    """
    rollouts = [Rollout(prompt, [*prompt.ids], [False] * len(prompt.ids)) for prompt in prompts]
    starts = [len(prompt.ids) for prompt in prompts]  # of the answer that each is writing
    turns = [0] * len(prompts)
    waiting = deque(range(len(prompts)))
    while waiting or generator.rows:
        heartbeat()
        if waiting and generator.free:
            keys = [waiting.popleft() for _ in range(min(generator.free, len(waiting)))]
            outputs = generator.add(
                [rollouts[key].ids for key in keys], [_for_turn(samplings[key], turns[key]) for key in keys], keys
            )
        else:
            outputs = generator.step()
        for output in outputs:
            rollout = rollouts[output.key]
            rollout.append([output.token], sampled=True)
            if output.logprob is not None:
                rollout.logps.append(output.logprob)
            if output.finish is None:
                continue
            _end_answer(rollout, starts[output.key], output, tokenizer)
            responses = [] if rollout.cut else _call_tools(rollout, max_tool_calls)
            if responses:
                ids = response_ids(tokenizer, responses)
                rollout.cut = len(rollout.ids) + len(ids) >= generator.max_len
            if responses and not rollout.cut:
                rollout.append(ids, sampled=False)
                rollout.calling.append({"role": "assistant", "content": rollout.text})
                rollout.calling += [{"role": "tool", "content": response} for response in responses]
                starts[output.key], turns[output.key] = len(rollout.ids), turns[output.key] + 1
                waiting.append(output.key)
    _reward([rollout for rollout in rollouts if not rollout.cut], heartbeat)
    return rollouts


def _reward(rollouts: Sequence[Rollout], heartbeat: Callable[[], None]) -> None:
    """Give each rollout its reward. Judges answer over a network: several are asked at a time."""

    def verify(rollout: Rollout) -> Reward:
        messages = [*rollout.prompt.messages, *rollout.calling]
        return rollout.prompt.verifier(rollout.text, rollout.prompt.answer, messages)

    with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
        waits = any(rollout.prompt.verifier.waits for rollout in rollouts)
        for rollout, reward in zip(rollouts, (pool.map if waits else map)(verify, rollouts), strict=True):
            rollout.reward = reward
            heartbeat()


def greedy_rollouts(
    model: Transformer, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[RolloutPrompt], max_new_tokens: int = 96
) -> list[Rollout]:
    """Return the rollouts of a model that always takes the most probable token: how good it is."""
    generator = BatchGenerator(model, min(64, len(prompts)), backend=choose_backend(model))
    return run_rollouts(generator, tokenizer, prompts, [SamplingParams(max_new_tokens=max_new_tokens)] * len(prompts))


def _for_turn(sampling: SamplingParams, turn: int) -> SamplingParams:
    return sampling if sampling.seed is None or not turn else replace(sampling, seed=sampling.seed + turn)


def _end_answer(rollout: Rollout, start: int, last: TokenOutput, tokenizer: PreTrainedTokenizerFast) -> None:
    answer = rollout.ids[start:]
    rollout.cut = last.finish != "stop"
    opening = rollout.prompt.opening if start == len(rollout.prompt.ids) else ""
    rollout.text = opening + str(tokenizer.decode(answer[:-1] if answer[-1] == EOS_ID else answer))


def _call_tools(rollout: Rollout, max_tool_calls: int) -> list[str]:
    """Run the calls of the last answer; return the responses, none if there were no calls or too many."""
    parsed = parse_answer(rollout.text)
    calls: list[object] = [*parsed.calls, *([None] if parsed.malformed else [])]
    if not calls or not rollout.prompt.tools:
        return []
    rollout.calls += len(calls)
    rollout.cut = rollout.calls > max_tool_calls
    if rollout.cut:
        return []
    responses = [call_tool(call, rollout.prompt.tools) for call in calls]
    rollout.failed_calls += sum(response.startswith("error: ") for response in responses)
    return responses


def response_ids(tokenizer: PreTrainedTokenizerFast, responses: Sequence[str]) -> list[int]:
    """Return what stands between an answer that calls tools, which ends in `</s>`, and the next answer."""
    call = {"name": "f", "arguments": {}}
    messages: list[Message] = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        *({"role": "tool", "content": response} for response in responses),
    ]
    ids, in_answer = render_chat(tokenizer, messages, add_generation_prompt=True)
    end = max(i for i, inside in enumerate(in_answer) if inside)
    return ids[end + 1 :]
