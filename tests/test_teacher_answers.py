"""data_process.py distill, with a server that is busy, breaks and refuses as real ones do."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest

from common.errors import UserError
from data_pipeline.readers import iter_records
from data_pipeline.records import parse_conversation, parse_prompt
from data_pipeline.teacher_answers import TeacherAPI, _ask_all


class Server(ThreadingHTTPServer):
    """Answers "re: QUESTION". Questions with a word of `troubles` get that status the first times they are asked."""

    def __init__(self, troubles: dict[str, list[int]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles, self.asked, self.requests = troubles, Counter(), []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        self.server.requests.append(body)
        word = next((word for word in self.server.troubles if word in question), None)
        statuses = self.server.troubles.get(word or "", [])
        number = self.server.asked[question]
        self.server.asked[question] += 1
        status = statuses[min(number, len(statuses) - 1)] if statuses else 200
        finish = "length" if status == 201 else "stop"
        message = {"role": "assistant", "content": f"re: {question}", "reasoning_content": "hm"}
        if "slow" in question:
            time.sleep(1)
        answer = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        }  # fmt: skip
        error = {"error": {"message": f"trouble {status}"}}
        data = (
            b"<html>sign in</html>" if status == 203 else json.dumps(answer if status in (200, 201) else error).encode()
        )
        self.send_response(200 if status < 300 else status)
        self.send_header("Content-Type", "text/html" if status == 203 else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "5")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(**troubles: list[int]) -> Iterator[Server]:
    server = Server(troubles)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "easy one"},
        {"messages": [{"role": "user", "content": "busy two"}, {"role": "assistant", "content": "an old answer"}]},
        {"instruction": "cut three", "output": "x"},
        {"prompt": "easy one"},
        {"prompt": ""},
        {"conversations": [{"from": "human", "value": "refused four"}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n", encoding="utf-8")
    return path


def test_answers_are_collected_and_what_is_missing_is_listed(run_here, prompts, tmp_path):
    with serve(busy=[429, 503, 200], cut=[201], refused=[400]) as server:
        flags = ["--endpoint", server.url, "--model", "big", "--out_dir", tmp_path, "--system", "Be brief."]
        result = run_here("data_process.py", "distill", "--input", prompts, *flags, "--requests_per_minute", 6000)
    assert result.returncode == 0, result.stderr
    output = tmp_path / "distill_data.jsonl"
    dialogues = [parse_conversation(record.data) for record in iter_records(output, None)]
    assert sorted(d[-1]["content"] for d in dialogues) == ["re: busy two", "re: easy one"]
    assert all(d[0] == {"role": "system", "content": "Be brief."} for d in dialogues)
    assert all(d[-1]["reasoning_content"] == "hm" for d in dialogues)
    assert server.asked["busy two"] == 3 and server.asked["easy one"] == 1
    assert {request["model"] for request in server.requests} == {"big"}
    assert server.requests[0]["max_tokens"] == 512 and server.requests[0]["temperature"] == 0.7
    listed = (tmp_path / "distill_data.rejects.jsonl").read_text(encoding="utf-8")
    for reason in (
        "cut off at --max_tokens",
        "answered 400: Error code: 400 - trouble 400",
        "no question",
        "invalid JSON",
    ):
        assert reason in listed, listed
    assert "dropped: duplicate" in result.stdout


@pytest.mark.parametrize("torn", ['{"messages": [{"role": "us', '{"mes', ""])
def test_a_stopped_run_goes_on_where_it_was(run_here, prompts, tmp_path, torn):
    flags = ["--model", "big", "--out_dir", tmp_path, "--parallel", 1, "--input", prompts]
    with serve(cut=[401]) as server:
        result = run_here("data_process.py", "distill", "--endpoint", server.url, *flags)
    assert result.returncode == 1 and "refuses the model big or the key" in result.stderr
    output = tmp_path / "distill_data.jsonl"
    assert len(output.read_text(encoding="utf-8").splitlines()) == 2
    with output.open("a", encoding="utf-8") as file:
        file.write(torn)  # the power failed
    with serve() as server:
        result = run_here("data_process.py", "distill", "--endpoint", server.url, *flags)
    assert result.returncode == 0, result.stderr
    assert "2 answers are there already" in result.stdout and server.asked.keys() == {"cut three", "refused four"}
    assert len(output.read_text(encoding="utf-8").splitlines()) == 4
    result = run_here("data_process.py", "distill", "--endpoint", server.url, *flags, "--temperature", 0)
    assert result.returncode == 1 and "choose another --output" in result.stderr
    assert f"{output}, line 1: an answer of" in result.stderr
    output.write_text("{}\nno JSON\n", encoding="utf-8")  # the same name, but a file of something else
    result = run_here("data_process.py", "distill", "--endpoint", server.url, *flags)
    assert result.returncode == 1 and f"{output}, line 1: an answer of an unknown model" in result.stderr
    assert output.read_text(encoding="utf-8") == "{}\nno JSON\n"


@pytest.mark.parametrize(
    "content",
    [
        '[{"prompt": "a"}]',
        '{"prompt": "a"}\n{"prompt": "b"}',
        '{"messages": 3}\n',
        '{"messages": [{"role": "user", "content": "a"}]}',
        "x",
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(run_here, prompts, tmp_path, content):
    output = tmp_path / "mine.jsonl"
    output.write_text(content, encoding="utf-8")
    flags = ["--input", prompts, "--out_dir", tmp_path, "--output", "mine.jsonl", "--model", "m"]
    result = run_here("data_process.py", "distill", *flags, "--endpoint", "http://127.0.0.1:9/v1")
    assert result.returncode == 1 and "mine.jsonl, line 1: an answer of an unknown model" in result.stderr
    assert output.read_text(encoding="utf-8") == content


def test_answers_that_came_are_kept_when_another_request_ends_the_run(monkeypatch):
    monkeypatch.setattr("data_pipeline.teacher_answers.RETRIES", 0)

    def prompts():
        for text in ("refused", "quick 1", "quick 2"):
            yield Path("x"), 1, [{"role": "user", "content": text}]
        time.sleep(1)  # meanwhile all are answered, the refused one first
        yield Path("x"), 1, [{"role": "user", "content": "quick 3"}]

    kept = []
    with (
        serve(refused=[429]) as server,
        openai.OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
        pytest.raises(UserError, match="gives no more answers now"),
    ):
        for *_, answer in _ask_all(client, TeacherAPI(server.url, "m", parallel=8), prompts()):
            kept.append(answer["content"])
    assert sorted(kept) == ["re: quick 1", "re: quick 2"]


def test_answers_are_passed_on_while_the_next_request_has_to_wait():
    def prompts():
        for n in range(3):
            yield Path("x"), 1, [{"role": "user", "content": f"quick {n}"}]

    with serve() as server, openai.OpenAI(base_url=server.url, api_key="x") as client:
        asked_when_it_came = []
        for _ in _ask_all(client, TeacherAPI(server.url, "m", requests_per_minute=120, parallel=8), prompts()):
            asked_when_it_came.append(len(server.requests))
    assert asked_when_it_came == [1, 2, 3]


@pytest.mark.parametrize(
    ("status", "said"),
    [(203, "is not an OpenAI-compatible API: it replied '<html>sign in</html>'"), (202, "is no answer")],
)
def test_a_reply_that_is_no_completion_is_an_error(run_here, prompts, tmp_path, status, said):
    flags = ["--input", prompts, "--out_dir", tmp_path, "--model", "m", "--parallel", 1]
    with serve(**{word: [status] for word in ("easy", "busy", "cut", "refused")}) as server:
        result = run_here("data_process.py", "distill", *flags, "--endpoint", server.url)
    assert result.returncode == 1 and said in result.stderr


def test_tools_and_calls_are_sent_as_the_api_has_them(run_here, tmp_path):
    row = {
        "tools": [{"name": "add", "parameters": {}}],
        "messages": [
            {"role": "user", "content": "1 + 2, 3 + 4"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "add", "arguments": {"a": n}} for n in (1, 3)],
            },
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "7"},
        ],
    }
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--input", tmp_path / "prompts.jsonl", "--out_dir", tmp_path, "--model", "m"]
    with serve() as server:
        result = run_here("data_process.py", "distill", *flags, "--endpoint", server.url)
    assert result.returncode == 0, result.stderr
    (request,) = server.requests
    assert request["tools"] == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    *_, calls, first, second = request["messages"]
    assert [json.loads(call["function"]["arguments"]) for call in calls["tool_calls"]] == [{"a": 1}, {"a": 3}]
    assert [first["tool_call_id"], second["tool_call_id"]] == [call["id"] for call in calls["tool_calls"]]
    assert len({first["tool_call_id"], second["tool_call_id"]}) == 2


def test_bad_input(run_here, prompts, tmp_path, monkeypatch):
    def error(*flags: object) -> str:
        result = run_here("data_process.py", *flags, "--out_dir", tmp_path)
        assert result.returncode in (1, 2), result.stderr
        return result.stderr

    assert "distill needs --input" in (message := error("distill", "--output", "x.csv"))
    assert "must be a name that ends in .jsonl" in message and "--endpoint URL and --model NAME" in message
    assert "--endpoint is for the stage distill and does nothing for sft" in error("sft", "--endpoint", "http://x/v1")
    monkeypatch.setattr("data_pipeline.teacher_answers.RETRIES", 0)
    with serve() as server:
        closed = server.url
    assert "does not answer" in error("distill", "--input", prompts, "--endpoint", closed, "--model", "m")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"q": "one?", "a": "1", "history": '[["zero?", "0"]]'}, ["zero?", "0", "one?"]),
        ({"prompt": "one?", "response": "1", "history": [["zero?", "0"]]}, ["zero?", "0", "one?"]),
        ({"prompt": "one?", "system": "short"}, ["short", "one?"]),
        ({"prompt": '[{"role": "user", "content": "one?"}]'}, ["one?"]),
    ],
)
def test_prompts_of_rows(row, expected):
    assert [message["content"] for message in parse_prompt(row)] == expected
