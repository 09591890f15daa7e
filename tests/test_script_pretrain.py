"""1-pretrain.py as a user runs it: with good and bad input, killed and resumed."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import another_process_holds, error_of, fork, run, run_script_file

from common.cli import parse_options
from model.weights import load_checkpoint
from trainer.options import TrainOptions
from trainer.recipe import choose_batch_size

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "1-pretrain.py"
TINY = "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 64 --device cpu --dtype float32".split()
QUICK = [*TINY, *"--batch_size 4 --max_steps 8 --log_interval 1 --val_fraction 0.1 --learning_rate 0.01".split()]
QUICK += ["--optimizer", "adamw"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A pretraining CSV of 300 sentences."""
    path = tmp_path_factory.mktemp("data") / "pretrain_data.csv"
    rng = random.Random(0)
    words = "the cat saw a dog near 河 and 山 then slept until morning came".split()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([" ".join(rng.choices(words, k=rng.randint(3, 30)))] for _ in range(300))
    return path


@pytest.fixture
def pretrain(run_here) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_here, SCRIPT)


def parameters(out_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(out_dir / "pretrain_32.pth", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_from_text_to_weights(texts, tmp_path, pretrain):
    """In a process of its own, from another folder."""
    out = tmp_path / "out"
    flags = [*QUICK, "--data_path", texts, "--out_dir", out, "--sample_interval", 4]
    result = run(SCRIPT, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "step 8/8 100% | loss " in result.stdout and " bpb " in result.stdout
    lines = [json.loads(line) for line in (out / "pretrain_32.metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    checkpoint = load_checkpoint(out / "pretrain_32.pth")
    assert checkpoint.config.dim == 32 and checkpoint.info["step"] == 8
    assert checkpoint.info["tokenizer_hash"] and checkpoint.info["train_data"]
    # The tokens are made once: the second run, which replaces the first, reads them.
    first = parameters(out)
    report = (out / "pretrain_32.report.html").read_text(encoding="utf-8")
    for words in (
        "python 1-pretrain.py",
        "--batch_size 4",
        "--sample_interval 4",
        "data:image/png;base64,",
        "val_loss",
    ):
        assert words in report, words
    assert str(ROOT) not in report and "<td>model/minimind_tokenizer</td>" in report.replace("\\", "/")
    assert report.count('<td class="text">The capital of France is</td>') == 2  # after steps 4 and 8
    again = pretrain(*QUICK, "--data_path", texts, "--out_dir", out, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert "kept in" in result.stdout and "kept in" not in again.stdout
    assert same(parameters(out), first)


def test_with_no_flags_the_optimizer_is_muon_and_the_batch_fits_the_length_of_the_run(texts, tmp_path, pretrain):
    result = pretrain(*TINY, "--data_path", texts, "--out_dir", tmp_path, "--max_steps", 3)
    assert result.returncode == 0, result.stderr
    options = load_checkpoint(tmp_path / "pretrain_32.pth").info["options"]
    assert options["optimizer"] == "muon" and options["learning_rate"] == 4e-3
    assert options["warmup_iters"] == 10
    tokens = options["batch_size"] * options["accumulation_steps"] * 64
    assert tokens == 4096 and f"no --batch_size: {tokens:,} tokens in a step" in result.stdout
    # A resumed run keeps its batch, though it has become longer.
    again = pretrain(*TINY, "--data_path", texts, "--out_dir", tmp_path, "--max_steps", 100, "--resume")
    assert again.returncode == 0, again.stderr
    assert load_checkpoint(tmp_path / "pretrain_32.pth").info["options"]["batch_size"] == options["batch_size"]


def test_no_more_is_held_out_than_the_flags_allow(texts, tmp_path, pretrain):
    def held_out(*flags: object) -> int:
        result = pretrain(*TINY, *flags, "--data_path", texts, "--out_dir", tmp_path, "--max_steps", 1, "--overwrite")
        assert result.returncode == 0, result.stderr
        return int(
            re.search(r"held out for validation: \d+ documents, ([\d,]+) tokens", result.stdout)[1].replace(",", "")
        )

    half = held_out("--val_fraction", 0.5)
    assert 200 < held_out("--val_fraction", 0.5, "--val_tokens", 500) < 1000 < half


def test_the_batch_grows_with_the_run_and_not_with_the_number_of_processes():
    def chosen(n_tokens: int, world_size: int = 1, **flags) -> TrainOptions:
        options = TrainOptions(batch_size=None, **flags)
        rows = SimpleNamespace(n_tokens=n_tokens, packing=SimpleNamespace(seq_len=512))
        choose_batch_size(options, rows, world_size)
        return options

    def in_a_step(options: TrainOptions, world_size: int = 1) -> int:
        return options.batch_size * options.accumulation_steps * world_size

    rows = [in_a_step(chosen(n)) for n in (10_000, 10**6, 10**7, 10**8, 10**9)]
    assert rows[0] == 8 and rows == sorted(rows) and rows[-1] / rows[1] == pytest.approx(1000**0.4, rel=0.1)
    for size in (2, 3, 4):
        assert in_a_step(chosen(10**9, size), size) == pytest.approx(rows[-1], rel=0.1)
    assert chosen(10**9).batch_size <= 32 < rows[-1]
    assert in_a_step(chosen(10**9, accumulation_steps=4)) == pytest.approx(rows[-1], rel=0.1)
    assert in_a_step(chosen(10**9, epochs=0.1)) == rows[3]
    # As many steps as the epochs have give the same batch.
    assert in_a_step(chosen(10, max_steps=10**9 // (rows[-1] * 512))) == pytest.approx(rows[-1], rel=0.02)


def test_what_cannot_start_is_said_before_the_data_is_tokenized(texts, tmp_path, pretrain):
    flags = [*QUICK, "--data_path", texts, "--out_dir", tmp_path]
    assert "--resume auto" in error_of(pretrain(*flags, "--resume"))
    with another_process_holds(tmp_path, "pretrain_32"):
        assert "another run is training pretrain_32" in error_of(pretrain(*flags))
    (tmp_path / "pretrain_32.pth").touch()
    assert "pretrain_32.pth exists: replace it with --overwrite" in error_of(pretrain(*flags))
    assert not (tmp_path / "cache").exists()


def test_mixture_of_experts_bf16_muon(texts, tmp_path, pretrain):
    flags = "--use_moe --dtype bfloat16 --optimizer muon --gradient_checkpointing --save_dtype bfloat16 --max_steps 3"
    result = pretrain(*QUICK, *flags.split(), "--data_path", texts, "--out_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "balance_loss" in result.stdout
    state = torch.load(tmp_path / "pretrain_32_moe.pth", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert "layers.1.feed_forward.experts.3.w2.weight" in state


def test_wandb_works_without_an_account(texts, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run(SCRIPT, *QUICK, "--use_wandb", "--data_path", texts, "--out_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "logging offline" in result.stdout
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))


def last_step(output: Path) -> int:
    """Return the step of the last line of the log in a file; 0: there is none."""
    return int((re.findall(r"^step (\d+)/", output.read_text(), re.MULTILINE) or [0])[-1])


def wait_for_step(process: BaseProcess, output: Path, step: int) -> int:
    while (found := last_step(output) if output.exists() else 0) < step:
        assert process.is_alive(), output.read_text()
        time.sleep(0.005)
    return found


def test_killed_ten_times_and_resumed_gives_the_same_weights(texts, tmp_path, pretrain):
    """SIGKILL at random moments; saving after every step makes many of them hit a save."""
    flags = [*QUICK, "--data_path", texts, "--max_steps", 60, "--save_interval", 1, "--dropout", 0.1]
    whole = pretrain(*flags, "--out_dir", tmp_path / "whole", "--save_interval", 1000)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole" / "cache", tmp_path / "out" / "cache")
    rng = random.Random(0)
    position, output = 0, tmp_path / "output"
    for _ in range(10):
        output.unlink(missing_ok=True)
        process = fork(
            run_script_file, SCRIPT, *flags, "--out_dir", tmp_path / "out", "--resume", "auto", output=output
        )
        position = wait_for_step(process, output, position + rng.randint(2, 5))
        process.join(timeout=rng.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed ten times"
    last = pretrain("--out_dir", tmp_path / "out", "--resume")  # with the flags that the run has stored
    assert last.returncode == 0, last.stderr
    assert "resuming after step " in last.stdout
    assert same(parameters(tmp_path / "out"), parameters(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_so(texts, tmp_path, number):
    flags = [*QUICK, "--data_path", texts, "--max_steps", 100_000, "--save_interval", 100_000, "--out_dir", tmp_path]
    output = tmp_path / "output"
    process = fork(run_script_file, SCRIPT, *flags, output=output)
    wait_for_step(process, output, 3)
    os.kill(process.pid, number)
    process.join(timeout=300)
    assert process.exitcode == 128 + number
    assert "continue with --resume" in output.read_text() and "Traceback" not in output.read_text()
    assert load_checkpoint(tmp_path / "pretrain_32.pth").info["step"] >= 3


def test_a_signal_while_tokenizing_is_answered(tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(
        (json.dumps({"text": "春眠不觉晓，处处闻啼鸟。" * 8}, ensure_ascii=False) + "\n") * 200_000, encoding="utf-8"
    )
    flags = [*QUICK, "--data_path", data, "--out_dir", tmp_path / "out"]
    process = fork(run_script_file, SCRIPT, *flags, output=tmp_path / "output")
    while not list((tmp_path / "out").glob("cache/.pretrain-*.tmp")):
        assert process.is_alive(), (tmp_path / "output").read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    assert process.exitcode == 143
    (error,) = re.findall(r"^error: .*", (tmp_path / "output").read_text(), re.MULTILINE)
    assert error.startswith(
        "error: stopped by SIGTERM: tokenizing was not finished; no other file was changed. The same"
    )
    assert not list((tmp_path / "out" / "cache").glob(".*.tmp"))


def test_a_mix_of_files_is_resumed_exactly(texts, tmp_path, pretrain):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(40)), encoding="utf-8")
    flags = [*QUICK, "--data_path", texts, other, "--mix", 3, 1, "--save_interval", 4]
    whole = pretrain(*flags, "--out_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    shares = re.search(r"pretrain_data.csv 75.0% .*\(1.00 passes\), other.jsonl 25.0% .*\((.*) passes", whole.stdout)
    assert float(shares[1]) > 1  # the small file is repeated
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    shutil.rmtree(out / "pretrain_32.resume" / "step_00000008")
    error = error_of(pretrain("--out_dir", out, "--resume", "--mix", 1, 1))
    assert "train_data" in error and "--mix [3.0, 1.0] -> [1.0, 1.0]" in error
    again = pretrain("--out_dir", out, "--resume")
    assert again.returncode == 0 and "resuming after step 4" in again.stdout, again.stderr
    assert same(parameters(out), parameters(tmp_path / "whole"))
    error = pretrain(*QUICK, "--data_path", texts, texts, other, "--mix", 1, 0)
    assert error.returncode == 2 and error.stderr.splitlines() == [
        "error: --mix needs a share for each file of --data_path: 2 for 3",
        "error: --mix: shares must be above 0; leave out a file that is not wanted",
        "error: --mix: --data_path names a file twice",
    ]


def test_init_from_trains_weights_further_and_is_resumed_exactly(texts, tmp_path, pretrain):
    base = tmp_path / "pretrain_32.pth"
    assert pretrain(*QUICK, "--data_path", texts, "--out_dir", tmp_path, "--learning_rate", 0.03).returncode == 0
    before = base.read_bytes()
    flags = ["--data_path", texts, "--init_from", base]
    error = error_of(pretrain(*QUICK, *flags, "--out_dir", tmp_path, "--overwrite"))
    assert "would replace the weights it starts from; choose another --out_dir" in error
    assert "n_layers" in error_of(pretrain(*QUICK, *flags, "--n_layers", 3, "--out_dir", tmp_path / "deeper"))
    assert base.read_bytes() == before

    out = tmp_path / "further"  # the size is that of the file
    result = pretrain(*flags, *QUICK[len(TINY) :], "--device", "cpu", "--save_interval", 4, "--out_dir", out)
    assert result.returncode == 0 and f"starting from {base} (pretrain, step 8)" in result.stdout, result.stderr
    losses = [
        [json.loads(line)["loss"] for line in (folder / "pretrain_32.metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, out)
    ]
    assert losses[1][0] < (losses[0][0] + losses[0][-1]) / 2  # it starts where the first run ended
    whole = parameters(out)
    shutil.rmtree(out / "pretrain_32.resume" / "step_00000008")
    assert "resuming after step 4" in pretrain("--out_dir", out, "--resume").stdout
    assert same(parameters(out), whole)
    moved = base.rename(tmp_path / "moved.pth")
    base.with_suffix(".json").rename(tmp_path / "moved.json")
    assert "name its new place" in error_of(pretrain("--out_dir", out, "--resume"))
    last = pretrain("--out_dir", out, "--resume", "--init_from", moved)
    assert last.returncode == 0, last.stdout + last.stderr


def test_other_data_or_another_model_is_not_resumed(texts, tmp_path, pretrain):
    flags = [*QUICK, "--data_path", texts, "--out_dir", tmp_path]
    assert pretrain(*flags).returncode == 0
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(100)), encoding="utf-8")
    assert "train_data" in error_of(pretrain(*flags, "--data_path", other, "--resume"))
    assert "config.rope_theta" in error_of(pretrain(*flags, "--rope_theta", 5000, "--resume"))
    # A finished run is not replaced unasked, whether by the same model or by one of another depth, with the same name.
    before = (tmp_path / "pretrain_32.pth").read_bytes()
    for more in ([], ["--n_layers", 3]):
        message = error_of(pretrain(*flags, *more, "--max_steps", 2))
        assert "pretrain_32.resume holds a finished run of 8 steps: replace it with --overwrite" in message
    assert (tmp_path / "pretrain_32.pth").read_bytes() == before


def test_the_command_in_the_report_repeats_the_flags_of_the_model():
    flags = "--n_layers 3 --no-flash_attn --max_seq_len 2048 --rope_scaling yarn:4 --seed 5".split()
    options = parse_options(TrainOptions, "", flags)
    assert options.model["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    assert parse_options(TrainOptions, "", options.flags()) == options


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_bad_data_ends_in_one_clear_line(tmp_path, pretrain):
    def message(path) -> str:
        return error_of(pretrain(*QUICK, "--data_path", path, "--out_dir", tmp_path / "out"))

    assert "data_process.py pretrain" in message(tmp_path / "missing.csv")
    assert "empty.csv" in message(write(tmp_path / "empty.csv", ""))
    wrong = message(write(tmp_path / "wrong.csv", "content,id\nabc,1\n"))
    assert "wrong.csv" in wrong and "text" in wrong and "content" in wrong
    assert not list((tmp_path / "out").glob("*.pth"))


def test_bad_lines_are_skipped_counted_and_listed(tmp_path, pretrain):
    good = [json.dumps({"text": f"good sentence number {i} with some words"}).encode() for i in range(200)]
    lines = [*good[:100], b'{"text": "cut off in the mid', b'{"text": "\xff\xfe not utf-8"}', *good[100:]]
    path = write(tmp_path / "mixed.jsonl", b"\n".join(lines))
    result = pretrain(*QUICK, "--data_path", path, "--out_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "101" in result.stdout + result.stderr  # the line of the truncated row
    assert "training on" in result.stdout


def test_wrong_flags_are_named_all_at_once(tmp_path, pretrain):
    flags = "--epochs 0 --keep 1 --dim 30 --device cuda:99 --grad_clip inf --seed -1 --max_seq_len 1 --rope_theta inf"
    result = pretrain(*flags.split(), "--out_dir", tmp_path / "out")
    assert result.returncode == 2
    for part in flags.replace(" --", "|--").split("|"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(texts, tmp_path, pretrain):
    blocked = write(tmp_path / "file", "")
    message = error_of(pretrain(*QUICK, "--data_path", texts, "--cache_dir", tmp_path / "cache", "--out_dir", blocked))
    assert str(blocked) in message
    message = error_of(
        pretrain(*QUICK, "--data_path", texts, "--cache_dir", tmp_path / "cache", "--out_dir", "/proc/nothing")
    )
    assert "/proc/nothing" in message


def test_a_full_disk_while_saving_loses_nothing(texts, tmp_path, pretrain):
    """A file-size limit makes writing fail in the middle of a save, as a full disk does."""
    import resource

    flags = [*QUICK, "--data_path", texts, "--out_dir", tmp_path]
    assert pretrain(*flags, "--save_interval", 4).returncode == 0
    before = parameters(tmp_path)
    states = sorted(p.name for p in (tmp_path / "pretrain_32.resume").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        result = pretrain(*flags, "--resume", "--max_steps", 12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_00000012" in error_of(result)
    assert same(parameters(tmp_path), before)
    assert sorted(p.name for p in (tmp_path / "pretrain_32.resume").iterdir()) == states
