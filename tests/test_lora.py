"""model/lora.py: an adapter changes nothing but itself, knows its base, and survives being interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from states import read_state
from tolerances import assert_logits_close

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.tokenize import TokenizedDataset
from model import lora
from model.LMConfig import LMConfig
from model.lora import ALL_PROJECTIONS, add_adapter, apply_adapter, load_adapter, save_adapter, trainable_share
from model.model import Transformer
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint
from trainer.distributed import DistEnv
from trainer.losses import next_token_loss
from trainer.options import TrainOptions
from trainer.trainer import Run, fit

VOCAB, ROW = 48, 32
kinds = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
IDS = torch.tensor([[1, 5, 9, 13, 2, 7, 3, 3], [1, 4, 8, 12, 16, 20, 24, 2]])


def write_base(path: Path, moe: bool = False, seed: int = 0, **fields) -> Path:
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=ROW, use_moe=moe)
    save_checkpoint(path, Transformer(LMConfig(**shape | fields)), info={"stage": "full_sft"}, overwrite=True)
    return path


def adapted_to(path: Path, seed: int = 0, **settings):
    """(adapter on the base, the base's checkpoint)."""
    base = load_checkpoint(path)
    torch.manual_seed(seed)
    return add_adapter(base.model, **dict(rank=4, alpha=8.0, dropout=0.0) | settings), base


def train(adapted, steps: int = 8) -> None:
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    adapted.train()
    for _ in range(steps):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def base_path(tmp_path) -> Path:
    return write_base(tmp_path / "full_sft_32.pth")


@pytest.fixture
def saved(base_path) -> Path:
    """The folder of a trained adapter beside its base."""
    adapted, base = adapted_to(base_path)
    train(adapted, 3)
    folder = base_path.parent / "lora_x_32"
    save_adapter(folder, adapted, base, {"stage": "lora", "step": 3})
    return folder


@kinds
def test_an_adapter_from_start_to_merged(tmp_path, moe):
    path = write_base(tmp_path / "base.pth", moe)
    plain = load_checkpoint(path).model
    adapted, base = adapted_to(path)
    assert torch.equal(logits(adapted), logits(plain))  # it starts as zero

    before = {name: p.clone() for name, p in adapted.named_parameters()}
    train(adapted)
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    trained = logits(adapted)
    assert (trained - logits(plain)).abs().max() > 0.1

    save_adapter(tmp_path / "lora_x_32", adapted, base, {"stage": "lora"})
    loaded = load_adapter(tmp_path / "lora_x_32", base=path)
    assert_logits_close(logits(loaded.model), trained, base.config)
    assert type(loaded.model) is Transformer and loaded.info["base"] == "base.pth"
    # What peft reads, on a model that knows nothing of this toolkit's files.
    fresh = Transformer(base.config)
    fresh.load_state_dict(plain.state_dict())
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "lora_x_32"))
    assert_logits_close(logits(theirs), trained, base.config)

    merged = adapted.merge_and_unload(safe_merge=True)
    assert_logits_close(logits(merged), trained, base.config)
    save_checkpoint(tmp_path / "merged.pth", merged, info={})
    again = load_checkpoint(tmp_path / "merged.pth").model
    assert_logits_close(logits(again), trained, base.config)


@kinds
def test_where_adapters_go(tmp_path, moe):
    adapted, _ = adapted_to(write_base(tmp_path / "base.pth", moe))
    places = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    linear = {name for name, m in Transformer(adapted.config).named_modules() if isinstance(m, torch.nn.Linear)}
    assert {place.removeprefix("base_model.model.") for place in places} == linear - {"output"}
    assert any(".experts.3.w2" in place for place in places) == moe
    assert not any(place.endswith((".gate", "output")) for place in places)
    assert " parameters are trained (" in trainable_share(adapted)
    few, _ = adapted_to(tmp_path / "base.pth", targets=["wq"])
    assert {name.rsplit(".", 4)[1] for name, p in few.named_parameters() if p.requires_grad} == {"wq"}


def test_rank_alpha_and_dropout_are_used(base_path):
    adapted, base = adapted_to(base_path, rank=3, alpha=6.0, dropout=0.5)
    layer = base.model.layers[0].attention.wq
    assert layer.lora_A["default"].weight.shape == (3, 32) and layer.scaling["default"] == 2.0
    assert layer.lora_dropout["default"].p == 0.5


@pytest.mark.parametrize("targets", [["q_proj"], ["wq", "nothing"], ["tok_embeddings"]])
def test_targets_that_match_nothing_are_refused(base_path, targets):
    with pytest.raises(ValueError, match=f"no linear layer .*is called {targets[-1]}; there are w1, w2, w3, wk"):
        adapted_to(base_path, targets=targets)


def test_no_targets_are_refused(base_path):
    with pytest.raises(ValueError, match="none named; there are w1, w2"):
        adapted_to(base_path, targets=[])


def test_the_tied_output_gets_no_adapter(base_path):
    """output.weight is the embedding: merging an adapter into it would change the embedding too."""
    with pytest.raises(ValueError, match="output"):
        adapted_to(base_path, targets=["wq", "output"])


# ---- an adapter knows its base


def test_a_longer_context_is_that_of_the_adapter(tmp_path):
    """Trained with --max_seq_len and --rope_scaling: it is loaded with them, though its base has not got them."""
    path = write_base(tmp_path / "base.pth")
    longer = {"max_seq_len": 4 * ROW, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    base = load_checkpoint(path, overrides=longer)
    torch.manual_seed(0)
    adapted = add_adapter(base.model, rank=4, alpha=8.0, dropout=0.0)
    train(adapted)
    save_adapter(tmp_path / "lora_x_32", adapted, base, {"stage": "lora"})
    loaded = load_adapter(tmp_path / "lora_x_32", base=path)
    assert loaded.config.max_seq_len == 4 * ROW and loaded.config.rope_scaling == base.config.rope_scaling
    assert_logits_close(logits(loaded.model), logits(adapted), base.config)


def test_another_base_is_refused(saved, tmp_path):
    other = write_base(tmp_path / "other.pth", seed=1)
    with pytest.raises(ValueError, match="was trained on other weights .*other.pth holds now"):
        load_adapter(saved, base=other)
    with pytest.raises(ValueError, match="was trained on other weights"):
        load_adapter(saved, base=write_base(tmp_path / "moe.pth", moe=True))


def test_a_changed_base_is_refused(saved, base_path):
    write_base(base_path, seed=1)
    with pytest.raises(ValueError, match="full_sft_32.pth holds now .*: train the adapter again, or find its base"):
        load_adapter(saved)


def test_merging_twice_is_refused(saved, base_path):
    merged = load_adapter(saved)
    save_checkpoint(base_path, merged.model, info={}, overwrite=True)
    with pytest.raises(ValueError, match="was trained on other weights"):
        load_adapter(saved)


def test_a_missing_base_is_named(saved, base_path):
    base_path.unlink()
    with pytest.raises(ValueError, match="its base .*full_sft_32.pth does not exist; put full_sft_32.pth there"):
        load_adapter(saved)


def test_an_adapter_of_another_rank_or_model_does_not_fit(saved, tmp_path):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ValueError, match="lora_x_32 does not fit this model, or is damaged: .+"):
        load_adapter(saved)
    for fields in (dict(n_layers=3), dict(dim=64), dict(moe=True)):
        model = load_checkpoint(write_base(tmp_path / "other.pth", **fields)).model
        (saved / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="lora_x_32 does not fit this model, or is damaged: .+"):
            apply_adapter(model, saved)


def without_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


DAMAGE = {
    "weights cut off": lambda folder: os.truncate(folder / "adapter_model.safetensors", 2000),
    "weights empty": lambda folder: os.truncate(folder / "adapter_model.safetensors", 0),
    "weights missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "a tensor missing": lambda folder: without_a_tensor(folder / "adapter_model.safetensors"),
    "config missing": lambda folder: (folder / "adapter_config.json").unlink(),
    "config cut off": lambda folder: os.truncate(folder / "adapter_config.json", 50),
    "config of another kind": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "NOTHING"}'),
    "config a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "description missing": lambda folder: (folder / "minimind.json").unlink(),
    "description cut off": lambda folder: os.truncate(folder / "minimind.json", 50),
    "description without base": lambda folder: (folder / "minimind.json").write_text('{"base": "full_sft_32.pth"}'),
    "description with a text for config": lambda folder: (folder / "minimind.json").write_text(
        '{"base": "full_sft_32.pth", "base_fingerprint": "x", "config": "y"}'
    ),
    "description a list": lambda folder: (folder / "minimind.json").write_text("[]"),
    "not text": lambda folder: (folder / "minimind.json").write_bytes(b"\xff\xfe"),
    "folder missing": shutil.rmtree,
    "folder empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_sound_adapter_is_refused_by_name(saved, damage, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    DAMAGE[damage](saved)
    with pytest.raises(ValueError, match="lora_x_32"):
        load_adapter(saved)


def test_a_relative_folder_is_never_looked_for_on_a_hub(saved, base_path, monkeypatch):
    """Of two parts, as out/lora_x_32, it could be the name of a repository."""
    (saved / "adapter_model.safetensors").unlink()
    monkeypatch.chdir(saved.parent.parent)
    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", lambda *args, **kwargs: pytest.fail("asked a hub"))
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda *args, **kwargs: pytest.fail("asked a hub"))
    with pytest.raises(ValueError, match="there is no adapter_model.safetensors in it"):
        load_adapter(Path(saved.parent.name) / saved.name)


def test_a_file_is_no_adapter(base_path):
    with pytest.raises(ValueError, match="is not an adapter of this toolkit"):
        load_adapter(base_path)


# ---- writing


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def clean(parent: Path) -> bool:
    return not [path for path in parent.iterdir() if path.name.startswith(".")]


def test_saving_replaces_the_whole_folder(saved, base_path):
    (saved / "stray.txt").write_text("of the old one")
    adapted, base = adapted_to(base_path, seed=1)
    train(adapted, 3)
    save_adapter(saved, adapted, base, {"step": 9})
    assert {"adapter_config.json", "adapter_model.safetensors", "minimind.json"} <= contents(saved).keys()
    assert not (saved / "stray.txt").exists()
    assert_logits_close(logits(load_adapter(saved).model), logits(adapted), base.config)
    assert clean(saved.parent)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "full_sft_32.pth"  # no path of this machine


@pytest.mark.parametrize("moment", ["weights", "description", "rename"])
def test_a_failed_save_keeps_the_old_adapter(saved, base_path, monkeypatch, moment):
    before = contents(saved)
    adapted, base = adapted_to(base_path, seed=1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if moment == "weights":
        monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    elif moment == "description":
        monkeypatch.setattr(lora, "write_json", fail)
    else:
        replace = os.replace

        def replace_but(source, target):
            fail() if Path(target) == saved else replace(source, target)

        monkeypatch.setattr(os, "replace", replace_but)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(saved, adapted, base, {})
    monkeypatch.undo()
    assert load_adapter(saved).info["step"] == 3
    assert contents(saved) == before and clean(saved.parent)


def test_a_save_killed_between_its_renames_is_undone(saved, base_path):
    """In a process of its own, killed by the kernel when the old folder is away and the new one not there yet."""
    before = contents(saved)
    adapted, base = adapted_to(base_path, seed=1)
    pid = os.fork()
    if pid == 0:  # the child; it must never return into pytest
        try:
            replace = os.replace

            def replace_or_die(source, target):
                if Path(target) == saved:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            os.replace = replace_or_die
            save_adapter(saved, adapted, base, {})
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not saved.exists()
    assert load_adapter(saved).info["step"] == 3
    assert contents(saved) == before
    # Killed a moment later, the new one counts and the old one is removed.
    shutil.copytree(saved, saved.with_name(".lora_x_32.old"))
    (saved / "minimind.json").write_text((saved / "minimind.json").read_text().replace('"step": 3', '"step": 4'))
    assert load_adapter(saved).info["step"] == 4
    assert not saved.with_name(".lora_x_32.old").exists()


def test_non_finite_adapters_are_not_saved(saved, base_path):
    before = contents(saved)
    adapted, base = adapted_to(base_path)
    with torch.no_grad():
        next(p for p in adapted.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lora_A.* is not finite"):
        save_adapter(saved, adapted, base, {})
    assert contents(saved) == before and clean(saved.parent)


# ---- in the loop


def rows() -> PackedRows:
    rng = np.random.default_rng(0)
    documents = [3 + (rng.integers(0, 45) + np.arange(rng.integers(2, 50))) % 45 for _ in range(40)]
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    dataset = TokenizedDataset(
        tokens=np.concatenate(documents).astype(np.uint16), loss_mask=None, offsets=offsets, n_bytes=np.diff(offsets),
        content_hashes=rng.integers(0, 2**63, 40).astype(np.uint64), fingerprint="corpus", info={},
    )  # fmt: skip
    return PackedRows(dataset, np.arange(40), ROW, seed=0)


def run_loop(out_dir: Path, moe: bool, stop_after: int | None = None, targets=ALL_PROJECTIONS, **fields):
    base_file = out_dir.parent / "base.pth"
    if not base_file.exists():
        write_base(base_file, moe)
    adapted, base = adapted_to(base_file, dropout=0.1, targets=targets)
    settings = dict(
        out_dir=out_dir, batch_size=4, max_steps=10, learning_rate=1e-2, weight_decay=0.0, device="cpu", dtype="float32",
        save_interval=4, log_interval=5,
    )  # fmt: skip
    options = TrainOptions(**settings | fields)
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        if calls == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return next_token_loss(model, batch)

    run = Run(
        "lora", "lora_x_32", base.config, {"origin": base.fingerprint},
        lambda info, tensors: save_adapter(out_dir / "lora_x_32", adapted, base, info, tensors),
    )  # fmt: skip
    metrics = fit(adapted, loss_fn, rows(), None, options, run, DistEnv())
    return adapted, metrics


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@kinds
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_stopped_and_resumed_is_bit_identical(tmp_path, moe, checkpointing):
    fields = {"gradient_checkpointing": checkpointing}
    whole, metrics = run_loop(tmp_path / "a", moe, **fields)
    assert metrics["loss"] < 3.8  # of ln 48 = 3.87
    with pytest.raises(SystemExit):
        run_loop(tmp_path / "b", moe, stop_after=5, **fields)
    resumed, _ = run_loop(tmp_path / "b", moe, resume="newest", **fields)
    assert parameters(whole).keys() == parameters(resumed).keys()
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(resumed)[name]), name
    files = [tmp_path / name / "lora_x_32" / "adapter_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    # The state holds the adapter only: the base is not copied at every save.
    saved, _ = read_state(tmp_path / "a" / "lora_x_32.resume" / "step_00000010")
    assert saved and all("lora_" in name for name in saved)


def test_resuming_with_other_targets_or_another_base_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        run_loop(tmp_path / "a", False, stop_after=5)
    with pytest.raises(UserError, match="has different parameters"):
        run_loop(tmp_path / "a", False, resume="newest", targets=["wq"])
    write_base(tmp_path / "base.pth", seed=1)
    with pytest.raises(UserError, match="origin: [0-9a-f]{16} -> [0-9a-f]{16}"):
        run_loop(tmp_path / "a", False, resume="newest")


def test_gradient_checkpointing_trains_the_same_adapter(tmp_path):
    """The re-entrant kind would give the adapter no gradient: the base's activations need none."""
    plain, _ = run_loop(tmp_path / "a", False)
    checkpointed, _ = run_loop(tmp_path / "b", False, gradient_checkpointing=True)
    for name, value in parameters(plain).items():
        assert torch.allclose(value, parameters(checkpointed)[name], atol=1e-5), name
