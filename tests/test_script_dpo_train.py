"""5-dpo_train.py as a user runs it: preferences are learned from sound pairs, and the rest is named."""

from __future__ import annotations

import functools
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import launching
import pytest
import torch
from launching import error_of
from tolerances import log_probability_rounding

from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

SCRIPT = "5-dpo_train.py"
SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
# Rounding of --beta times the log-probabilities of two answers by two models.
MARGIN = 4 * 0.1 * log_probability_rounding(LMConfig(**SHAPE), 16)
QUICK = "--device cpu --dtype float32 --max_steps 4 --batch_size 4 --log_interval 1 --val_fraction 0".split()


@pytest.fixture
def run(run_here) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_here, SCRIPT)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write_base(path: Path, tokenizer, seed: int = 0, **fields) -> Path:
    torch.manual_seed(seed)
    info = {"stage": "full_sft", "step": 7, "tokenizer_hash": tokenizer_hash(tokenizer)}
    save_checkpoint(path, Transformer(LMConfig(**SHAPE | fields)), info=info, overwrite=True)
    return path


@pytest.fixture
def out(tmp_path, tokenizer) -> Path:
    """An output folder with a fine-tuned checkpoint."""
    write_base(tmp_path / "out" / "full_sft_32.pth", tokenizer)
    return tmp_path / "out"


def pair(i: int) -> dict:
    return {"prompt": f"what is {i}?", "chosen": f"the number {i}", "rejected": f"no idea about {i}"}


def write_jsonl(path: Path, rows: list) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(24)])


def weights(out_dir: Path, name: str = "rl_32") -> dict[str, torch.Tensor]:
    return torch.load(out_dir / f"{name}.pth", weights_only=True)


def metrics(out_dir: Path, name: str = "rl_32") -> list[dict]:
    return [json.loads(line) for line in (out_dir / f"{name}.metrics.jsonl").read_text().splitlines()]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_preference_is_learned_and_carries_over_to_held_out_pairs(out, pairs, tmp_path):
    """In a process of its own, from another folder."""
    flags = "--max_steps 30 --learning_rate 2e-3 --val_fraction 0.2 --val_interval 10".split()
    result = launching.run(SCRIPT, *QUICK, *flags, "--data_path", pairs, "--out_dir", out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "24 preference pairs, 0 unusable rows" in result.stdout and "held out for validation:" in result.stdout
    lines = metrics(out)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=MARGIN)
    assert lines[0]["margin"] == pytest.approx(0, abs=MARGIN)
    for name in ("accuracy", "chosen_reward", "rejected_reward", "kl_estimate"):
        assert name in lines[0], name
    last = lines[-1]
    assert last["loss"] < 0.5 and last["margin"] > 0.5 and last["accuracy"] == 1
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=MARGIN)
    assert last["val_accuracy"] >= 0.9 and last["val_loss"] < 0.6
    checkpoint = load_checkpoint(out / "rl_32.pth")
    assert checkpoint.info["stage"] == "rl" and checkpoint.info["step"] == 30
    assert checkpoint.info["origin"] == load_checkpoint(out / "full_sft_32.pth").fingerprint


@pytest.mark.parametrize("flags", [["--loss", "ipo"], ["--label_smoothing", "0.1"]], ids=["ipo", "smoothing"])
def test_other_losses(run, out, pairs, flags):
    result = run(*QUICK, *flags, "--data_path", pairs, "--out_dir", out, "--learning_rate", 1e-3)
    assert result.returncode == 0, result.stderr
    first, *_, last = metrics(out)
    ipo = "ipo" in flags
    slope = 2 * 5 / 0.1 if ipo else 1  # of the loss in the margin, which is 0
    assert first["loss"] == pytest.approx(25.0 if ipo else math.log(2), abs=slope * MARGIN)
    assert last["loss"] < first["loss"] and last["margin"] > first["margin"]


def test_a_mixture_of_experts(run, tmp_path, pairs, tokenizer):
    write_base(tmp_path / "full_sft_32_moe.pth", tokenizer, use_moe=True)
    result = run(*QUICK, "--data_path", pairs, "--out_dir", tmp_path, "--learning_rate", 1e-3)
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path, "rl_32_moe")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=MARGIN) and lines[-1]["margin"] > 0


def test_unsound_pairs_are_counted_named_and_not_trained_on(run, out, tmp_path):
    """The weights are those of a run on the sound pairs alone."""
    good = [pair(i) for i in range(8)]
    bad = {
        "chosen and rejected are the same": pair(1) | {"rejected": pair(1)["chosen"]},
        "rejected is empty": pair(2) | {"rejected": " "},
        "unknown role 'robot'": pair(3) | {"prompt": [{"role": "robot", "content": "beep"}]},
        "roles out of order": {
            "conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    }
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*good[:3], *bad.values(), '{"prompt": ', *good[3:]])
    message = error_of(run(*QUICK, "--data_path", mixed, "--out_dir", out))
    assert "5 of 13 rows cannot be used, more than --max_dropped 0.1 allows (5 unreadable or not a" in message
    result = run(*QUICK, "--data_path", mixed, "--out_dir", out, "--max_dropped", 0.4)
    assert result.returncode == 0, result.stderr
    assert "8 preference pairs, 5 unusable rows" in result.stdout
    for line, reason in enumerate(bad, start=4):
        assert any(f"mixed.jsonl:{line}: " in text and reason in text for text in result.stdout.splitlines())
    assert "mixed.jsonl:8: " in result.stdout
    clean = write_jsonl(tmp_path / "clean.jsonl", good)
    result = run(*QUICK, "--data_path", clean, "--out_dir", tmp_path / "other", "--init_from", out / "full_sft_32.pth")
    assert result.returncode == 0 and same(weights(out), weights(tmp_path / "other"))
    # With nothing sound in it there is nothing to train, and the earlier run stays.
    flags = [*QUICK, "--data_path", write_jsonl(mixed, list(bad.values())), "--out_dir", out]
    message = error_of(run(*flags, "--overwrite"))
    assert "mixed.jsonl: no usable preference pair" in message and ":1: " in message
    assert same(weights(out), weights(tmp_path / "other"))


def test_pairs_that_do_not_fit_are_not_dropped_silently(run, out, tmp_path):
    long = [pair(i) | {"prompt": "word " * 200} for i in range(4)]
    data = write_jsonl(tmp_path / "long.jsonl", [*long, *(pair(i) for i in range(12))])
    message = error_of(run(*QUICK, "--data_path", data, "--out_dir", out))
    assert "4 of 16 rows cannot be used" in message and "allow longer ones with --max_seq_len" in message
    result = run(*QUICK, "--data_path", data, "--out_dir", out, "--max_dropped", 0.5)
    assert result.returncode == 0 and "12 preference pairs, 4 unusable rows" in result.stdout


def test_stopped_and_resumed_and_never_onto_another_base(run, out, pairs, tokenizer):
    flags = [
        *QUICK,
        "--data_path",
        pairs,
        "--max_steps",
        6,
        "--learning_rate",
        1e-3,
        "--dropout",
        0.1,
        "--out_dir",
        out,
    ]
    assert run(*flags, "--save_interval", 2).returncode == 0
    whole = weights(out)
    result = run(*flags, "--resume", out / "rl_32.resume" / "step_00000004")
    assert result.returncode == 0 and "resuming after step 4" in result.stdout
    assert same(weights(out), whole)  # measured against the same reference as before, not against step 4
    write_base(out / "full_sft_32.pth", tokenizer, seed=1)
    assert "this is a different run: origin: " in error_of(run(*flags, "--resume"))
    assert same(weights(out), whole)


def test_resuming_with_another_loss_is_refused(run, out, pairs):
    flags = [*QUICK, "--data_path", pairs, "--out_dir", out]
    assert run(*flags, "--save_interval", 2).returncode == 0
    state = out / "rl_32.resume" / "step_00000002"
    message = error_of(run(*flags, "--resume", state, "--beta", 0.5, "--loss", "ipo"))
    assert "objective.beta: 0.1 -> 0.5" in message and "objective.loss: sigmoid -> ipo" in message
    assert "objective.label_smoothing: 0.0 -> 0.1" in error_of(run(*flags, "--resume", state, "--label_smoothing", 0.1))


def test_without_a_base(run, tmp_path, pairs, tokenizer):
    flags = [*QUICK, "--data_path", pairs, "--out_dir", tmp_path / "out"]
    assert "no full_sft_*.pth in" in error_of(run(*flags))
    assert "nothing.pth" in error_of(run(*flags, "--init_from", tmp_path / "nothing.pth"))
    tiny = "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 64".split()
    result = run(*flags, *tiny, "--init_from", "none")
    assert result.returncode == 0 and "WARNING: starting from random weights" in result.stdout
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=MARGIN)


def test_wrong_flags_are_named_all_at_once(run, out):
    flags = "--beta 0 --label_smoothing 0.5 --loss ipo --max_dropped 2 --epochs 0".split()
    result = run(*flags, "--out_dir", out)
    assert result.returncode == 2
    for part in ("--beta 0", "--label_smoothing 0.5", "for --loss ipo", "--max_dropped 2", "--epochs 0"):
        assert part in result.stderr, part
    assert run("--loss", "other").returncode == 2


def test_missing_data_is_named_with_the_command_that_makes_it(run, out, tmp_path):
    message = error_of(run(*QUICK, "--data_path", tmp_path / "a.json", "--out_dir", out))
    assert "a.json" in message and "python data_process.py dpo" in message
