"""3-full_sft.py as a user runs it: from a base model to one that answers and stops; and everything that can be wrong."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import launching
import pytest
import torch
from launching import ROOT, error_of

from inference.generator import generate
from inference.options import SamplingParams
from model.chat_format import render_chat
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

SCRIPT = "3-full_sft.py"
QUICK = "--device cpu --dtype float32 --max_steps 3 --batch_size 2 --log_interval 1 --val_fraction 0".split()


@pytest.fixture
def run(run_here) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_here, SCRIPT)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write_base(path: Path, tokenizer, seed: int = 0, **fields) -> Path:
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
    info = {"stage": "pretrain", "step": 7, "tokenizer_hash": tokenizer_hash(tokenizer)}
    save_checkpoint(path, Transformer(LMConfig(**shape | fields)), info=info, overwrite=True)
    return path


@pytest.fixture
def out(tmp_path, tokenizer) -> Path:
    """An output folder with a pretrained checkpoint."""
    write_base(tmp_path / "out" / "pretrain_32.pth", tokenizer)
    return tmp_path / "out"


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_jsonl(path: Path, rows: list) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[tuple]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["history", "q", "a"])
        writer.writerows(rows)
    return path


@pytest.fixture
def chats(tmp_path) -> Path:
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns(f"q {i}", f"a {i}")} for i in range(12)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_longer_context(run, out, chats, tmp_path):
    """--rope_scaling with the longer --max_seq_len: the file says so, and later stages and scripts follow it."""
    flags = [*QUICK, "--data_path", chats, "--out_dir", out]
    result = run(*flags, "--rope_scaling", "yarn:4", "--max_seq_len", 256)
    assert result.returncode == 0, result.stderr
    config = load_checkpoint(out / "full_sft_32.pth").config
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert config.max_seq_len == 256
    scaled = weights(out / "full_sft_32.pth")
    # Nothing else changed: without the flag these are other weights.
    flags += ["--overwrite"]
    assert run(*flags, "--max_seq_len", 256).returncode == 0
    assert not same(scaled, weights(out / "full_sft_32.pth"))

    assert "trained at 64 tokens; --rope_scaling yarn:4 makes that 256, not --max_seq_len 64" in error_of(
        run(*flags, "--rope_scaling", "yarn:4")
    )
    assert "a factor: yarn:4" in run(*flags, "--rope_scaling", "yarn").stderr
    assert "that is --rope_theta" in error_of(run(*flags, "--rope_scaling", "ntk:4"))


TEN = [  # (history, question, answer): short and long, several turns, both languages
    ("", "What is the capital of France?", "Paris."),
    ("", "中国的首都是哪里？", "北京。"),
    ("", "Count to five.", "1 2 3 4 5"),
    ("", "Say nothing.", "."),
    ("", "List three colours, one a line.", "red\ngreen\nblue"),
    ("", "What does </s> mean?", "The tag </s> ends a text."),
    ('[["My name is Ada.", "Hello Ada!"]]', "What is my name?", "Ada."),
    ('[["My name is Bob.", "Hello Bob!"]]', "What is my name?", "Bob."),
    ("[['Pick a number.', '17'], ['Add one.', '18']]", "Add two.", "20"),  # a Python literal, as in older files
    ("[]", "给我讲一个很短的故事。", "从前有一座山，山里有一座庙，庙里有一个老和尚。"),
]


ADD = {"name": "add", "arguments": {"x": 2, "y": 4}}
TOOL_CHAT = [
    {"role": "system", "content": "", "tools": [{"name": "add"}]},
    {"role": "user", "content": "2 + 4 = ?"},
    {"role": "assistant", "content": "", "reasoning_content": "A sum.", "tool_calls": [ADD]},
    {"role": "tool", "content": "6"},
    {"role": "assistant", "content": "It is 6."},
]


def test_ten_samples_are_learned_by_heart_and_every_answer_stops(run, tmp_path, tokenizer):
    """The masks, the chat format and the end token together: any of them wrong, and greedy decoding goes on or astray."""
    out, data = tmp_path / "out", write_csv(tmp_path / "sft_data.csv", TEN)
    tools = write_jsonl(tmp_path / "tools.jsonl", [{"messages": TOOL_CHAT}])
    write_base(out / "pretrain_64.pth", tokenizer, dim=64, max_seq_len=128)
    flags = "--max_steps 120 --learning_rate 6e-3 --batch_size 3 --weight_decay 0 --show_sample --log_interval 10"
    result = run(*QUICK, *flags.split(), "--data_path", data, tools, "--out_dir", out)
    assert result.returncode == 0, result.stderr
    assert "starting from " in result.stdout and "pretrain_64.pth (pretrain, step 7)" in result.stdout
    assert "11 dialogues" in result.stdout and "skipped:" not in result.stdout
    # What is learned is shown marked: the first answer with its end, and nothing else.
    assert "<s>user\nWhat is the capital of France?</s>\n<s>assistant\n»Paris.</s>«\n" in result.stdout

    checkpoint = load_checkpoint(out / "full_sft_64.pth", tokenizer=tokenizer)
    assert checkpoint.info["stage"] == "full_sft" and checkpoint.info["metrics"]["loss"] < 0.1
    samples = [(read_history(history), question, answer) for history, question, answer in TEN]
    # The answers within the histories were learned too.
    samples += [([], "My name is Ada.", "Hello Ada!"), ([["Pick a number.", "17"]], "Add one.", "18")]
    chats = [(turns(*itertools.chain(*history), question), answer) for history, question, answer in samples]
    call = '<think>A sum.</think><tool_call>{"name": "add", "arguments": {"x": 2, "y": 4}}</tool_call>'
    chats += [(TOOL_CHAT[:2], call), (TOOL_CHAT[:4], "It is 6.")]
    prompts = [render_chat(tokenizer, messages, add_generation_prompt=True)[0] for messages, _ in chats]
    answers, reasons = [""] * len(prompts), [None] * len(prompts)
    for event in generate(checkpoint.model, prompts, SamplingParams(max_new_tokens=60), tokenizer=tokenizer):
        answers[event.key] += event.text
        reasons[event.key] = event.finish or reasons[event.key]
    assert answers == [answer for _, answer in chats]
    assert set(reasons) == {"stop"}


def test_real_tool_dialogues_train(run, tmp_path, tokenizer):
    folder = Path(os.environ.get("MINIMIND_DATA", ROOT.parent / "shared" / "data")) / "tools"
    if not folder.is_dir():
        pytest.skip("needs the real data")
    out = tmp_path / "out"
    write_base(out / "pretrain_32.pth", tokenizer, max_seq_len=8192)
    names = ["glaive_toolcall_en_demo.json", "glaive_toolcall_zh_demo.json", "reason_tool_use_demo.jsonl"]
    flags = [*QUICK, "--batch_size", 1, "--out_dir", out]
    result = run(*flags, "--data_path", *(folder / name for name in names))
    assert result.returncode == 0, result.stderr
    assert "424 dialogues" in result.stdout and "1 not a valid dialogue" in result.stdout
    assert f"{names[1]}:198: roles out of order: system user assistant tool; messages[3] must be user" in result.stdout
    assert (out / "full_sft_32.pth").is_file()


def read_history(history: str) -> list:
    """Also the Python literal above, whose texts hold no quotes."""
    return json.loads(history.replace("'", '"')) if history else []


def test_several_formats_in_a_process_of_its_own(out, tmp_path):
    """As from a shell, in another folder; questions and system messages are in the data, and only answers are learned."""
    single = write_csv(tmp_path / "sft_data_single.csv", [("", f"q {i}", f"a {i}") for i in range(8)])
    rows = [{"messages": [{"role": "system", "content": "be kind"}, *turns("hi", "hello", "who?", "me")]}]
    rows += [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": f"y {i}"}]} for i in range(3)]
    more = write_jsonl(tmp_path / "more.jsonl", rows)
    result = launching.run(SCRIPT, *QUICK, "--data_path", single, more, "--out_dir", out, "--show_sample", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "12 dialogues" in result.stdout and "»a 0</s>«" in result.stdout
    assert "step 3/3 100%" in result.stdout and "2-eval.py" in result.stdout
    lines = [json.loads(line) for line in (out / "full_sft_32.metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not same(weights(out / "full_sft_32.pth"), weights(out / "pretrain_32.pth"))


def test_unsound_chats_are_counted_named_and_not_trained_on(run, out, tmp_path):
    """The weights are those of a run on the sound chats alone."""
    good = [{"messages": turns(f"question {i}", f"answer {i}")} for i in range(6)]
    bad = {
        "unknown role 'robot'": {"messages": [{"role": "robot", "content": "beep"}, *turns("a", "b")]},
        "roles out of order: assistant": {"messages": turns("a", "b")[::-1] + turns("x", "y")[1:]},
        "roles out of order: user user": {"messages": [turns("a")[0], *turns("b", "c")]},
        "an empty assistant message": {"messages": turns("a", "  ")},
        "an empty user message": {"conversations": turns("", "b")},
        "no question and answer; the fields are text": {"text": "no chat at all"},
    }
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*good[:3], *bad.values(), '{"messages": [', *good[3:]])
    refused = run(*QUICK, "--data_path", mixed, "--out_dir", out)
    message = error_of(refused)
    assert "7 of 13 rows cannot be used, more than --max_dropped 0.01 allows (6 not a valid dialogue, " in message
    assert f"{mixed}:4: unknown role 'robot'" in message and message.endswith(
        "train on the others with --max_dropped 0.54"
    )
    result = run(*QUICK, "--data_path", mixed, "--out_dir", out, "--max_dropped", 0.54)
    assert result.returncode == 0, result.stderr
    assert "6 dialogues" in result.stdout and "6 not a valid dialogue, 1 unreadable (all" in result.stdout
    for line, reason in enumerate(bad, start=4):
        assert f"mixed.jsonl:{line}: {reason}" in refused.stdout
    assert "mixed.jsonl:10: " in refused.stdout
    clean = write_jsonl(tmp_path / "clean.jsonl", good)
    result = run(*QUICK, "--data_path", clean, "--out_dir", tmp_path / "other", "--init_from", out / "pretrain_32.pth")
    assert result.returncode == 0, result.stderr
    assert same(weights(out / "full_sft_32.pth"), weights(tmp_path / "other" / "full_sft_32.pth"))
    # With nothing sound in it there is nothing to train.
    flags = [*QUICK, "--data_path", write_jsonl(mixed, list(bad.values())), "--out_dir", out]
    message = error_of(run(*flags, "--overwrite"))
    assert "mixed.jsonl" in message and "no usable row" in message and "mixed.jsonl:1: unknown role" in message


def test_long_chats_are_cut_and_it_is_said(run, out, tmp_path):
    long = [{"messages": turns("old " * 40, "older", f"new {i}", "newer")} for i in range(3)]
    endless = [{"messages": turns("tell me", "word " * 200)}]
    good = [{"messages": turns(f"q {i}", f"a {i}")} for i in range(200)]
    data = write_jsonl(tmp_path / "long.jsonl", [*long, *endless, {"messages": turns("why? " * 100, "so")}, *good])
    result = run(*QUICK, "--data_path", data, "--out_dir", out, "--max_seq_len", 48)
    assert result.returncode == 0, result.stderr
    assert "too long: 3 without the oldest turns, 1 with a cut answer" in result.stdout
    assert "long.jsonl:5: too long: the last question leaves no room for an answer in 48 tokens" in result.stdout


def test_without_a_base(run, tmp_path, chats):
    """None is an error; random weights are for those who ask for them."""
    flags = [*QUICK, "--data_path", chats, "--out_dir", tmp_path / "out"]
    message = error_of(run(*flags))
    assert "no pretrain_*.pth in" in message and "--init_from" in message
    tiny = "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 64".split()
    result = run(*flags, *tiny, "--init_from", "none")
    assert result.returncode == 0, result.stderr
    assert "WARNING: starting from random weights" in result.stdout
    assert load_checkpoint(tmp_path / "out" / "full_sft_32.pth").info["origin"] is None


def test_bases_that_do_not_fit(run, out, tmp_path, chats, tokenizer):
    flags = [*QUICK, "--data_path", chats, "--out_dir", out]
    message = error_of(run(*flags, "--init_from", out / "pretrain_48.pth"))
    assert "pretrain_48.pth" in message and "there are: pretrain_32.pth" in message
    assert "no pretrain_192.pth in" in error_of(run(*flags, "--preset", "toy"))
    message = error_of(run(*flags, "--preset", "toy", "--init_from", out / "pretrain_32.pth"))
    assert "another architecture" in message and "dim: 192 != 32" in message
    mixture = out / "toy_moe.pth"
    shape = dict(dim=192, n_layers=4, n_heads=6, n_kv_heads=3, use_moe=True)
    save_checkpoint(mixture, Transformer(LMConfig(**shape)), info={"tokenizer_hash": tokenizer_hash(tokenizer)})
    assert "use_moe: False != True" in error_of(run(*flags, "--preset", "toy", "--init_from", mixture))
    assert "n_layers: 5 != 2" in error_of(run(*flags, "--n_layers", 5))

    file = out / "pretrain_32.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"tokenizer_hash": "0123456789abcdef"}))
    message = error_of(run(*flags))
    assert "0123456789abcdef" in message and tokenizer_hash(tokenizer) in message
    file.write_text(json.dumps(info | {"fingerprint": "0123456789abcdef"}))
    assert "describes other weights" in error_of(run(*flags))
    write_base(out / "pretrain_32.pth", tokenizer, vocab_size=100)
    assert "100 tokens, the tokenizer 6400" in error_of(run(*flags))
    (out / "pretrain_32.pth").write_bytes(b"not a checkpoint")
    file.unlink()
    assert "pretrain_32.pth" in error_of(run(*flags))
    assert not list(out.glob("full_sft*.pth"))


def test_stopped_and_resumed_and_never_onto_another_base(run, out, tmp_path, chats, tokenizer):
    flags = [*QUICK, "--data_path", chats, "--batch_size", 1, "--max_steps", 6, "--dropout", 0.1]
    assert run(*flags, "--out_dir", out, "--save_interval", 2).returncode == 0
    whole = weights(out / "full_sft_32.pth")
    state = out / "full_sft_32.resume" / "step_00000004"
    result = run(*flags, "--out_dir", out, "--resume", state)
    assert result.returncode == 0 and "resuming after step 4" in result.stdout
    assert same(weights(out / "full_sft_32.pth"), whole)
    # The base of the run is gone: a newer one is not what its state belongs to.
    write_base(out / "pretrain_32.pth", tokenizer, seed=1)
    message = error_of(run(*flags, "--out_dir", out, "--resume"))
    assert "this is a different run: origin: " in message
    other = write_jsonl(tmp_path / "other.jsonl", [{"messages": turns(f"q {i}", f"b {i}")} for i in range(12)])
    write_base(out / "pretrain_32.pth", tokenizer)
    assert "train_data: " in error_of(run(*flags, "--out_dir", out, "--resume", "--data_path", other))
    assert same(weights(out / "full_sft_32.pth"), whole)


def test_a_mixture_of_experts(run, tmp_path, chats, tokenizer):
    write_base(tmp_path / "pretrain_32_moe.pth", tokenizer, use_moe=True)
    result = run(*QUICK, "--data_path", chats, "--out_dir", tmp_path, "--save_dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert "balance_loss" in result.stdout
    assert {value.dtype for value in weights(tmp_path / "full_sft_32_moe.pth").values()} == {torch.bfloat16}


def test_a_model_is_replaced_only_when_asked(run, out, tmp_path, chats, tokenizer):
    flags = [*QUICK, "--data_path", chats, "--out_dir", out]
    assert run(*flags).returncode == 0
    before = weights(out / "full_sft_32.pth")
    # Found before data is read.
    message = error_of(run(*QUICK, "--data_path", write_jsonl(tmp_path / "bad.jsonl", ["{"]), "--out_dir", out))
    assert "full_sft_32.resume holds a finished run of 3 steps: replace it with --overwrite" in message
    shutil.rmtree(out / "full_sft_32.resume")
    assert "full_sft_32.pth exists: replace it with --overwrite" in error_of(run(*flags))
    assert same(weights(out / "full_sft_32.pth"), before)
    write_base(out / "pretrain_32.pth", tokenizer, n_layers=3)
    assert run(*flags, "--overwrite").returncode == 0
    assert load_checkpoint(out / "full_sft_32.pth").config.n_layers == 3


def test_wrong_flags_are_named_all_at_once(run, out):
    result = run("--epochs", 0, "--batch_size", 0, "--val_fraction", 1, "--device", "cuda:99", "--out_dir", out)
    assert result.returncode == 2
    for part in ("--epochs 0", "--batch_size 0", "--val_fraction 1", "--device cuda:99"):
        assert part in result.stderr
    assert run("--no_such_flag").returncode == 2


def test_missing_data_is_named_with_the_command_that_makes_it(run, out, tmp_path):
    message = error_of(run(*QUICK, "--data_path", tmp_path / "a.csv", tmp_path / "b.csv", "--out_dir", out))
    assert "a.csv" in message and "b.csv" in message and "python data_process.py sft" in message
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("text\nhello\n")
    message = error_of(run(*QUICK, "--data_path", wrong, "--out_dir", out))
    assert "wrong.csv: needs the columns" in message
