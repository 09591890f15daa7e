"""2-eval.py as a user runs it: questions through stdin, the built-in list, commands, errors."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT, run
from serving_helpers import SUM, answer_ids, scripted_outputs

from data_pipeline.records import parse_conversation
from export.exporter import export_folder
from export.options import ExportOptions
from inference.generator import TokenOutput, generate_text
from inference.model_loader import TextGenerator
from inference.options import SamplingParams
from inference.terminal import print_answer
from model.chat_format import render_chat, truncate_chat
from model.chat_parser import AnswerParser
from model.LMConfig import preset
from model.lora import add_adapter, save_adapter
from model.model import Transformer
from model.tokenizer import load_tokenizer
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

SCRIPT = "2-eval.py"
TOKENIZER = load_tokenizer()
CPU = ["--device", "cpu", "--dtype", "float32"]
GREEDY = [*CPU, "--temperature", "0", "--max_new_tokens", "12"]


@pytest.fixture
def call(run_here) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_here, SCRIPT)


def message(result: subprocess.CompletedProcess, lines: int = 1, code: int = 1) -> str:
    """Return stderr of a script that failed as it should: one line, or one for each wrong flag (code 2)."""
    assert result.returncode == code, result.stderr
    assert result.stderr.count("error: ") == result.stderr.count("\n") == lines, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder with tiny models of three stages; rl is the newest but for pretrain."""
    folder = tmp_path_factory.mktemp("out")
    for i, stage in enumerate(("full_sft", "rl", "pretrain")):
        torch.manual_seed(i)
        config = preset("toy", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96, initializer_range=0.2)
        save_checkpoint(folder / f"{stage}_64.pth", Transformer(config), info={"stage": stage})
        os.utime(folder / f"{stage}_64.pth", (1e9 + i, 1e9 + i))
    return folder


def conversation(path: Path, questions: list[str], history_turns: int, system: str | None = None) -> list[dict]:
    """What the script should have said, all greedy."""
    model = load_checkpoint(path, dtype=torch.float32).model
    first = [{"role": "system", "content": system}] if system else []
    turns = []
    for question in questions:
        turns.append({"role": "user", "content": question})
        seen = turns[max(0, len(turns) - 1 - 2 * history_turns) :]
        ids = truncate_chat(TOKENIZER, first + seen, 96 - 12).ids
        (answer,) = generate_text(model, TOKENIZER, [ids], SamplingParams(max_new_tokens=12))
        turns.append({"role": "assistant", "content": answer})
    return first + turns


def test_chat_model(out, tmp_path):
    saved = tmp_path / "kept.jsonl"
    questions = ["你好", "why?", "/help me?"]
    flags = ["--out_dir", out, *GREEDY, "--history_turns", 1, "--system", "简短。"]
    result = run(
        SCRIPT,
        *flags,
        input="\n".join(["before", "/clear", *questions, f"/save {saved}", "/exit", "after"]),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert f"; --weights names another\n{out / 'rl_64.pth'} (rl)\n" in result.stdout
    assert "conversation cleared" in result.stdout and "appended 3 turns" in result.stdout
    assert result.stdout.count(" tokens/s]") == 4
    (line,) = saved.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["messages"] == conversation(out / "rl_64.pth", questions, 1, "简短。")


def test_history(out, tmp_path, call):
    said = []
    for history_turns in (0, 5):
        saved = tmp_path / f"{history_turns}.jsonl"
        lines = ["a", "b", "c", f"/save {saved}"]
        result = call("--out_dir", out, *GREEDY, "--history_turns", history_turns, input="\n".join(lines))
        assert result.returncode == 0, result.stderr
        said.append(json.loads(saved.read_text(encoding="utf-8"))["messages"])
        assert said[-1] == conversation(out / "rl_64.pth", ["a", "b", "c"], history_turns)
    assert said[0][:2] == said[1][:2] and said[0] != said[1]


def test_tools(out, tmp_path, call, monkeypatch):
    """The model calls a tool (here by a script), which runs; it reads the response, and the chat can be trained on."""
    prompts, saved = [], tmp_path / "kept.jsonl"
    answers = [
        answer_ids(reasoning_content="A sum.", tool_calls=[SUM]),
        answer_ids(content="27"),
        answer_ids(content="bye"),
    ]

    def scripted(self, prompt, sampling, images=None):
        prompts.append(prompt)
        return scripted_outputs(answers[len(prompts) - 1])

    monkeypatch.setattr(TextGenerator, "generate", scripted)
    lines = ["3 * (4 + 5)?", "thanks", f"/save {saved}"]
    flags = ["--out_dir", out, *GREEDY, "--max_seq_len", 1500, "--tools", "calculator", "--system", "Be brief."]
    result = call(*flags, input="\n".join(lines))
    assert result.returncode == 0, result.stderr
    assert '[thinks: A sum.]\n[calls calculator {"expression": "3 * (4 + 5)"}]' in result.stdout
    assert "[calculator returns: 27]" in result.stdout and "appended 2 turns" in result.stdout
    messages = parse_conversation(json.loads(saved.read_text(encoding="utf-8")))
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        *["assistant", "user"] * 2,
    ][:7]
    for prompt, end in zip(prompts, (2, 4, 6), strict=True):
        assert prompt == render_chat(TOKENIZER, messages[:end], add_generation_prompt=True)[0]


def test_commands(out, tmp_path, call):
    lines = ["/nonsense", "/save", f"/save {tmp_path / 'kept'}", "/help", "  ", "hi", "/save /none/x", "/image a.png"]
    joined = tmp_path / "rows.jsonl"
    joined.write_text('{"q": "a", "a": "b"}')  # its line has no end
    lines += ["/save ~nobody/x", f"/save {joined}", "/quit", "after"]
    result = call("--out_dir", out, *GREEDY, input="\n".join(lines))
    assert result.returncode == 0
    assert "no such command: /nonsense" in result.stdout
    assert result.stdout.count("/clear ") == 3  # at the start, after /nonsense, and when asked for
    assert "name a file" in result.stdout and "nothing to save yet" in result.stdout
    assert result.stdout.count(" tokens/s]") == 1
    unsaved, no_image, nobody = result.stderr.splitlines()
    assert unsaved == "not saved: /none/x: No such file or directory" and no_image.startswith("no image: ")
    assert nobody.startswith("not saved: ~nobody/x: ")
    assert [*map(len, map(json.loads, joined.read_text().splitlines()))] == [2, 1]


def test_an_answer_that_was_cut_off_calls_no_tools(capsys):
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"na'
    for finish in ("stop", "length"):
        message, stopped = print_answer([TokenOutput(0, 5, text, finish)], 1, 99, AnswerParser())
        assert ("tool_calls" in message) == (finish == "stop") and not stopped
    assert "[cut off: --max_new_tokens 1]" in capsys.readouterr().out


def test_long_conversations_are_cut_at_turns(out, call):
    lines = ["first one here", "x " * 20, "word " * 10, "word " * 300]
    result = call("--out_dir", out, *GREEDY, input="\n".join(lines))
    assert result.returncode == 0, result.stderr  # the end of the input ends the chat
    assert "[context of 96 tokens: 1 of 2 earlier turns left out]" in result.stdout
    assert result.stderr.startswith("not answered: the last question has ")
    assert "tokens, and 84 is the limit: shorten it" in result.stderr


def test_built_in_questions(out, call):
    result = call("--weights", out / "pretrain_64.pth", "--auto", *CPU, "--max_new_tokens", 3, "--seed", 1)
    assert result.returncode == 0, result.stderr
    assert "note: this is a base model" in result.stdout
    assert "> What is the capital of France?" in result.stdout and "> 你好" in result.stdout
    assert result.stdout.count(" tokens/s]") == 9


def test_built_in_questions_that_do_not_fit_are_skipped(out, call):
    result = call("--weights", out / "rl_64.pth", "--auto", *GREEDY, "--max_seq_len", 31)
    assert result.returncode == 0
    answered, skipped = result.stdout.count(" tokens/s]"), result.stderr.count("not answered: the last question has ")
    assert answered and skipped and answered + skipped == 9


def test_an_exported_folder_answers_like_its_source(out, tmp_path, call):
    source = load_checkpoint(out / "rl_64.pth")
    folder, _ = export_folder(source, TOKENIZER, ExportOptions(output=tmp_path / "rl_64-llama"))

    def answer(weights: Path, *flags) -> str:
        result = call("--weights", weights, *GREEDY, *flags, input="hi\n")
        assert result.returncode == 0, result.stderr
        return result.stdout.split("> ", 1)[1].split("\n[")[0]

    assert answer(folder) == answer(source.path)
    assert "no config.json in" in message(call("--weights", tmp_path))
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors in" in message(call("--weights", folder))


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c_stops_the_answer_not_the_chat(out, tmp_path):
    model = load_checkpoint(out / "full_sft_64.pth").model
    with torch.no_grad():
        model.output.weight[2] = 0  # </s> is never the likeliest token: this model writes until it is stopped
    save_checkpoint(tmp_path / "endless.pth", model, info={"stage": "full_sft"})
    command = [sys.executable, str(ROOT / SCRIPT), "--weights", tmp_path / "endless.pth", *CPU, "--temperature", 0]
    command += ["--max_new_tokens", 10**5, "--max_seq_len", 10**5]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # A test run in the background has Ctrl-C switched off, and its children inherit that.
    listening = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process = subprocess.Popen([str(part) for part in command], **pipes, **listening)
    try:
        process.stdin.write("你好\n".encode())
        process.stdin.flush()
        read = b""
        while b"\n> " not in read:
            read += process.stdout.read1()
        assert len(process.stdout.read(50)) == 50  # it is writing
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(f"/save {tmp_path / 'kept'}\n/exit\n".encode(), timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert b"[stopped]" in output and b"appended 1 turn to" in output


def test_adapter(out, tmp_path, call):
    """The newest in OUT_DIR may be an adapter; it answers otherwise than its base."""
    weights = tmp_path / "full_sft_64.pth"
    for suffix in (".pth", ".json"):
        shutil.copy2((out / "full_sft_64").with_suffix(suffix), tmp_path)
    base = load_checkpoint(weights)
    adapted = add_adapter(base.model, rank=2, alpha=4.0, dropout=0.0)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter = tmp_path / "lora_identity_64"
    save_adapter(adapter, adapted, base, {"stage": "lora"})

    def answer(*flags) -> str:
        result = call(*GREEDY, *flags, input="hi\n")
        assert result.returncode == 0, result.stderr
        return result.stdout.split("> ", 1)[1].split("\n[")[0]

    plain, changed = answer("--weights", weights), answer("--out_dir", tmp_path)
    assert changed != plain
    assert answer("--lora", adapter) == changed == answer("--weights", adapter)
    moved = shutil.move(weights, tmp_path / "moved.pth")
    shutil.move(weights.with_suffix(".json"), tmp_path / "moved.json")
    assert answer("--lora", adapter, "--weights", moved) == changed
    assert "does not exist" in message(call("--lora", adapter))
    assert "was trained on other weights" in message(call("--lora", adapter, "--weights", out / "rl_64.pth"))


def test_wrong_input_is_one_clear_line(out, tmp_path, call):

    def fails(*args) -> str:
        return message(call(*args))

    assert "no checkpoint" in fails("--weights", out / "none.pth")
    assert f"no full_sft_*.pth, rl_*.pth, rlvr_*.pth, distill_*.pth, lora_* in {tmp_path}: run 3-full_sft.py" in fails(
        "--out_dir", tmp_path
    )
    assert "is not an adapter" in fails("--lora", tmp_path / "none")
    wrong = message(call("--min_p", 3, "--history_turns", -1, "--max_seq_len", 1), lines=3, code=2)
    assert "--min_p 3.0 must be between 0 and 1" in wrong and "--history_turns -1 must be at least 0" in wrong
    assert "--max_seq_len 1 must be at least 2" in wrong
    result = call("--out_dir", out, *GREEDY, "--auto", "--system", "long " * 200)
    assert result.returncode == 1 and result.stderr.count("not answered: ") == 9
    assert "tokens, and 84 is the limit" in result.stderr
    assert result.stderr.endswith("\nerror: no question was answered; the lines above say why\n")
