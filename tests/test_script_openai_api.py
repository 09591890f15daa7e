"""my_openai_api.py and chat_openai_api.py as users run them: two processes that talk to each other."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest
import torch
from serving_helpers import NAME, QUESTION, SUM, TOKENIZER, Scripted, answer_ids, serving
from tolerances import close_to, shape_of

from common.cli import parse_options
from common.errors import UserError
from data_pipeline.records import parse_conversation
from export.huggingface import describe, write_llama
from inference.model_finder import require_model
from inference.model_loader import load_text_generator
from inference.options import SamplingParams
from model.LMConfig import LMConfig
from model.lora import add_adapter, save_adapter
from model.model import Transformer
from model.tokenizer import TOKENIZER_DIR
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CPU = ["--device", "cpu", "--dtype", "float32"]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where its dataclasses are looked up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder with a tiny model, an adapter for it, and an export of it."""
    folder = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=2000, initializer_range=0.3)
    path = folder / "full_sft_32.pth"
    save_checkpoint(path, Transformer(config), info={"stage": "full_sft"})
    base = load_checkpoint(path)
    save_adapter(folder / "lora_tiny_32", add_adapter(base.model, rank=2, alpha=4, dropout=0), base, {"name": "tiny"})
    (folder / "export").mkdir()
    checkpoint = load_checkpoint(path)
    write_llama(folder / "export", checkpoint.model, TOKENIZER_DIR, torch.float32, describe(checkpoint, "float32"))
    return folder


@contextlib.contextmanager
def running(*args):
    """(process, port) of a my_openai_api.py."""
    command = [sys.executable, str(ROOT / "my_openai_api.py"), "--port", "0", *CPU, *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    with subprocess.Popen(command, **pipes) as process:
        try:
            for line in process.stdout:
                if found := re.match(r"serving .* at http://127.0.0.1:(\d+)/v1", line):
                    break
            yield process, int(found[1])
        finally:
            process.kill()


def stream_from(port: int, **fields):
    """A file of the answer to a long streaming request that has begun."""
    body = json.dumps(
        {"model": "full_sft_32", "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    for _ in range(600):
        try:
            sock = socket.create_connection(("127.0.0.1", port), timeout=120)
            break
        except OSError:  # it has its address, and does not listen yet
            time.sleep(0.1)
    sock.sendall(head.encode() + body)
    file = sock.makefile("rb")
    assert b" 200 " in file.readline()
    for line in file:
        if b'"delta": {"content"' in line:  # the first text
            return file
    raise AssertionError("the stream ended before the first text")


def test_sigterm_lets_answers_finish(out):
    with running("--weights", out / "full_sft_32.pth", "--drain_seconds", "500") as (process, port):
        file = stream_from(port, max_tokens=1500, temperature=0)
        process.send_signal(signal.SIGTERM)
        rest = file.read().decode()
        assert re.search(r'"finish_reason": "(stop|length)"', rest) and "[DONE]" in rest and '"error":' not in rest
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert "Finished server process" in process.stdout.read()


def test_sigterm_tells_those_that_cannot_finish(out):
    with running("--weights", out / "full_sft_32.pth", "--drain_seconds", "0", "--max_seq_len", "30000") as (
        process,
        port,
    ):
        file = stream_from(port, temperature=0)
        process.send_signal(signal.SIGTERM)
        rest = file.read().decode()
        error = json.loads(re.search(r'data: (\{"error".*)', rest)[1])["error"]
        assert error["code"] == "shutting_down" and error["type"] == "server_error" and "[DONE]" in rest
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_a_server_whose_engine_fails_ends_with_an_error(out):
    code = (
        "import runpy, sys\n"
        "from inference.generator import BatchGenerator\n"
        "def step(self):\n"
        "    BatchGenerator.__init__ = None\n"  # another generator cannot be made
        "    raise RuntimeError('a bug')\n"
        "BatchGenerator.step = step\n"
        f"sys.argv = {['my_openai_api.py', '--port', '0', *CPU, '--weights', str(out / 'full_sft_32.pth')]!r}\n"
        "runpy.run_path('my_openai_api.py', run_name='__main__')\n"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        port = next(int(found[1]) for line in process.stdout if (found := re.match(r"serving .*:(\d+)/v1", line)))
        with socket.create_connection(("127.0.0.1", port), timeout=120) as sock:
            body = b'{"model": "full_sft_32", "messages": [{"role": "user", "content": "hi"}]}'
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert sock.recv(65536).startswith(b"HTTP/1.1 50")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "a bug" in errors and errors.endswith("the reason is above\n")


def test_the_name_the_prefix_cache_and_image_addresses_are_those_of_the_flags(out, run_here):
    def hits(*flags: str) -> int:
        """Ask twice the same question; return how many of its tokens the second one finds in the cache."""
        with running("--weights", out / "full_sft_32.pth", *flags) as (_, port):
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            name = client.models.list().data[0].id
            assert name == ("mine" if "mine" in flags else "full_sft_32")
            for _ in range(2):
                question = [{"role": "user", "content": "long " * 100}]
                client.chat.completions.create(model=name, messages=question, max_tokens=1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                return int(re.search(r"^minimind_prefix_cache_hit_tokens\S* (\d+)", answer.read().decode(), re.M)[1])

    assert hits("--served_model_name", "mine", "--prefix_cache_mb", "0") == 0
    assert hits() > 100
    refused = run_here(
        "my_openai_api.py", *CPU, "--weights", out / "full_sft_32.pth", "--port", 0, "--allow_image_urls"
    )
    assert refused.returncode == 1 and "full_sft_32.pth" in refused.stderr and "image" in refused.stderr


def test_what_can_be_served(out, monkeypatch, capsys):
    script = load_script("my_openai_api")

    def opened(*args):
        monkeypatch.setattr(sys, "argv", ["my_openai_api.py", *CPU, *map(str, args)])
        options = parse_options(script.Options, None).model
        path = options.weights or require_model(options.out_dir, script.CHAT_STAGES, "3-full_sft.py")
        generator = load_text_generator(path, options)
        checkpoint, ids = generator.checkpoint, torch.tensor([[1, 50, 60]])
        with torch.inference_mode():
            return checkpoint.path.name, checkpoint.model(input_ids=ids).logits, generator.tokenizer

    name, plain, _ = opened("--weights", out / "full_sft_32.pth")
    assert name == "full_sft_32.pth"
    assert opened("--out_dir", out)[0] == "lora_tiny_32"  # the newest
    name, merged, _ = opened("--weights", out / "lora_tiny_32")
    assert torch.equal(merged, plain) and name == "lora_tiny_32"  # a fresh adapter adds nothing
    name, exported, tokenizer = opened("--weights", out / "export")
    shape = shape_of(load_checkpoint(out / "full_sft_32.pth").config)
    torch.testing.assert_close(exported, plain, **close_to(plain, **shape))
    assert len(tokenizer) == len(TOKENIZER)
    for wrong in (out / "nothing.pth", out):
        with pytest.raises(UserError):
            opened("--weights", wrong)
    with pytest.raises(UserError, match="run 3-full_sft.py"):
        opened("--out_dir", out / "export")


def test_wrong_flags_and_a_taken_port(monkeypatch, capsys):
    script = load_script("my_openai_api")
    wrong = ["--port", "99999", "--max_rows", "0", "--max_queue", "0", "--drain_seconds", "-1", "--api_key", " "]
    monkeypatch.setattr(sys, "argv", ["my_openai_api.py", *wrong])
    with pytest.raises(SystemExit) as caught:
        parse_options(script.Options, None)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert all(
        f"error: {flag} " in said for flag in ("--port", "--max_rows", "--max_queue", "--drain_seconds", "--api_key")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port"):
        script.bind("127.0.0.1", taken.getsockname()[1])
    monkeypatch.setenv("MINIMIND_API_KEY", "from the environment")
    monkeypatch.setattr(sys, "argv", ["my_openai_api.py"])
    assert parse_options(script.Options, None).api_key == "from the environment"
    assert parse_options(script.Options, None).host == "127.0.0.1"


# ---- the client


@pytest.fixture
def chat(run_here) -> Callable[..., subprocess.CompletedProcess]:
    """Run the client on lines of input."""
    return functools.partial(run_here, "chat_openai_api.py")


@pytest.fixture(scope="module")
def server():
    with serving(api_key="secret") as found:
        yield found


def test_a_conversation(chat, server, tmp_path):
    saved = tmp_path / "chat.jsonl"
    questions = f"你好\nand then?\n/save {saved}\n/clear\n你好\n/exit\n"
    flags = ["--api_key", "secret", "--temperature", "0", "--max_new_tokens", "8", "--system", "系统", "--top_k", "3"]
    result = chat("--base_url", server.url, *flags, input=questions)
    assert result.returncode == 0, result.stderr
    assert f"{NAME} at {server.url}, 1500 tokens" in result.stdout and result.stdout.count("[8 tokens") == 3
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    for end in (3, 5):  # the second answer has seen the first turn
        _, answer, = server.call("POST", "/v1/chat/completions", Authorization="Bearer secret", body={
            "model": NAME, "messages": messages[: end - 1], "temperature": 0, "max_tokens": 8,
        })[1:]  # fmt: skip
        assert json.loads(answer)["choices"][0]["message"]["content"] == messages[end - 1]["content"]


def test_old_turns_are_left_out_when_the_context_is_full(chat, server, monkeypatch):
    long = "x " * 400
    flags = ["--base_url", server.url, "--max_new_tokens", "300", "--temperature", "0"]
    monkeypatch.setenv("MINIMIND_API_KEY", "secret")
    result = chat(*flags, input=f"{long}\n{long}\n{long}\n")
    monkeypatch.delenv("MINIMIND_API_KEY")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("[300 tokens") == 3 and "earlier turns left out]" in result.stdout
    alone = "x " * 1600
    result = chat("--base_url", server.url, "--api_key", "secret", input=f"{alone}\nhi\n")
    assert "not answered" in result.stderr and "1500 tokens" in result.stderr
    assert "tokens/s]" in result.stdout  # of the question after it


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(server):
    command = [sys.executable, str(ROOT / "chat_openai_api.py"), "--base_url", server.url, "--api_key", "secret"]
    command += ["--temperature", "0", "--max_new_tokens", "1400"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    # A test run in the background has Ctrl-C switched off, and its children inherit that.
    listening = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with subprocess.Popen(command, **pipes, **listening) as process:
        process.stdin.write("hi\n")
        process.stdin.flush()
        server.until("minimind_rows_running", 1)
        seen = ""
        while "> " not in seen or len(seen) < seen.index("> ") + 5:  # the prompt, and some text of the answer
            seen += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        server.until("minimind_rows_running", 0)
        out, errors = process.communicate("/save /dev/null\n/exit\n", timeout=120)
        assert process.returncode == 0, errors
        assert "[stopped]" in out and "appended 1 turn to" in out


def test_tools_run_on_the_side_of_the_client(chat, tmp_path, monkeypatch):
    """Calls are shown, run and answered; thoughts are folded; a model that keeps calling is stopped."""
    thoughts = "A sum. " * 40
    monkeypatch.setattr(Scripted, "script", answer_ids(reasoning_content=thoughts, content="So:", tool_calls=[SUM]))
    saved = tmp_path / "chat.jsonl"
    with serving(generator=Scripted) as found:
        result = chat("--base_url", found.url, "--tools", input=f"{QUESTION[0]['content']}\n/save {saved}\n")
        assert result.returncode == 0, result.stderr
        assert "[thinks: A sum. A sum." in result.stdout and "… 280 characters]\nSo:\n" in result.stdout
        assert '[calls calculator {"expression": "3 * (4 + 5)"}]' in result.stdout
        assert "[calculator returns: 27]" in result.stdout and Scripted.answer in result.stdout
        assert "appended 1 turn to" in result.stdout
        monkeypatch.setattr(Scripted, "answer", "")
        monkeypatch.setattr(Scripted, "script", answer_ids(tool_calls=[SUM]))
        endless = chat("--base_url", found.url, "--tools", "calculator", input="again\n")
        assert endless.stdout.count("returns: 27]") == 8 and "stopped after 8 rounds" in endless.stdout
        for name, reason in (("nothing", "'nothing' is unknown"), ("os:nothing", "cannot be imported")):
            assert reason in chat("--base_url", found.url, "--tools", name, input="x\n").stderr
    row = json.loads(saved.read_text(encoding="utf-8"))
    kept = parse_conversation(row)
    assert [message["role"] for message in kept] == ["system", "user", "assistant", "tool", "assistant"]
    assert (
        kept[2]["reasoning_content"] == thoughts
        and kept[2]["tool_calls"][0]["function"]["arguments"] == SUM["arguments"]
    )


def test_an_address_with_a_web_page(chat):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html></html>")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        result = chat("--base_url", f"http://127.0.0.1:{page.server_address[1]}/v1", input="hi\n")
        page.shutdown()
    assert result.returncode == 1 and "is not an OpenAI-compatible API: it replied with a page" in result.stderr


def test_clean_errors(chat, server):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        free = sock.getsockname()[1]
    for args, text in (
        (["--base_url", f"http://127.0.0.1:{free}/v1"], "start one (python my_openai_api.py)"),
        (["--base_url", server.url], "--api_key"),
        (["--base_url", server.url, "--api_key", "secret", "--model", "gpt-4"], f"has {NAME}"),
        (["--base_url", "localhost:8000", "--history_turns", "-1", "--top_p", "7"], "--top_p 7.0"),
        (["--base_url", "http://[::1"], "is not an address"),
        (["--base_url", "http://a..b/v1"], "is not an address"),
        (["--base_url", server.url, "--api_key", "键"], "ASCII"),
    ):
        result = chat(*args, input="hi\n")
        code = 2 if text in ("--top_p 7.0", "is not an address", "ASCII") else 1  # flags that are wrong by themselves
        assert result.returncode == code and result.stderr.startswith("error: ") and text in result.stderr, (
            result.stderr
        )
        assert result.stderr.count("\n") == result.stderr.count("error: ") == (3 if "--top_p" in args else 1)


def test_a_server_that_goes_away_keeps_the_chat(tmp_path):
    command = [sys.executable, str(ROOT / "chat_openai_api.py"), "--temperature", "0", "--max_new_tokens", "5"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    with serving(defaults=SamplingParams(max_new_tokens=5)) as found:
        process = subprocess.Popen([*command, "--base_url", found.url], **pipes)
        process.stdin.write("one\n")
        process.stdin.flush()
        line = ""
        while "tokens/s]" not in line:
            line = process.stdout.readline()
    saved = tmp_path / "chat.jsonl"
    out, errors = process.communicate(f"two\n/save {saved}\n/exit\n", timeout=120)
    assert "not answered: no server at" in errors and process.returncode == 0
    assert len(json.loads(saved.read_text(encoding="utf-8"))["messages"]) == 2


def test_the_client_runs_without_torch_and_transformers(server):
    code = (
        "import runpy, sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'tokenizers', 'peft', 'pandas'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"sys.argv = {['chat', '--base_url', server.url, '--api_key', 'secret', '--max_new_tokens', '3']!r}\n"
        f"runpy.run_path({str(ROOT / 'chat_openai_api.py')!r}, run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input="hi\n", capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0 and "[3 tokens, " in result.stdout, result.stderr
