"""export_model.py as a user runs it: in a process of its own, with good and bad input."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from launching import ROOT, another_process_holds, run

import export_model
from common.errors import UserError
from common.files import exclusive
from model.LMConfig import LMConfig
from model.lora import add_adapter, save_adapter
from model.model import Transformer
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

SCRIPT = "export_model.py"
TINY = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, max_seq_len=128, initializer_range=0.15)


def make(path: Path, seed: int = 0, **fields) -> Path:
    torch.manual_seed(seed)
    info = {"stage": "full_sft", "step": 7, "tokenizer_hash": tokenizer_hash(load_tokenizer())}
    save_checkpoint(path, Transformer(LMConfig(**TINY, **fields)), info=info)
    return path


@pytest.fixture
def main(monkeypatch):
    """The script in this process: for what need not start a new one, which takes seconds."""
    monkeypatch.setattr("signal.signal", lambda *args: None)

    def call(*args) -> None:
        monkeypatch.setattr("sys.argv", ["export_model.py", *map(str, args)])
        export_model.main()

    return call


def names(folder: Path) -> set[str]:
    """What is in a folder; the files that processes hold each other off with do not count."""
    return {path.name for path in folder.iterdir() if not fnmatch(path.name, ".*.lock")}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder with a dense checkpoint and a mixture of experts."""
    out = tmp_path_factory.mktemp("out")
    make(out / "pretrain_64_moe.pth", use_moe=True)
    make(out / "full_sft_64.pth")
    return out


def test_to_llama_and_back_bit_for_bit(out, tmp_path, main):
    text = tmp_path / "text.txt"
    text.write_text("你好，世界。\n\nA paragraph of text.\n", encoding="utf-8")
    result = run(SCRIPT, "--out_dir", out, "--text", text)
    assert result.returncode == 0, result.stderr
    message = result.stdout
    assert "largest difference of logits over" in message and "(allowed: 0.0001)" in message
    folder = out / "full_sft_64-llama"  # the newest checkpoint but no stage was named
    assert names(folder) >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert "out/" not in (folder / "README.md").read_text(encoding="utf-8")

    main("--format", "pth", "--weights", folder, "--output", tmp_path / "back.pth")
    before, after = load_checkpoint(out / "full_sft_64.pth"), load_checkpoint(tmp_path / "back.pth")
    assert after.fingerprint == before.fingerprint  # of the contents of the files
    assert after.info == before.info and after.config.own_fields() == before.config.own_fields()

    with pytest.raises(UserError, match="exists; replace it with --overwrite"):
        main("--out_dir", out)
    with pytest.raises(UserError, match="back.pth exists; replace it with --overwrite"):
        main("--format", "pth", "--weights", folder, "--output", tmp_path / "back.pth")
    main("--out_dir", out, "--overwrite")


def test_an_export_keeps_its_own_tokenizer_when_exported_again(out, tmp_path, main):
    folder = tmp_path / "x-llama"
    main("--weights", out / "full_sft_64.pth", "--output", folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
    main("--weights", folder, "--format", "minimind", "--output", tmp_path / "y")
    copied = json.loads((tmp_path / "y" / "tokenizer_config.json").read_text())
    assert copied == json.loads(config.read_text()) and copied["model_max_length"] == 77
    # Otherwise transformers 4 passes token_type_ids to the model, which refuses them.
    assert copied["model_input_names"] == ["input_ids", "attention_mask"]


def test_minimind_with_an_adapter_merged(out, tmp_path, main, capsys):
    base = load_checkpoint(out / "full_sft_64.pth")
    model = add_adapter(base.model, rank=4, alpha=8.0, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = out / "lora_x_64"
    save_adapter(adapter, model, base, {"stage": "lora"})
    main("--out_dir", out, "--lora", adapter, "--format", "minimind")
    message = capsys.readouterr().out
    assert "merged into full_sft_64.pth" in message and "(allowed: 0)" in message
    assert names(out / "lora_x_64-minimind") >= {"LMConfig.py", "model.py", "attention.py", "moe.py", "rope.py"}
    assert "| stage | lora |" in (out / "lora_x_64-minimind" / "README.md").read_text(encoding="utf-8")

    other = make(tmp_path / "other.pth", seed=1)
    with pytest.raises(UserError, match="was trained on other weights"):
        main("--out_dir", tmp_path, "--lora", adapter, "--weights", other)
    assert names(tmp_path) == {"other.pth", "other.json"}


def test_gguf_of_a_mixture_of_experts(out, main, capsys):
    main("--weights", out / "pretrain_64_moe.pth", "--out_dir", out, "--format", "gguf", "--dtype", "q8_0")
    message = capsys.readouterr().out
    assert "nats on average" in message
    assert names(out / "pretrain_64_moe-gguf") == {
        "pretrain_64_moe.q8_0.gguf", "Modelfile", "README.md", "minimind.json",
    }  # fmt: skip


def test_onnx_of_a_mixture_of_experts(out, main, capsys):
    main("--weights", out / "pretrain_64_moe.pth", "--out_dir", out, "--format", "onnx", "--tolerance", "1e-5")
    assert "largest difference of logits" in capsys.readouterr().out
    assert names(out / "pretrain_64_moe-onnx") == {
        "model.onnx", "README.md", "minimind.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    code = (
        (out / "pretrain_64_moe-onnx" / "README.md")
        .read_text(encoding="utf-8")
        .partition("```python")[2]
        .partition("```")[0]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0 and "<s>assistant" in done.stdout, done.stderr


def test_failures_leave_nothing(out, tmp_path, main):
    broken, good = tmp_path / "broken.pth", out / "full_sft_64.pth"
    broken.write_bytes(good.read_bytes()[:100_000])
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = tmp_path / "out.pth"
    folder.mkdir()
    before = names(tmp_path)
    for message, args in {
        "is damaged or cut off": ["--weights", broken],
        "no checkpoint .*missing.pth": ["--weights", tmp_path / "missing.pth"],
        r"no rlvr_\*.pth, rl_\*.pth, distill_\*.pth, full_sft_\*.pth, pretrain_\*.pth in .*empty": ["--out_dir", empty],
        "does not compute what its source does": ["--weights", good, "--tolerance", "1e-12"],
        "is not an adapter": ["--lora", empty],
        "--text .* cannot be read": ["--weights", good, "--text", tmp_path / "missing.txt"],
        "--ceval .* cannot be read": ["--weights", good, "--ceval", broken],
        "no tokenizer.json": ["--weights", good, "--tokenizer", empty],
        "no config.json in": ["--weights", empty],
        "no config.json": ["--weights", empty, "--format", "pth"],
        "is not an exported model": ["--weights", tmp_path / "missing.pth", "--output", broken, "--overwrite"],
        "out.pth is a folder": ["--weights", empty, "--format", "pth", "--output", folder, "--overwrite"],
    }.items():
        with pytest.raises(UserError, match=message):
            main(*args, *([] if "--out_dir" in args or "pth" in args else ["--out_dir", tmp_path]))
        assert names(tmp_path) == before and not names(empty)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
@pytest.mark.parametrize("target_format", ["llama", "minimind", "gguf", "pth"])
def test_a_full_disk_keeps_the_old_export(out, tmp_path, main, target_format):
    """A limit on the size of files, which stands for a full disk, below the size of the weights."""
    import resource

    target = tmp_path / ("x.pth" if target_format == "pth" else "x")
    weights = out / "full_sft_64.pth"
    if target_format == "pth":
        main("--weights", weights, "--output", tmp_path / "source")
        weights = tmp_path / "source"
    command = ["--weights", weights, "--format", target_format, "--output", target]
    main(*command)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"no space left in {tmp_path}: .* --output; nothing was changed"):
            main(*command, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_sigterm_leaves_nothing_and_is_the_exit_code(out, tmp_path):
    stopped = """
import os, signal, sys, export_model, export.exporter
export.exporter.compare_folder = lambda *args: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["export_model.py", *sys.argv[1:]]
export_model.run_script(export_model.main)
"""
    command = [sys.executable, "-c", stopped, "--weights", out / "full_sft_64.pth", "--output", tmp_path / "export"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr, names(tmp_path)) == (143, "error: stopped by SIGTERM\n", set())


def test_what_a_killed_export_left_goes_and_two_do_not_meet(out, tmp_path, main, monkeypatch):
    """SIGKILL while the folder is checked; then the lock of a process that is alive."""
    weights, target = out / "full_sft_64.pth", tmp_path / "export"
    killed = """
import os, signal, sys, export_model, export.exporter
export.exporter.compare_folder = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["export_model.py", *sys.argv[1:]]
export_model.main()
"""
    command = [sys.executable, "-c", killed, "--weights", weights, "--output", target]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.endswith(".tmp") and "model.safetensors" in names(tmp_path / left)
    (tmp_path / "export.of-mine.tmp").mkdir()  # not named by a machine
    main("--weights", weights, "--output", target)
    assert names(tmp_path) == {"export", "export.of-mine.tmp"}

    monkeypatch.setattr("export.exporter.exclusive", functools.partial(exclusive, wait=0.3))
    with another_process_holds(tmp_path, "export"):
        old = target.with_name(".export.old")  # as while a folder takes another's name
        old.mkdir()
        for more in ([], ["--overwrite"]):
            with pytest.raises(UserError, match="another process is writing .*export right now"):
                main("--weights", weights, "--output", target, *more)
        assert old.exists()
    assert "model.safetensors" in names(target)


def test_combinations_that_make_no_sense(main, capsys):
    for args, messages in {
        "--dtype q8_0 --push_to_hub me --tolerance -1": [
            "q8_0 needs --format gguf",
            "give user/name",
            "at least 0",
        ],
        "--format pth --lora x --out_dir y": [
            "--lora is not for --format pth",
            "--out_dir is not for",
            "needs --weights FOLDER",
        ],
        "--private --output /dev/null/x/y": ["--private is for --push_to_hub", "/dev/null is not a folder"],
        "--format pth --weights x --output x/y": ["name a .pth file"],
        "--output . --overwrite": ["--output .: name the file or folder to write"],
        "--output=": ["--output: the path is empty"],
        "--format gguf --dtype bf16": ["--dtype bfloat16 is not for --format gguf: use float32, float16, q8_0"],
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(*args.split())
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and all(message in error for message in messages)


def test_push(out, tmp_path, main, monkeypatch):
    """What is uploaded is the folder; where that fails, the message says that the folder is there."""
    uploads = []

    class Hub:
        def create_repo(self, repo, **settings):
            uploads.append((repo, settings))
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploads.append((repo_id, names(folder_path)))
            if repo_id == "me/full":
                raise OSError("quota exceeded\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    common = ["--weights", out / "full_sft_64.pth", "--output"]
    main(*common, tmp_path / "a", "--push_to_hub", "me/mine", "--private")
    assert uploads[0] == ("me/mine", {"exist_ok": True, "private": True})
    assert uploads[1] == ("me/mine", names(tmp_path / "a"))
    assert 'from_pretrained("me/mine")' in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is written, but was not uploaded to me/full: quota exceeded; log in"):
        main(*common, tmp_path / "b", "--push_to_hub", "me/full")
    assert names(tmp_path / "b") == names(tmp_path / "a") >= {"model.safetensors", "README.md"}


def test_no_hub_is_no_traceback(out, tmp_path, main, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="was not uploaded to me/mine: .*refused"):
        main("--weights", out / "full_sft_64.pth", "--output", tmp_path / "a", "--push_to_hub", "me/mine")
