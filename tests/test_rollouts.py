"""Rollouts: prompts that are read, answers that call tools, and the batches that are made of them."""

from __future__ import annotations

import dataclasses
import json
import threading
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from evaluation.rollouts import Rollout, RolloutPrompt, read_prompts, run_rollouts
from evaluation.tools import TOOLS
from evaluation.verifiers import Reward, parse_verifier
from inference.backends import choose_backend
from inference.generator import BatchGenerator, TokenOutput
from inference.options import SamplingParams
from model.chat_format import render_chat
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import EOS_ID, load_tokenizer
from trainer.rollouts import RolloutLoader, Sampler, make_batch

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "3*4"}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row(text: str = "3*4?", answer: object = "12", **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], "answer": answer, "verifier": "number"} | fields


# ---- prompts


def test_prompts_are_read_with_tools_and_thinking(tokenizer, tmp_path):
    rows = [
        row(), row(tools=["calculator"]), row(enable_thinking=False), row(enable_thinking=True), row(answer=12),
        {"question": "How many?", "answer": "3*4=12\n#### 1,012", "verifier": "format:0.1,number"},
        {"prompt": "{}?", "answer": {"type": "object"}, "verifier": "json_schema"},
    ]  # fmt: skip
    plain, tools, direct, thinking, number, gsm, schema = read_prompts(
        [write(tmp_path / "a.jsonl", rows)], tokenizer, 256
    )
    user = {"role": "user", "content": "3*4?"}
    assert plain.ids == render_chat(tokenizer, [user], add_generation_prompt=True)[0]
    assert "calculator" in tokenizer.decode(tools.ids) and list(tools.tools) == ["calculator"]
    assert tokenizer.decode(direct.ids).endswith("assistant\n<think></think>")
    assert tokenizer.decode(thinking.ids).endswith("assistant\n<think>") and thinking.opening == "<think>"
    assert number.answer == "12" and gsm.answer == "1012" and json.loads(schema.answer) == {"type": "object"}
    assert plain.content_hash() != direct.content_hash()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (row(answer="twelve"), "the verifier number cannot use this answer"),
        (row(verifier="numbers"), "verifier 'numbers' is unknown"),
        (row(verifier="os:system"), "functions of your own only with --verifier"),
        (row(tools=["search"]), "there is no tool search"), (row(tools="calculator"), "tools must be a list"),
        (row(answer=None), "no answer to compare with"), (row(verifier=None), "no verifier in the row"),
        (row("x " * 300), "too long: the question leaves no room for an answer: it has"),
        (row(enable_thinking="yes"), "enable_thinking is 'yes'"),
        ({"messages": [{"role": "assistant", "content": "hi"}], "answer": "1", "verifier": "number"}, "roles out of order"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_refused_with_its_line(tokenizer, tmp_path, capsys, wrong, reason):
    path = write(tmp_path / "a.jsonl", [row(), wrong])
    with pytest.raises(UserError, match="1 of 2 rows cannot be used") as error:
        read_prompts([path], tokenizer, 256)
    assert f"{path}:2: " in str(error.value) and reason in str(error.value)
    assert len(read_prompts([path], tokenizer, 256, max_dropped=0.5)) == 1
    assert reason in capsys.readouterr().out
    with pytest.raises(UserError, match="no usable prompt in it"):
        read_prompts([write(path, [wrong])], tokenizer, 256, max_dropped=1)


# ---- rollouts


class Script:
    """A generator whose model writes given answers; `prompts` are those that it was asked to continue."""

    max_len, rows = 320, ()

    def __init__(self, tokenizer, *answers: str, cut: bool = False):
        self.tokenizer, self.answers, self.cut = tokenizer, list(answers), cut
        self.free, self.prompts, self.seeds = 1, [], []

    def add(self, prompts, samplings, keys) -> list[TokenOutput]:
        self.prompts += prompts
        self.seeds += [sampling.seed for sampling in samplings]
        ids = encode_answer(self.tokenizer, self.answers.pop(0)) + ([] if self.cut else [EOS_ID])
        outputs = [TokenOutput(keys[0], token, logprob=-0.5) for token in ids]
        last = outputs.pop()
        return [*outputs, TokenOutput(last.key, last.token, finish="length" if self.cut else "stop", logprob=-0.5)]


def encode_answer(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids  # tags become their control tokens


def rollout_of(
    tokenizer, tmp_path, *answers: str, tools=TOOLS, names=("calculator",), cut=False, max_tool_calls=3, **fields
):
    path = write(tmp_path / "a.jsonl", [row(tools=[*names], **fields)])
    script = Script(tokenizer, *answers, cut=cut)
    prompts = read_prompts([path], tokenizer, 256, tools=tools)
    sampling = SamplingParams(seed=5, logprobs=0)
    (rollout,) = run_rollouts(script, tokenizer, prompts, [sampling], max_tool_calls)
    assert not script.answers, "the rollout ended too early"
    assert len(rollout.ids) == len(rollout.sampled) and len(rollout.logps) == rollout.n_sampled
    return rollout, script


def test_tools_are_called_and_what_they_return_is_not_trained_on(tokenizer, tmp_path):
    rollout, script = rollout_of(tokenizer, tmp_path, CALL, "It is 12.")
    assert rollout.reward.correct and not rollout.cut and (rollout.calls, rollout.failed_calls) == (1, 0)
    assert rollout.calling == [{"role": "assistant", "content": CALL}, {"role": "tool", "content": "12"}]  # for judges
    # The ids are those of the whole chat, as training and serving render it, and so is the mask.
    call = {"name": "calculator", "arguments": {"expression": "3*4"}}
    chat = [
        *rollout.prompt.messages,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "It is 12."},
    ]
    ids, in_answers = render_chat(tokenizer, chat)
    assert rollout.ids == ids[:-1] and rollout.sampled == in_answers[:-1]  # without the line end
    assert script.prompts[1] == rollout.ids[: len(script.prompts[1])]
    assert script.seeds[0] != script.seeds[1]  # the second answer is not drawn with the numbers of the first


def test_bad_calls_are_answered_and_the_rollout_goes_on(tokenizer, tmp_path):
    malformed = '<tool_call>{"name": calculator</tool_call>'
    unknown = '<tool_call>{"name": "search", "arguments": {}}</tool_call>'
    rollout, _ = rollout_of(tokenizer, tmp_path, malformed, unknown, CALL + CALL, "12", max_tool_calls=4)
    assert (rollout.calls, rollout.failed_calls) == (4, 2) and rollout.reward.correct
    text = tokenizer.decode(rollout.ids)
    assert "error: a call must be" in text and "error: there is no tool search" in text
    assert text.count("<tool_response>12</tool_response>") == 2


def test_a_model_that_never_stops_calling_is_cut(tokenizer, tmp_path):
    rollout, _ = rollout_of(tokenizer, tmp_path, CALL, CALL, CALL, CALL)
    assert rollout.cut and rollout.calls == 4 and rollout.reward == (0, False, ())


def test_a_tool_that_hangs_or_fills_the_context(tokenizer, tmp_path, monkeypatch):
    released = threading.Event()

    def hang() -> str:
        released.wait(60)
        return ""

    def long() -> str:
        return "word " * 400

    monkeypatch.setattr("evaluation.tools.call_tool.__defaults__", (TOOLS, 0.05))
    call = '<tool_call>{"name": "%s", "arguments": {}}</tool_call>'
    rollout, _ = rollout_of(tokenizer, tmp_path, call % "hang", "12", tools={"hang": hang}, names=["hang"])
    assert rollout.reward.correct and rollout.failed_calls == 1
    assert "did not answer within 0.05 seconds" in tokenizer.decode(rollout.ids)
    released.set()
    rollout, _ = rollout_of(tokenizer, tmp_path, call % "long", tools={"long": long}, names=["long"])
    assert rollout.cut and not rollout.reward.correct


def test_rewards_of_answers(tokenizer, tmp_path):
    assert rollout_of(tokenizer, tmp_path, "3*4=12", names=[])[0].reward.correct
    assert not rollout_of(tokenizer, tmp_path, "3*4=12", names=[], cut=True)[0].reward.correct  # it has no end
    assert not rollout_of(tokenizer, tmp_path, CALL, names=[])[0].reward.correct  # nobody runs it
    rollout, _ = rollout_of(tokenizer, tmp_path, "3*4=12</think>it is 13", names=[], enable_thinking=True)
    assert rollout.text == "<think>3*4=12</think>it is 13" and not rollout.reward.correct


# ---- sampling and batches


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128, initializer_range=0.1)
    return Transformer(LMConfig(**shape))


@pytest.fixture(scope="module")
def prompts(tokenizer, tmp_path_factory):
    rows = [row(text) for text in ("3*4?", "What is three times four, and who asks?", "三乘四等于几？")]
    return read_prompts([write(tmp_path_factory.mktemp("p") / "a.jsonl", rows)], tokenizer, 128)


def test_the_sampler_and_the_trainer_agree_on_probabilities(model, tokenizer, prompts):
    """In float32, also after the weights have changed: the sampler follows them, and its memory stays where it is."""
    sampler = Sampler(model.train(), torch.float32, rows=4)
    samplings = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=i, logprobs=0) for i in range(6)]
    where = sampler.generator._cache.kv.data_ptr()
    texts = []
    for _ in range(2):
        rollouts = run_rollouts(sampler.refresh(), tokenizer, [*prompts, *prompts], samplings)
        batch = make_batch(rollouts, [torch.zeros(1)] * 6, [False] * 6, "grpo")
        x = batch.inputs
        with torch.no_grad():
            logits = model(
                x["input_ids"], position_ids=x["position_ids"], cu_seqlens=x["cu_seqlens"], logits_to_keep=x["predicts"],
                use_cache=False,
            ).logits[0]  # fmt: skip
        logps = logits.log_softmax(-1).gather(-1, x["targets"][:, None])[:, 0]
        assert (logps - x["sampler_logps"]).abs().max() < 1e-4
        assert batch.n_targets == 6 and batch.n_tokens == sum(len(rollout.ids) for rollout in rollouts)
        texts.append([rollout.ids for rollout in rollouts])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert texts[0] != texts[1] and sampler.generator._cache.kv.data_ptr() == where
    assert model.training


def test_rollouts_do_not_depend_on_what_is_decoded_beside_them(model, tokenizer, prompts):
    model.eval()
    samplings = [SamplingParams(max_new_tokens=8, temperature=1.0, seed=i) for i in range(3)]
    beats: list[int] = []
    generator = BatchGenerator(model, 3, backend=choose_backend(model))
    together = run_rollouts(generator, tokenizer, prompts, samplings, heartbeat=lambda: beats.append(1))
    assert len(beats) >= max(rollout.n_sampled for rollout in together)
    in_turn = run_rollouts(BatchGenerator(model, 1, backend=choose_backend(model)), tokenizer, prompts, samplings)
    assert [rollout.ids for rollout in together] == [rollout.ids for rollout in in_turn]


def test_the_backend_is_not_changed_while_rows_are_decoded(model, prompts):
    generator = BatchGenerator(model.eval(), 2)
    generator.add([prompts[0].ids], [SamplingParams()], [0])
    with pytest.raises(ValueError, match="1 sequences are still being decoded"):
        generator.use_backend(None)


def test_the_verifier_of_the_command_line_is_for_rows_without_one(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [row(), {"question": "?", "answer": "x"}])
    named, other = read_prompts([path], tokenizer, 128, verifier=parse_verifier("exact"))
    assert "--verifier is for rows without one: 1 of 2 name their own" in capsys.readouterr().out
    assert named.verifier("x 12", "12").correct and not other.verifier("a x", "x").correct


def test_an_answer_whose_verifier_failed_is_not_learned_from(prompts):
    """Its advantage is 0, and it does not lower the mean that the other answers to its prompt are compared with."""
    loader = object.__new__(RolloutLoader)
    loader.options = SimpleNamespace(algorithm="dr_grpo", steps_per_generation=1)
    rewards = [Reward(0.9, False), Reward(0.5, False), Reward(0.0, False, ("judge: timeout",))]
    ids, group = prompts[0].ids, []
    for reward in rewards:
        sampled = [False] * len(ids) + [True] * 2
        group.append(Rollout(prompts[0], [*ids, 5, 2], sampled, [0.0] * 2, reward=reward))
    batch = loader._learnable([group])
    assert batch.inputs["advantages"].tolist() == pytest.approx([0.2, 0.2, -0.2, -0.2, 0, 0])
    assert batch.inputs["equal_rewards"].tolist() == [False] * 3
    group[0].reward = Reward(0.5, False)
    assert loader._learnable([group]).inputs["equal_rewards"].all()


def two_answers(prompt: RolloutPrompt, *rewards: Reward, cut: bool = False) -> list[Rollout]:
    """Rollouts of two tokens each; `cut`: the first was cut off."""
    sampled = [False] * len(prompt.ids) + [True] * 2
    return [
        Rollout(prompt, [*prompt.ids, 5, 2], sampled, [0.0] * 2, cut=cut and not i, reward=reward)
        for i, reward in enumerate(rewards)
    ]


def test_a_judge_that_grades_nothing_ends_the_run_even_if_an_answer_was_cut(prompts):
    prompt = dataclasses.replace(prompts[0], verifier=SimpleNamespace(waits=True))
    loader = object.__new__(RolloutLoader)
    loader.options = SimpleNamespace(group_size=2, max_new_tokens=4)
    loader.schedule, loader.data = SimpleNamespace(seed=0), SimpleNamespace(prompts=[prompt])
    loader.numbered = lambda step: [(0, 0)]
    failed = Reward(0.0, False, ("judge: gone",))
    loader._run = lambda prompts, samplings: two_answers(prompt, Reward(0.0, False), failed, cut=True)
    with pytest.raises(UserError, match="the judge graded none of 1 answers: judge: gone"):
        loader._generate(range(1), 1)


def test_validation_compares_the_value_function_with_the_rewards(model, prompts):
    loader = object.__new__(RolloutLoader)
    loader.options = SimpleNamespace(algorithm="ppo", steps_per_generation=1, gamma=1.0, gae_lambda=1.0, group_size=2)
    loader.rank, loader.world_size, loader.dtype, loader.model = 0, 1, torch.float32, model
    loader.value_head = torch.nn.Linear(64, 1)
    loader._sampling = lambda temperature: None
    loader._run = lambda prompts, samplings: two_answers(prompts[0], Reward(1.0, True), Reward(0.0, False))
    (batch,) = loader.shard(SimpleNamespace(prompts=prompts[:2]), [0, 1], 1)
    assert batch.inputs["returns"].tolist() == pytest.approx([1, 1, 0, 0], abs=1e-6)
    assert batch.inputs["old_values"].abs().min() > 0


def test_processes_that_answer_have_a_heartbeat(monkeypatch):
    beats: list[int] = []
    loader = object.__new__(RolloutLoader)
    loader.options = SimpleNamespace(group_size=1, max_tool_calls=1)
    loader.micro_batch, loader.tokenizer, loader._errors = 1, None, set()
    loader.heartbeat = lambda: beats.append(1)
    monkeypatch.setattr(RolloutLoader, "generator", lambda self, rows: None)
    monkeypatch.setattr("trainer.rollouts.run_rollouts", lambda *arguments: arguments[-1]() or [])
    assert loader._run([], []) == [] and beats == [1]
