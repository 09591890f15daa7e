"""bench/compare.py: figures, transcript, and a judge behind a real HTTP endpoint."""

from __future__ import annotations

import importlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.files import atomic_folder
from export.huggingface import describe, write_llama
from model.LMConfig import LMConfig
from model.lora import add_adapter, save_adapter
from model.model import Transformer
from model.tokenizer import TOKENIZER_DIR, load_tokenizer, tokenizer_hash
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

compare = importlib.import_module("bench.compare")
TINY = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96, initializer_range=0.3)
QUESTIONS = ["你好", "Who are you?", "Why?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """A checkpoint, an adapter on it, and its export."""
    out = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    path = out / "full_sft_32.pth"
    save_checkpoint(path, Transformer(LMConfig(**TINY)), info={"tokenizer_hash": tokenizer_hash(load_tokenizer())})
    base = load_checkpoint(path)
    with atomic_folder(out / "full_sft_32-llama", hidden=False) as folder:
        write_llama(folder, base.model, TOKENIZER_DIR, torch.float32, describe(base, "float32"))
    model = add_adapter(base.model, rank=4, alpha=8.0, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(out / "lora_x_32", model, base, {"stage": "lora"})
    return [path, out / "lora_x_32", out / "full_sft_32-llama"]


@pytest.fixture
def judge():
    """An endpoint that gives the longer answer more points, then breaks the rules once, then fails."""
    seen: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "body": body})
            if len(seen) > 2:
                self.send_response(400)
                self.end_headers()
                return
            answers = re.findall(r"(\w):\n<answer>\n(.*?)\n</answer>", body["messages"][1]["content"], re.DOTALL)
            ranks = sorted({len(text) for _, text in answers})
            content = json.dumps({"scores": {letter: 1 + ranks.index(len(text)) for letter, text in answers}})
            if len(seen) == 2:
                content = f"Here you are: {content}"
            message = {"role": "assistant", "content": content}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "fake",
                     "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    server.shutdown()
    server.server_close()


@pytest.fixture
def main(monkeypatch):
    def call(*args) -> None:
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, args)])
        monkeypatch.setattr(compare, "use_utf8", lambda: None)  # pytest's streams cannot be reconfigured
        compare.main()

    return call


def test_figures():
    repeated, new = [1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4, 5]
    assert compare.repetition(repeated) == pytest.approx(1 / 5) and compare.repetition(new) == 0
    assert compare.repetition([1, 2, 3]) is None
    assert compare.distinct([repeated, new], 1) == pytest.approx(5 / 13)
    assert compare.distinct([repeated, new], 2) == pytest.approx(5 / 11) and compare.distinct([[1]], 2) is None
    answers = [compare.Answer("", repeated, True, 1.0), compare.Answer("", [1, 2], False, 1.0)]
    found = compare.figures(answers)
    assert (found["length"], found["ended"], found["tokens_per_second"]) == (5, 0.5, 5)
    assert found["repetition"] == pytest.approx(1 / 5)  # an answer without 4-grams does not count


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('```json\n{"scores": {"A": 1, "B": 2}}\n```', "not JSON"),
        ('{"A": 1, "B": 2}', "not of the form"),
        ('{"scores": {"A": 1, "B": 2}, "why": ""}', "not of the form"),
        ('{"scores": {"A": 1}}', "scores for A instead of A, B"),
        ('{"scores": {"A": 1, "B": 2, "C": 3}}', "scores for A, B, C instead"),
        ('{"scores": {"A": 0, "B": 2}}', "A got 0"),
        ('{"scores": {"A": true, "B": 2}}', "A got True"),
        ('{"scores": {"A": 1, "B": 2.5}}', "B got 2.5"),
        ("", "not JSON"),
    ],
)
def test_verdicts_are_read_strictly(text, reason):
    with pytest.raises(ValueError, match=reason):
        compare.parse_verdict(text, "AB")
    assert compare.parse_verdict(' {"scores": {"B": 10, "A": 1}}\n', "AB") == {"A": 1, "B": 10}


def test_three_kinds_of_model_and_a_judge(models, judge, tmp_path, main, capsys):
    url, seen = judge
    file, output = tmp_path / "questions.txt", tmp_path / "out" / "compare.md"
    file.write_text("\n\n".join(QUESTIONS), encoding="utf-8")
    common = ["--questions", file, "--output", output, "--max_new_tokens", 12, "--temperature", 1, "--seed", 3]
    main(*models, *common, "--judge_base_url", url, "--judge_model", "fake")
    printed, text = capsys.readouterr().out, output.read_text(encoding="utf-8")
    record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    names = [path.name for path in models]

    assert [row["model"] for row in record["figures"]] == names
    answers = [row["answers"] for row in record["questions"]]
    assert [row["question"] for row in record["questions"]] == QUESTIONS
    assert all(row[names[0]] == row[names[2]] for row in answers)  # an export answers like its source
    assert any(row[names[0]] != row[names[1]] for row in answers)  # an adapter does not
    assert all(0 < row["length"] <= 12 and row["tokens_per_second"] > 0 for row in record["figures"])

    # The judge saw the answers under letters, in an order that changes, and no name of a model.
    assert seen[0]["path"] == "/v1/chat/completions" and seen[0]["body"]["model"] == "fake"
    asked = [call["body"]["messages"][1]["content"] for call in seen[:3]]
    assert not any(name in json.dumps(call["body"]) for call in seen for name in names)
    assert all(QUESTIONS[i] in asked[i] for i in range(3))
    assert record["judge"] == {"model": "fake", "failed": 2}
    verdicts = [row["verdict"] for row in record["questions"]]
    assert "not JSON" in verdicts[1]["failure"] and "400" in verdicts[2]["failure"]
    lengths = [len(answers[0][name]) for name in names]
    assert verdicts[0]["points"] == [1 + sorted(set(lengths)).index(length) for length in lengths]
    assert [row["points"] for row in record["figures"]] == verdicts[0]["points"]
    assert "gave 1 of 3 verdicts; 2 failed" in text and "question 2: not JSON" in text
    assert "2 of 3 verdicts failed" in printed and all(f"**{name}**" in text for name in names)
    page = output.with_suffix(".html").read_text(encoding="utf-8")
    assert "<table>" in page and all(f"<strong>{name}</strong>" in page for name in names)

    main(*models, *common)  # the same answers again, and no judge
    again = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["answers"] for row in again["questions"]] == answers
    assert again["judge"] is None and "points" not in again["figures"][0] and len(seen) == 3


def test_the_order_shown_to_the_judge_depends_on_the_seed():
    orders = {tuple(compare.random.Random(seed).sample(range(3), 3)) for seed in range(20)}
    assert len(orders) == 6


def test_bad_input(models, tmp_path, main, capsys):
    output, rows, empty = tmp_path / "out.md", tmp_path / "q.jsonl", tmp_path / "empty"
    empty.mkdir()
    rows.write_text('{"question": "好"}\n{"q": 1}\n', encoding="utf-8")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(models[0].read_bytes()[:5000])
    long = tmp_path / "long.txt"
    long.write_text("字" * 400, encoding="utf-8")
    for message, args in {
        "q.jsonl, line 2: no": [models[0], "--questions", rows],
        "missing.txt cannot be read": [models[0], "--questions", tmp_path / "missing.txt"],
        "broken.pth": [models[0], broken],
        "no config.json": [empty],
        "shorten it": [models[0], "--questions", long],
    }.items():
        with pytest.raises(UserError, match=message):
            main(*args, "--output", output)
    for message, args in {
        "belong together": [models[0], "--judge_model", "x"],
        "2 to 26 models": [models[0], "--judge_model", "x", "--judge_base_url", "http://127.0.0.1:9"],
        "must begin with http://": [*models[:2], "--judge_model", "x", "--judge_base_url", "localhost:8000"],
        "empty is a folder": [models[0], "--output", empty],
        "broken.pth is not a folder": [models[0], "--output", broken / "a.md"],
    }.items():
        with pytest.raises(SystemExit):
            main("--output", output, *args)
        assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_judge_that_is_not_there(models, tmp_path, main, capsys):
    """The answers are kept, and the run does not count as done."""
    question, output = tmp_path / "q.txt", tmp_path / "out.md"
    question.write_text(QUESTIONS[0], encoding="utf-8")
    judge = ["--judge_base_url", "http://127.0.0.1:9/v1", "--judge_model", "x", "--judge_timeout", 1]
    with pytest.raises(UserError, match="no verdict at all: check --judge_base_url"):
        main(*models[:2], "--questions", question, "--output", output, "--max_new_tokens", 2, *judge)
    assert "1 of 1 verdicts failed" in capsys.readouterr().out and output.with_suffix(".json").is_file()
