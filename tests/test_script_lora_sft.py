"""4-lora_sft.py as a user runs it: an adapter that peft reads, the same model when merged, and clear refusals."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import launching
import pytest
import torch
from launching import error_of
from peft import PeftModel
from tolerances import close_to, shape_of

from model.LMConfig import LMConfig
from model.lora import load_adapter
from model.model import Transformer
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

SCRIPT = "4-lora_sft.py"
QUICK = (
    "--device cpu --dtype float32 --max_steps 4 --batch_size 2 --log_interval 1 --val_fraction 0 --lora_name me".split()
)
IDS = torch.tensor([[1, 300, 400, 2, 201, 1, 500, 600]])


@pytest.fixture
def run(run_here) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_here, SCRIPT)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write_base(path: Path, tokenizer, seed: int = 0, **fields) -> Path:
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
    info = {"stage": "full_sft", "step": 7, "tokenizer_hash": tokenizer_hash(tokenizer)}
    save_checkpoint(path, Transformer(LMConfig(**shape | fields)), info=info, overwrite=True)
    return path


@pytest.fixture
def out(tmp_path, tokenizer) -> Path:
    """An output folder with a fine-tuned checkpoint."""
    write_base(tmp_path / "out" / "full_sft_32.pth", tokenizer)
    return tmp_path / "out"


@pytest.fixture
def chats(tmp_path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"who are you {i}"}, {"role": "assistant", "content": "I am Mini."}]}
        for i in range(12)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_adapter_merged_file_and_peft_are_one_model(run, tmp_path, chats, tokenizer, moe):
    name = "32_moe" if moe else "32"
    base = write_base(tmp_path / f"full_sft_{name}.pth", tokenizer, use_moe=moe)
    before = base.read_bytes()
    result = run(*QUICK, "--data_path", chats, "--out_dir", tmp_path, "--merge", "--show_sample")
    assert result.returncode == 0, result.stderr
    assert "parameters are trained (" in result.stdout and "»I am Mini.</s>«" in result.stdout
    assert (
        "step 4/4 100%" in result.stdout and f"python 2-eval.py --lora {tmp_path / f'lora_me_{name}'}" in result.stdout
    )
    lines = [json.loads(line) for line in (tmp_path / f"lora_me_{name}.metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert base.read_bytes() == before

    folder = tmp_path / f"lora_me_{name}"
    adapted = load_adapter(folder, tokenizer=tokenizer)
    assert adapted.info["stage"] == "lora" and adapted.info["step"] == 4
    plain = load_checkpoint(base)
    assert (logits(adapted.model) - logits(plain.model)).abs().max() > 1e-3
    merged = load_checkpoint(tmp_path / f"lora_me_{name}.pth", tokenizer=tokenizer)
    expected = logits(adapted.model)
    bound = close_to(expected, **shape_of(adapted.model.config))
    torch.testing.assert_close(logits(merged.model), expected, **bound)
    assert merged.info["merged_adapter"] == f"lora_me_{name}"
    theirs = PeftModel.from_pretrained(plain.model, str(folder))
    torch.testing.assert_close(logits(theirs), expected, **bound)
    # Merged weights are another base: the adapter cannot be added a second time.
    with pytest.raises(ValueError, match="was trained on other weights"):
        load_adapter(folder, base=merged.path)


def test_in_a_process_of_its_own_with_chosen_settings(out, chats, tmp_path):
    flags = "--rank 2 --alpha 4 --lora_dropout 0.1 --target_modules wq wv".split()
    result = launching.run(SCRIPT, *QUICK, *flags, "--data_path", chats, "--out_dir", out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((out / "lora_me_32" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.1)
    assert sorted(config["target_modules"]) == ["wq", "wv"]
    assert not (out / "lora_me_32.pth").exists()


def test_any_checkpoint_can_be_the_base(run, tmp_path, chats, tokenizer):
    base = write_base(tmp_path / "elsewhere" / "rl_32.pth", tokenizer)
    flags = [*QUICK, "--data_path", chats, "--out_dir", tmp_path / "out"]
    message = error_of(run(*flags))
    assert "no full_sft_*.pth or rl_*.pth or rlvr_*.pth or distill_*.pth in" in message and "--init_from" in message
    assert run(*flags, "--init_from", base).returncode == 0
    assert load_adapter(tmp_path / "out" / "lora_me_32", base=base).info["base"] == "rl_32.pth"
    with pytest.raises(ValueError, match="rl_32.pth does not exist"):
        load_adapter(tmp_path / "out" / "lora_me_32")


def test_stopped_and_resumed_and_never_onto_another_base(run, out, chats, tokenizer):
    flags = [*QUICK, "--data_path", chats, "--batch_size", 1, "--max_steps", 6, "--lora_dropout", 0.1, "--out_dir", out]
    assert run(*flags, "--save_interval", 2).returncode == 0
    whole = adapter_bytes(out / "lora_me_32")
    result = run(*flags, "--resume", out / "lora_me_32.resume" / "step_00000004")
    assert result.returncode == 0 and "resuming after step 4" in result.stdout
    assert adapter_bytes(out / "lora_me_32") == whole
    assert "adapter.r: 8 -> 4" in error_of(run(*flags, "--resume", "--rank", 4))
    write_base(out / "full_sft_32.pth", tokenizer, seed=1)
    error = error_of(run(*flags, "--resume"))
    assert "this is a different run: origin: " in error
    assert f"{out / 'full_sft_32.pth'} has other weights than those it started from" in error
    assert adapter_bytes(out / "lora_me_32") == whole


def test_an_adapter_is_replaced_only_when_asked(run, out, chats, tokenizer):
    flags = [*QUICK, "--data_path", chats, "--out_dir", out]
    assert run(*flags).returncode == 0
    before = adapter_bytes(out / "lora_me_32")
    message = error_of(run(*flags))
    assert "lora_me_32.resume holds a finished run of 4 steps: replace it with --overwrite" in message
    shutil.rmtree(out / "lora_me_32.resume")  # the adapter alone is reason enough
    assert f"{out / 'lora_me_32'} exists: replace it with --overwrite" in error_of(run(*flags))
    assert adapter_bytes(out / "lora_me_32") == before
    write_base(out / "full_sft_32.pth", tokenizer, n_layers=3)
    result = run(*flags, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert load_adapter(out / "lora_me_32", tokenizer=tokenizer).model.config.n_layers == 3


def test_a_merged_file_is_not_replaced_unasked(run, out, chats, tokenizer):
    write_base(out / "lora_me_32.pth", tokenizer)
    before = (out / "lora_me_32.pth").read_bytes()
    flags = [*QUICK, "--data_path", chats, "--out_dir", out]
    assert "lora_me_32.pth exists: replace it with --overwrite" in error_of(run(*flags, "--merge"))
    assert not (out / "lora_me_32").exists()  # refused before training
    base = ["--init_from", out / "lora_me_32.pth"]
    assert "replace the weights it starts from" in error_of(run(*flags, *base, "--merge", "--overwrite"))
    assert (out / "lora_me_32.pth").read_bytes() == before
    assert run(*flags).returncode == 0  # which without --merge does not touch the file
    assert (out / "lora_me_32.pth").read_bytes() == before


def test_wrong_flags_are_named_all_at_once(run, out, chats):
    flags = ["--lora_name", "a/b", "--rank", 0, "--alpha", 0, "--lora_dropout", 1, "--init_from", "none", "--epochs", 0]
    flags += ["--embedding_lr_scale", 2]
    result = run(*flags, "--out_dir", out)
    assert result.returncode == 2
    for part in ("--lora_name 'a/b'", "--rank 0", "--alpha 0", "--lora_dropout 1", "--init_from none", "--epochs 0"):
        assert part in result.stderr, part
    assert "--embedding_lr_scale: the embedding is frozen" in result.stderr
    message = error_of(run(*QUICK, "--data_path", chats, "--out_dir", out, "--target_modules", "wq", "q_proj"))
    assert "--target_modules" in message and "q_proj; there are w1, w2, w3, wk" in message
    message = error_of(run(*QUICK, "--data_path", chats, "--out_dir", out, "--target_modules", "output"))
    assert "--target_modules" in message


def test_what_is_missing_is_named(run, out, tmp_path, chats):
    flags = [*QUICK, "--data_path", chats]
    assert "full_sft_48.pth" in error_of(run(*flags, "--out_dir", out, "--init_from", out / "full_sft_48.pth"))
    assert "none.jsonl" in error_of(run(*QUICK, "--data_path", tmp_path / "none.jsonl", "--out_dir", out))
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert str(blocked) in error_of(run(*flags, "--out_dir", blocked, "--init_from", out / "full_sft_32.pth"))
