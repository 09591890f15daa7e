"""6-rlvr_train.py as a user runs it: what is rewarded is learned, exactly again after a resume, and trouble is named."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment, error_of, torchrun

from model.chat_format import render_chat
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

SCRIPT = "6-rlvr_train.py"
SHAPE = dict(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=96)
QUESTIONS = ["red", "blue", "green", "pink"]  # the answer to all of them is 3
QUICK = (
    "--device cpu --dtype float32 --batch_size 4 --group_size 16 --max_new_tokens 6 --learning_rate 2e-3 --val_fraction 0 "
    "--max_steps 3 --show_interval 5"
).split()


@pytest.fixture
def run(run_here) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_here, SCRIPT)


def chat(question: str, answer: int) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": str(answer)}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Weights that answer every question with one of four numbers, by chance."""
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model = Transformer(LMConfig(**SHAPE, initializer_range=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rendered = [render_chat(tokenizer, chat(q, n)) for q in QUESTIONS for n in range(1, 5)]
    longest = max(len(ids) for ids, _ in rendered)
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in rendered])
    masks = torch.tensor([[*mask, *[False] * (longest - len(mask))] for _, mask in rendered])
    for _ in range(25):
        model(ids, labels=ids.masked_fill(~masks, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("base") / "full_sft_32.pth"
    save_checkpoint(path, model, info={"stage": "full_sft", "step": 7, "tokenizer_hash": tokenizer_hash(tokenizer)})
    return path


def prompt(i: int, **fields) -> dict:
    messages = [{"role": "user", "content": QUESTIONS[i % 4]}]
    return {"messages": messages, "answer": "3", "verifier": "number"} | fields


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", [prompt(i) for i in range(4)])


def weights(out_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(out_dir / "rlvr_32.pth", weights_only=True)


def metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "rlvr_32.metrics.jsonl").read_text().splitlines()]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_rewarded_is_learned_and_a_resumed_run_repeats_it(run, base, tmp_path):
    data = write(tmp_path / "prompts.jsonl", [prompt(i, kind=i) for i in range(4)])
    held_out = write(tmp_path / "more.jsonl", [prompt(i) | {"messages": chat(QUESTIONS[i], 0)[:1]} for i in range(4)])
    flags = [*QUICK, "--data_path", data, held_out, "--init_from", base, "--out_dir", tmp_path, "--beta", 0.001]
    flags += "--max_steps 20 --save_interval 10 --val_fraction 0.3 --val_interval 10 --show_interval 5".split()
    result = run(*flags)
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path)
    first, last = lines[0], lines[-1]
    assert 0.1 < first["accuracy"] < 0.45 and last["accuracy"] > 0.7 and last["val_accuracy"] == 1
    # On-policy in float32: sampler and trainer agree, so that no ratio is clipped; nothing has moved from the reference.
    assert all(line["sampler_difference"] < 1e-4 and line["clip_share"] == 0 for line in lines)
    assert first["kl_estimate"] < 1e-9 < last["kl_estimate"]
    assert first["entropy"] > last["entropy"] and first["answer_length"] == pytest.approx(2, abs=0.2)
    assert {"reward", "cut", "tool_calls", "failed_calls", "equal_rewards", "rollout_tokens_per_second"} <= first.keys()
    shown = re.findall(
        r"--- a rollout of step (\d+), reward ([01]) \(the answer is (3)\)", result.stderr + result.stdout
    )
    assert [step for step, _, _ in shown] == ["1", "6", "11", "16"]
    assert load_checkpoint(tmp_path / "rlvr_32.pth").info["stage"] == "rlvr" and (tmp_path / "rlvr_32.png").exists()
    whole = weights(tmp_path)
    result = run(*flags, "--resume", tmp_path / "rlvr_32.resume" / "step_00000010")
    assert result.returncode == 0 and "resuming after step 10" in result.stdout
    assert same(weights(tmp_path), whole)
    assert [line["reward"] for line in metrics(tmp_path)] == [line["reward"] for line in lines]
    message = error_of(run(*flags, "--resume", tmp_path / "rlvr_32.resume" / "step_00000010", "--algorithm", "rloo"))
    assert "objective.algorithm: grpo -> rloo" in message


@pytest.mark.parametrize("algorithm", ["dr_grpo", "dapo", "cispo", "rloo", "ppo"])
def test_every_algorithm_learns(run, base, prompts, tmp_path, algorithm):
    """DAPO and PPO with two steps on each generation."""
    flags = [*QUICK, "--data_path", prompts, "--init_from", base, "--out_dir", tmp_path, "--algorithm", algorithm]
    flags += ["--max_steps", 14, "--save_interval", 10]
    twice = algorithm in ("dapo", "ppo")
    result = run(*flags, *(["--steps_per_generation", 2] if twice else []))
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path)
    assert lines[-1]["accuracy"] > lines[0]["accuracy"] + 0.2
    assert weights(tmp_path).keys() == torch.load(base, weights_only=True).keys()  # no value function in it
    if algorithm == "ppo":
        assert lines[-1]["value_loss"] < 0.4 * lines[-1]["accuracy"]  # 0.5 times: that of a value of 0
    if twice:  # in every second step the ratio has moved away from 1
        assert any(line["clip_share"] > 0 for line in lines[1::2])
        assert not any(line["clip_share"] > 0 for line in lines[::2])
        assert all(line["rollout_tokens_per_second"] < 1e6 for line in lines[1::2])
        assert not any("rollout_tokens_per_second" in line for line in lines[::2])
        whole = weights(tmp_path)
        assert run(*flags, "--resume", tmp_path / "rlvr_32.resume" / "step_00000010").returncode == 0
        assert same(weights(tmp_path), whole)


def test_two_processes_do_what_one_does(run, base, prompts, tmp_path):
    """Each answers its part of the prompts, with the random numbers that one process would use."""
    flags = [*QUICK, "--data_path", prompts, "--init_from", base, "--max_steps", 4]
    assert run(*flags, "--out_dir", tmp_path / "one").returncode == 0
    flags += ["--batch_size", 2, "--out_dir", tmp_path / "two"]
    command = [*map(str, [*torchrun(2), SCRIPT, *flags])]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert [one[name] for name in ("reward", "answer_length")] == [
            two[name] for name in ("reward", "answer_length")
        ]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_equal_rewards_leave_the_weights_as_they_are_and_are_reported(run, base, tmp_path):
    data = write(tmp_path / "a.jsonl", [prompt(i, answer="77") for i in range(4)])
    result = run(*QUICK, "--data_path", data, "--init_from", base, "--out_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    output = result.stderr + result.stdout
    assert output.count("have equal rewards (the first: 0), and give no gradient") == 1
    assert same(weights(tmp_path), torch.load(base, weights_only=True))
    assert [line["equal_rewards"] for line in metrics(tmp_path)] == [1, 1, 1]


def test_a_verifier_that_raises_ends_no_run(run, base, tmp_path, monkeypatch):
    source = (
        "def picky(answer, reference):\n    if answer != '1': raise RuntimeError('not ' + reference)\n    return 1\n"
    )
    (tmp_path / "my_picky_rewards.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": question, "answer": "x"} for question in QUESTIONS]
    flags = [*QUICK, "--data_path", write(tmp_path / "a.jsonl", rows), "--init_from", base, "--out_dir", tmp_path]
    result = run(*flags, "--verifier", "my_picky_rewards:picky")
    assert result.returncode == 0, result.stderr
    text = "WARNING: a verifier failed, and its answer is not learned from: my_picky_rewards:picky: RuntimeError: not x"
    assert (result.stderr + result.stdout).count(text) == 1
    first = metrics(tmp_path)[0]
    assert 0 < first["accuracy"] < 0.5 and first["verifier_errors"] == pytest.approx(1 - first["accuracy"])


def test_wrong_flags_and_data_are_named_before_any_work(run, base, prompts, tmp_path):
    result = run(
        "--group_size", 1, "--fsdp", "--beta", -1, "--epsilon", 0, "--max_new_tokens", 0, "--gamma", 0.9,
        "--out_dir", tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    for part in (
        "--group_size 1: grpo compares",
        "--fsdp and --deepspeed do not",
        "--beta -1",
        "--epsilon 0",
        "_tokens 0",
        "--gamma is for --algorithm ppo and does nothing for grpo",
    ):
        assert part in result.stderr, part
    assert "--epsilon does nothing for --algorithm cispo" in run("--algorithm", "cispo", "--epsilon", 0.5).stderr
    flags = [*QUICK, "--init_from", base, "--out_dir", tmp_path]
    assert "a.jsonl; name your prompts" in error_of(run(*flags, "--data_path", tmp_path / "a.jsonl"))
    assert "'nothing' is unknown; verifiers: exact" in error_of(
        run(*flags, "--data_path", prompts, "--verifier", "nothing")
    )
    long = write(tmp_path / "long.jsonl", [prompt(0), prompt(1) | {"messages": chat("word " * 90, 0)[:1]}])
    message = error_of(run(*flags, "--data_path", long))
    assert f"{long}:2: too long: the question leaves no room for an answer: it has" in message
