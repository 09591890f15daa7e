"""inference/model_finder.py: what is in a folder, told from names and JSON files alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from inference.model_finder import (
    ADAPTER,
    EXPORT,
    WEIGHTS,
    default_model,
    find_model,
    list_models,
    read_entry,
    require_model,
)
from model.architecture import checkpoint_name
from model.LMConfig import preset


def put(path: Path, content: bytes = b"weights", when: float = 1e9, **info) -> Path:
    """A file, its JSON if there is anything to say, both written at that time."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    files = [path]
    if info:
        files.append(path.with_suffix(".json"))
        files[-1].write_text(json.dumps(info), encoding="utf-8")
    for file in files:
        os.utime(file, (when, when))
    return path


def put_folder(folder: Path, weights: str, config: str, when: float = 1e9, **info) -> Path:
    put(folder / weights, b"w" * 10, when)
    put(folder / config, b"{}", when)
    (folder / "minimind.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def test_everything_that_a_folder_holds(tmp_path):
    put(tmp_path / "pretrain_64.pth", b"12345", 1e9 + 1, stage="pretrain", step=7, loss=2.5, config={})
    put(tmp_path / "full_sft_64.pth", when=1e9 + 2, stage="full_sft")
    put_folder(
        tmp_path / "lora_x_64",
        "adapter_model.safetensors",
        "adapter_config.json",
        1e9 + 3,
        base="full_sft_64.pth",
        loss=1,
    )
    put_folder(tmp_path / "full_sft_64-llama", "model.safetensors", "config.json", 1e9 + 4, stage="full_sft")
    for name in ("notes.txt", "a.metrics.jsonl", ".hidden.pth", "half.pth.tmp"):
        put(tmp_path / name)
    (tmp_path / "pretrain_64.resume").mkdir()
    (tmp_path / "folder.pth").mkdir()
    put_folder(tmp_path / ".lora_x_64.abc.tmp", "adapter_model.safetensors", "adapter_config.json")
    put_folder(tmp_path / "export.abc.tmp", "model.safetensors", "config.json")

    found = list_models(tmp_path)
    assert [(entry.path.name, entry.kind, entry.stage) for entry in found] == [
        ("full_sft_64-llama", EXPORT, "full_sft"),
        ("lora_x_64", ADAPTER, "lora"),
        ("full_sft_64.pth", WEIGHTS, "full_sft"),
        ("pretrain_64.pth", WEIGHTS, "pretrain"),
    ]
    adapter, pretrain = found[1], found[3]
    assert (adapter.base, adapter.size, adapter.loss) == ("full_sft_64.pth", 10, 1.0)
    assert (pretrain.size, pretrain.step, pretrain.loss, pretrain.continues) == (5, 7, 2.5, True)
    assert default_model(found) is adapter
    assert default_model([pretrain]) is pretrain


def test_stage_from_the_name_where_nothing_tells_it(tmp_path):
    put(tmp_path / "rl_768_moe.pth")
    put(tmp_path / "mine.pth")
    assert {entry.path.name: entry.stage for entry in list_models(tmp_path)} == {"rl_768_moe.pth": "rl", "mine.pth": ""}


def test_descriptions_that_are_no_descriptions(tmp_path):
    for i, text in enumerate(["", "{", "[]", '{"stage": 3, "loss": "low", "step": 1.5, "base": 7}', '{"loss": NaN}']):
        put(tmp_path / f"full_sft_{i}.pth").with_suffix(".json").write_text(text, encoding="utf-8")
    for entry in list_models(tmp_path):
        assert (entry.stage, entry.loss, entry.step, entry.base) == ("full_sft", None, None, None)
    assert len(list_models(tmp_path)) == 5


def test_an_entry_changes_with_its_files(tmp_path):
    weights = put(tmp_path / "full_sft_64.pth", stage="full_sft")
    adapter = put_folder(
        tmp_path / "lora_x_64", "adapter_model.safetensors", "adapter_config.json", base="full_sft_64.pth"
    )
    before = read_entry(weights), read_entry(adapter)
    assert before == (read_entry(weights), read_entry(adapter))
    put(weights, when=1e9 + 5)
    assert read_entry(weights).stamp != before[0].stamp
    assert read_entry(adapter).stamp != before[1].stamp  # it is merged into that base


def test_a_forbidden_folder_is_no_model(tmp_path, monkeypatch):
    """As lost+found, to anybody but root: Python's Path.is_file raises an error there until 3.13."""
    (tmp_path / "lost+found").mkdir()

    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", forbidden)
    assert read_entry(tmp_path / "lost+found") is None


def test_nothing_there(tmp_path):
    assert list_models(tmp_path) == [] == list_models(tmp_path / "none")
    assert list_models(put(tmp_path / "file")) == []
    assert read_entry(tmp_path / "none.pth") is None


def test_names_and_finding(tmp_path):
    assert checkpoint_name("pretrain", preset("minimind-v1-small")) == "pretrain_512.pth"
    assert checkpoint_name("full_sft", preset("minimind-v1-moe")) == "full_sft_512_moe.pth"
    assert find_model(tmp_path / "none", ["pretrain"]) is None
    assert find_model(tmp_path, ["pretrain"]) is None
    names = [
        "pretrain_512.pth",
        "full_sft_192.pth",
        "rl_512_moe.pth",
        "pretrain_192.pth",
        "pretrain_x.pth",
        "other.pth",
    ]
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "pretrain_768.pth").mkdir()

    def found(*args) -> str | None:
        path = find_model(tmp_path, *args)
        return path and path.name

    assert found(["pretrain", "full_sft"]) == "pretrain_512.pth"
    assert found(["full_sft", "rl"]) == "full_sft_192.pth"
    assert found(["rl"]) == "rl_512_moe.pth"
    assert found(["pretrain"], preset("toy")) == "pretrain_192.pth"
    assert found(["rl"], preset("toy")) is None
    assert found(["rl"], preset("minimind-v1-moe")) == "rl_512_moe.pth"
    os.utime(tmp_path / "pretrain_192.pth", (5000, 5000))
    assert found(["pretrain", "full_sft"]) == "pretrain_192.pth"


def test_a_finished_model_is_preferred_and_the_choice_is_printed(tmp_path, capsys):
    def said() -> str:
        return capsys.readouterr().out.replace(f"{tmp_path}/", "")

    trial = put(tmp_path / "pretrain_64.pth", when=1e9 + 2, stage="pretrain", step=3, total_steps=1000)
    assert find_model(tmp_path, ["pretrain"]) == trial
    assert said() == "using pretrain_64.pth (unfinished: step 3 of 1000); --weights names another\n"
    whole = put(tmp_path / "pretrain_512.pth", when=1e9 + 1, stage="pretrain", step=1000, total_steps=1000)
    put(tmp_path / "full_sft_64.pth", when=1e9 + 4, stage="full_sft")
    assert find_model(tmp_path, ["pretrain"], flag="--init_from") == whole
    assert said() == (
        "using pretrain_512.pth (step 1000 of 1000), the newest finished one of 2 that fit; newer: pretrain_64.pth "
        "(unfinished: step 3 of 1000); --init_from names another\n"
    )
    published = put(tmp_path / "pretrain_768.pth", when=1e9 + 3)
    assert find_model(tmp_path, ["pretrain"]) == published
    assert said() == "using pretrain_768.pth, the newest one of 3 that fit; --weights names another\n"
    assert find_model(tmp_path, ["full_sft"]) and said() == ""  # no choice, and no reason to doubt it

    (answering,) = [entry for entry in list_models(tmp_path) if entry.stage == "full_sft"]
    assert default_model(list_models(tmp_path)) == answering
    put(tmp_path / "rl_64.pth", when=1e9 + 5, stage="rl", step=1, total_steps=2)
    assert default_model(list_models(tmp_path)) == answering


def test_adapters_are_found_too(tmp_path):
    put(tmp_path / "full_sft_64.pth", when=1e9 + 1)
    adapter = put_folder(tmp_path / "lora_x_64", "adapter_model.safetensors", "adapter_config.json", 1e9 + 2)
    put_folder(tmp_path / "full_sft_64-llama", "model.safetensors", "config.json", 1e9 + 3, stage="full_sft")
    assert find_model(tmp_path, ["full_sft", "lora"]) == adapter
    assert (
        find_model(tmp_path, ["full_sft"]) == require_model(tmp_path, ["full_sft"], "") == tmp_path / "full_sft_64.pth"
    )
    with pytest.raises(UserError, match=r"no rl_\*.pth, lora_\* in .*none: run 3-full_sft.py, or name a model"):
        require_model(tmp_path / "none", ["rl", "lora"], "3-full_sft.py")
