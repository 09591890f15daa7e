"""Training state on disk: whatever happens while writing, the states before are there."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from trainer import checkpoint
from trainer.checkpoint import complete_states, differences, load_state, save_state

ROOT = Path(__file__).resolve().parents[1]


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_states(folder)]


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        save_state(tmp_path, step, {"w": torch.full((3,), float(step)), "n": step}, {"seed": 7}, keep=2)
    assert steps(tmp_path) == [3, 100_000_000]
    state = load_state(tmp_path)
    assert (state.step, state.run["seed"]) == (100_000_000, 7)
    assert torch.equal(state.tensors["w"], torch.full((3,), 1e8))
    assert load_state(tmp_path / "step_00000003").tensors["n"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_100000000"]


def test_a_state_of_the_same_step_is_replaced(tmp_path):
    for value in (1, 2):
        save_state(tmp_path, 5, {"n": value}, {}, keep=2)
    assert steps(tmp_path) == [5]
    assert load_state(tmp_path).tensors["n"] == 2


def test_without_its_marker_a_state_does_not_exist(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, {}, {}, keep=2)
    (tmp_path / "step_00000002" / "COMPLETE").unlink()
    assert load_state(tmp_path).step == 1
    with pytest.raises(UserError, match="not complete.*newest complete state is .*step_00000001"):
        load_state(tmp_path / "step_00000002")
    save_state(tmp_path, 3, {}, {}, keep=2)
    assert not (tmp_path / "step_00000002").exists()  # nobody's leftovers are cleared away


def test_a_state_whose_replacement_was_killed_is_there(tmp_path):
    save_state(tmp_path, 1, {"a": torch.ones(1)}, {}, keep=2)
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.old")
    save_state(tmp_path, 2, {"a": torch.ones(1)}, {}, keep=2)
    assert steps(tmp_path) == [1, 2]


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--resume auto"):
        load_state(tmp_path / "none.resume")
    with pytest.raises(UserError, match="no complete state"):
        load_state(tmp_path)


def test_a_damaged_state_is_named(tmp_path):
    save_state(tmp_path, 1, {"w": torch.ones(100)}, {}, keep=2)
    file = tmp_path / "step_00000001" / "state.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="step_00000001 cannot be read"):
        load_state(tmp_path)


def test_a_state_cannot_run_code(tmp_path):
    save_state(tmp_path, 1, {}, {}, keep=2)
    torch.save({"w": Path("x")}, tmp_path / "step_00000001" / "state.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("enforce fail at inline_container.cc")]
)
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, error):
    save_state(tmp_path, 1, {"n": 1}, {}, keep=2)

    def full(*_):
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="no space left.*--resume.*step_00000001"):
        save_state(tmp_path, 2, {"n": 2}, {}, keep=2)
    assert steps(tmp_path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_killed_while_writing_leaves_a_loadable_state(tmp_path):
    """SIGKILL at a random moment of an endless series of saves: the newest complete state reads back whole."""
    script = """
import sys, torch
from pathlib import Path
from trainer.checkpoint import save_state
step = int(sys.argv[2])
while True:
    step += 1
    save_state(Path(sys.argv[1]), step, {"w": torch.full((200_000,), float(step))}, {}, keep=2)
    print(step, flush=True)
"""
    done = 0
    for kill in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(done)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(kill + 2):
            done = int(process.stdout.readline())
        try:
            process.wait(timeout=0.003 * kill)
        except subprocess.TimeoutExpired:
            pass
        process.kill()
        rest = process.communicate()[0].split()
        done = int(rest[-1]) if rest else done
        state = load_state(tmp_path)
        assert state.step in (done, done + 1)
        assert torch.equal(state.tensors["w"], torch.full((200_000,), float(state.step)))
        done = state.step


def test_differences_are_named_with_both_values():
    then = {"seed": 1, "config": {"dim": 512, "n_layers": 8}}
    now = {"seed": 1, "config": {"dim": 256, "n_layers": 8}, "new": 3}
    assert differences(now, then) == ["config.dim: 512 -> 256", "new: None -> 3"]
    assert differences(json.loads(json.dumps(now)), now) == []
