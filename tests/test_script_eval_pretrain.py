"""0-eval_pretrain.py as a user runs it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import run

from common.text import visible
from inference.generator import generate_text
from inference.options import SamplingParams
from model.LMConfig import preset
from model.model import Transformer
from model.tokenizer import BOS_ID, encode_text, load_tokenizer
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

SCRIPT = "0-eval_pretrain.py"
TOKENIZER = load_tokenizer()
CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def call(run_here) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_here, SCRIPT)


def message(result: subprocess.CompletedProcess, lines: int = 1, code: int = 1) -> str:
    """Return stderr of a script that failed as it should: one line, or one for each wrong flag (code 2)."""
    assert result.returncode == code, result.stderr
    errors = [
        line for line in result.stderr.splitlines() if not line.startswith("decoding is slower")
    ]  # heads are tiny
    assert len(errors) == lines and all("error: " in line for line in errors), result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder with two tiny pretrained models: one older, and a newer without a JSON, as published files are."""
    folder = tmp_path_factory.mktemp("out")
    for i, dim in enumerate((64, 32)):
        torch.manual_seed(dim)
        config = preset("toy", dim=dim, n_layers=2, n_heads=16, n_kv_heads=8, max_seq_len=48, initializer_range=0.2)
        path = folder / f"pretrain_{dim}.pth"
        save_checkpoint(path, Transformer(config), info={"stage": "pretrain", "step": 12, "loss": 8.7})
        os.utime(path, (1e9 + i, 1e9 + i))
    (folder / "pretrain_32.json").unlink()
    return folder


def expected(path: Path, text: str, sampling: SamplingParams, max_len: int | None = None) -> str:
    model = load_checkpoint(path, dtype=torch.float32).model
    prompt = [BOS_ID, *encode_text(TOKENIZER, text)]
    return text + generate_text(model, TOKENIZER, [prompt], sampling, max_len=max_len)[0]


def test_built_in_prompts_on_the_newest_checkpoint(out, tmp_path):
    result = run(SCRIPT, "--out_dir", out, "--max_new_tokens", 4, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"; --weights names another\n{out / 'pretrain_32.pth'}\n" in result.stdout
    assert "no JSON beside it, read from the shapes: dim 32" in result.stdout and "M parameters" in result.stdout
    for text in ("中国的首都是", "The capital of France is"):
        assert f"\n{text}" in result.stdout
    assert len(re.findall(r"\[cut off: --max_new_tokens 4\]\n\[4 tokens, [\d.]+ tokens/s\]", result.stdout)) > 5


def test_prompts_flags_and_text(out, call):
    weights = out / "pretrain_64.pth"
    flags = "--max_new_tokens 20 --temperature 0.9 --top_k 50 --repetition_penalty 1.1 --seed 3 --top_p 1".split()
    result = call("--weights", weights, *CPU, *flags, "--prompt", "春天", "--prompt", "a literal </s>")
    assert result.returncode == 0, result.stderr
    assert "(pretrain, step 12, loss 8.7)" in result.stdout and "float32 on cpu" in result.stdout
    sampling = SamplingParams(max_new_tokens=20, temperature=0.9, top_k=50, repetition_penalty=1.1, seed=3)
    for text in ("春天", "a literal </s>"):
        written = expected(weights, text, sampling)
        assert len(written) > len(text) + 10
        assert f"\n{visible(written)} [cut off" in result.stdout


def test_file_and_too_long_prompts(out, tmp_path, call):
    file = tmp_path / "prompts.txt"
    file.write_text("第一\n\n" + "long " * 60 + "\n", encoding="utf-8")
    weights = out / "pretrain_64.pth"
    greedy = ["--temperature", 0, "--repetition_penalty", 1]
    result = call("--weights", weights, "--prompt_file", file, *CPU, *greedy, "--max_new_tokens", 400)
    assert result.returncode == 0, result.stderr
    assert expected(weights, "第一", SamplingParams(max_new_tokens=400))[:12] in result.stdout
    assert "[cut off: the context of 48 tokens is full; --max_seq_len gives more]" in result.stdout
    n_tokens = len(encode_text(TOKENIZER, "long " * 60))
    assert f"[the beginning has {n_tokens} tokens; the last 23 are used]" in result.stdout
    result = call("--weights", weights, "--prompt", "x", *CPU, *greedy, "--max_new_tokens", 60, "--max_seq_len", 100)
    assert "note: trained at 48 tokens" in result.stdout and "[60 tokens, " in result.stdout


def test_longer_than_trained(out, call):
    """--rope_scaling: beyond the 48 tokens of the training another text, up to them the same."""
    weights = out / "pretrain_64.pth"
    flags = [*CPU, "--weights", weights, "--temperature", 0, "--repetition_penalty", 1, "--prompt", "x"]
    plain = call(*flags, "--max_new_tokens", 60, "--max_seq_len", 100)
    assert "(--rope_scaling may help)" in plain.stdout
    model = load_checkpoint(weights, dtype=torch.float32).model
    prompt = [BOS_ID, *encode_text(TOKENIZER, "x")]
    written = {}
    for given, told, arguments in (
        ("yarn", "context of 100 tokens: texts beyond the 48 of the training are scaled (yarn, 2 or 2.08333 times)",
         ("yarn", None, 100)),
        ("linear:3", "context of 144 tokens: texts beyond the 48 of the training are scaled (linear, 3 times)",
         ("linear", 3.0)),
    ):  # fmt: skip
        length = ["--max_seq_len", 100] if given == "yarn" else []
        result = call(*flags, *length, "--max_new_tokens", 95, "--rope_scaling", given)
        assert told in result.stdout and "[95 tokens, " in result.stdout, result.stderr
        model.dynamic_rope_scaling = model.config.dynamic_rope_scaling(*arguments)
        (text,) = generate_text(model, TOKENIZER, [prompt], SamplingParams(max_new_tokens=95), max_len=144)
        assert f"\nx{visible(text)} [cut off" in result.stdout
        written[given] = text
        short = call(*flags, *length, "--max_new_tokens", 40, "--rope_scaling", given)
        assert (
            f"\nx{visible(generate_text(model, TOKENIZER, [prompt], SamplingParams(max_new_tokens=40))[0])} [cut"
            in short.stdout
        )
    model.dynamic_rope_scaling = None
    (unscaled,) = generate_text(model, TOKENIZER, [prompt], SamplingParams(max_new_tokens=95), max_len=144)
    assert len({unscaled, *written.values()}) == 3
    for given, wrong in (
        (["yarn"], "needs a length: set --max_seq_len"),
        (["ntk", "--max_seq_len", 48], "for texts longer than the 48 tokens"),
        (["ntk:1.5", "--max_seq_len", 100], "reaches 72 tokens"),
        (["longer"], "--rope_scaling longer must be"),
    ):
        assert wrong in message(call(*flags, "--rope_scaling", *given))


def test_interactive(out, call):
    result = call("--out_dir", out, *CPU, "--interactive", "--max_new_tokens", 3, input="从前\nonce\n\nnot read\n")
    assert result.returncode == 0, result.stderr
    assert "> 从前" in result.stdout and "> once" in result.stdout and "not read" not in result.stdout


def test_wrong_input_is_one_clear_line(out, tmp_path, call):
    assert "is not Unicode" in message(
        run(SCRIPT, "--out_dir", out, "--prompt", b"\xff".decode("utf-8", "surrogateescape"))
    )

    def fails(*args) -> str:
        return message(call(*args))

    assert "no checkpoint" in fails("--weights", out / "none.pth")
    assert f"no pretrain_*.pth in {tmp_path}: run 1-pretrain.py" in fails("--out_dir", tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    assert "text.pth is" in fails("--weights", tmp_path / "text.pth")
    wrong = message(call("--out_dir", out, "--temperature", "-1", "--top_p", "2", "--max_seq_len", 1), lines=3, code=2)
    assert "--temperature -1.0 must be at least 0" in wrong and "--top_p 2.0 must be above 0 and at most 1" in wrong
    assert "--max_seq_len 1 must be at least 2" in wrong
    assert "cannot be used together" in message(call("--prompt", "a", "--interactive"), code=2)
    assert "--stop must not be empty" in message(call("--stop", ""), code=2)
    assert "cannot be read (No such file" in fails("--out_dir", out, "--prompt_file", tmp_path / "none.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    assert "is empty" in fails("--out_dir", out, "--prompt_file", tmp_path / "blank.txt")
    assert "is not a device" in fails("--out_dir", out, "--device", "abacus")
    assert "no tokenizer.json" in fails("--out_dir", out, "--tokenizer", tmp_path)
    (tmp_path / "pretrain_64.pth").write_bytes((out / "pretrain_64.pth").read_bytes()[:100_000])
    assert "damaged" in fails("--weights", tmp_path / "pretrain_64.pth")


def test_a_model_cannot_steer_the_terminal():
    assert visible("a\x1b[2J\tb\n\x7f\x9b好") == "a␛[2J\tb\n␡\ufffd好"
