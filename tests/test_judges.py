"""Judges: a model behind an API and a reward model grade answers, alone and in a run of 6-rlvr_train.py."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from common.errors import UserError
from evaluation.judges import Judge, RewardModel
from evaluation.rollouts import read_prompts
from evaluation.verifiers import parse_verifier
from model.tokenizer import load_tokenizer
from tests.test_script_rlvr_train import QUESTIONS, QUICK, base, metrics, write  # noqa: F401  # base is a fixture

CHAT = [{"role": "user", "content": "What is red?"}]


def send(handler: BaseHTTPRequestHandler, kind: str, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


class Handler(BaseHTTPRequestHandler):
    """Answer with what the server's `grade` makes of the request's text."""

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        self.server.asked.append(text)
        message = {"role": "assistant", "content": self.server.grade(text)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        data = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        send(self, "application/json", data.encode())

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def judge_that(grade):
    """Serve a judge; yield (address, what it was asked)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.grade, server.asked = grade, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", server.asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("reply", "reward"),
    [("7", 0.7), ("10/10", 1.0), ("Grade: 3.", 0.3), ("<think>2 and 8</think>0", 0.0), ("good", None), ("11", None),
     ("4 or 5", None), ("10 / 10", 1.0), ("-3", None), ("8.5", None), ("打分：9。", 0.9)],
)  # fmt: skip
def test_a_grade_becomes_a_reward(reply, reward):
    with judge_that(lambda text: "10" if "2 + 2" in text else reply) as (url, asked):
        verifier = parse_verifier("judge:2,length=50", judges={"judge": Judge(url, "m")})
        result = verifier("<think>hm</think>a colour", "of blood", CHAT)
    if reward is None:
        assert result.value == 0 and f"the reply is {reply!r}" in result.errors[0]
    else:
        assert result == (pytest.approx(2 * reward + 1), reward == 1, ())
    # It sees the conversation, the reference and what a user would read, without the thinking.
    assert all(part in asked[-1] for part in ("user: What is red?", "of blood", "<answer>\na colour\n</answer>"))


def test_a_judge_that_cannot_be_asked_is_named_before_any_work():
    with judge_that(lambda text: "I cannot grade that") as (url, _), pytest.raises(UserError, match="does not grade"):
        Judge(url, "m")
    with pytest.raises(UserError, match="cannot be asked"):
        Judge("http://127.0.0.1:9/v1", "m", retries=0)
    with pytest.raises(UserError, match="verifier 'judge' needs --judge_url and --judge_model"):
        parse_verifier("number,judge")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A folder with a small classifier of random weights, and our tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    shape = dict(vocab_size=6400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1, pad_token_id=0)).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "no_classifier")
    load_tokenizer().save_pretrained(folder / "no_classifier")
    LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=2)).save_pretrained(folder / "two")
    load_tokenizer().save_pretrained(folder / "two")
    shutil.copytree(folder / "two", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"nothing")
    shutil.copytree(folder / "two", folder / "strict")
    LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1)).save_pretrained(folder / "strict")
    (folder / "strict" / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    return folder


def test_a_reward_model_sees_the_chat(reward_model):
    model = RewardModel(reward_model)
    reward = parse_verifier("reward_model", judges={"reward_model": model})("a colour", "unused", CHAT).value
    ids = load_tokenizer().apply_chat_template([*CHAT, {"role": "assistant", "content": "a colour"}], return_dict=False)
    classifier = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    with torch.no_grad():
        expected = classifier(torch.tensor([ids])).logits.item()
    assert reward == pytest.approx(torch.tensor(expected).sigmoid().item(), rel=1e-4, abs=1e-5) and reward != 0.5


def test_a_page_that_is_no_reply_is_named(monkeypatch):
    monkeypatch.setattr(Handler, "do_POST", lambda self: send(self, "text/html", b"<html>welcome</html>"))
    with judge_that(None) as (url, _), pytest.raises(UserError, match="does not grade answers: .*welcome"):
        Judge(url, "m")


def test_prompts_without_an_answer_are_for_judges_only(tmp_path):
    tokenizer, judges = load_tokenizer(), {"judge": lambda answer, reference, messages: 1.0}
    path = write(tmp_path / "a.jsonl", [{"question": "Tell me something.", "verifier": "judge,length=50:0.1"}])
    (prompt,) = read_prompts([path], tokenizer, 64, judges=judges)
    assert prompt.answer == "" and prompt.verifier("x", "", CHAT).value == pytest.approx(1.1)
    path = write(tmp_path / "b.jsonl", [{"question": "Tell me something.", "verifier": "judge,exact"}])
    with pytest.raises(UserError, match="no answer to compare with"):
        read_prompts([path], tokenizer, 64, judges=judges)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("no_classifier", "not a trained reward model: score.weight"),
        ("two", "has 2 outputs"),
        ("none", "no config.json"),
    ],
)
def test_what_is_no_reward_model_is_refused(reward_model, folder, message):
    with pytest.raises(UserError, match=message):
        RewardModel(reward_model / folder)


def test_training_with_judges(run_here, base, reward_model, tmp_path):  # noqa: F811
    data = write(tmp_path / "a.jsonl", [{"question": question, "answer": ""} for question in QUESTIONS])
    flags = ["6-rlvr_train.py", *QUICK, "--data_path", data, "--init_from", base, "--out_dir", tmp_path]
    with judge_that(lambda text: "10" if "<answer>\n2\n" in text or "2 + 2" in text else "1") as (url, asked):
        judges = ["--judge_url", url, "--judge_model", "m", "--reward_model", reward_model]
        result = run_here(*flags, "--max_steps", 16, *judges, "--verifier", "judge,reward_model:0.001")
        assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path)
    assert lines[0]["accuracy"] < 0.5 < lines[-1]["accuracy"] and lines[-1]["verifier_errors"] == 0
    assert len(asked) > 16 * 4 * 16 * 0.9 and "user: red" in "".join(asked)
    graded = []

    def leave(text: str) -> str:
        """Grade the trial and the first step, and then nothing."""
        graded.append(text)
        return "5" if len(graded) < 66 else "gone"

    with judge_that(leave) as (url, _):
        result = run_here(*flags, "--judge_url", url, "--judge_model", "m", "--verifier", "judge", "--overwrite")
    assert result.returncode == 1
    assert "the judge graded none of 64 answers: judge: ValueError: a number from 0 to 10" in result.stderr
    result = run_here(*flags, "--judge_url", "http://127.0.0.1:9/v1", "--overwrite")
    assert result.returncode == 2 and "--judge_url and --judge_model belong together" in result.stderr
