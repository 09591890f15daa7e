"""Training state on disk: whatever happens while writing, the states before are there."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
from launching import fork
from states import read_state

from common.errors import UserError
from trainer.checkpoint import (
    check_run,
    complete_states,
    differences,
    find_damage,
    load_tensors,
    save_state,
    save_tensors,
    tensor_layout,
)
from trainer.distributed import DistEnv
from trainer.options import TrainOptions


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_states(folder)]


def save(folder: Path, step: int, value: float = 0.0, keep: int = 2, since: int = 10**9) -> None:
    tensors = {"model/w": torch.full((200,), value), "optimizer/w/step": torch.tensor(float(step))}
    save_state(folder, step, lambda tmp: save_tensors(tmp, tensors), {"seed": 7}, DistEnv(), keep, since)


def value(folder: Path) -> float:
    return float(read_state(complete_states(folder)[-1])[0]["w"].mean())


def check(folder: Path, **fields) -> None:
    check_run(folder / "x.pth", TrainOptions(out_dir=folder, **fields), DistEnv())


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        save(tmp_path, step, float(step))
    assert steps(tmp_path) == [3, 100_000_000]
    weights, optimizer = read_state(tmp_path / "step_100000000")
    assert torch.equal(weights["w"], torch.full((200,), 1e8)) and optimizer["w/step"] == 1e8
    assert json.loads((tmp_path / "step_00000003" / "run.json").read_text()) == {"seed": 7, "step": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_100000000"]


def test_a_state_of_the_same_step_is_replaced(tmp_path):
    for number in (1.0, 2.0):
        save(tmp_path, 5, number, since=0)
    assert steps(tmp_path) == [5] and value(tmp_path) == 2


def test_without_its_marker_a_state_does_not_exist(tmp_path):
    folder = tmp_path / "x.resume"
    for step in (1, 2):
        save(folder, step)
    (folder / "step_00000002" / "COMPLETE").unlink()
    assert steps(folder) == [1]
    with pytest.raises(UserError, match="not complete.*newest complete state is .*step_00000001"):
        check(tmp_path, resume=str(folder / "step_00000002"))
    save(folder, 3)
    assert not (folder / "step_00000002").exists()  # nobody's leftovers are cleared away


def test_a_state_whose_replacement_was_killed_is_there(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.old")
    save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no .*none.resume.*--resume auto"):
        check(tmp_path, resume=str(tmp_path / "none.resume"))
    (tmp_path / "x.resume").mkdir()
    with pytest.raises(UserError, match="no complete state"):
        check(tmp_path, resume="newest")
    check(tmp_path, resume="auto")


def test_weights_without_a_state_are_not_replaced_either(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"weights")
    with pytest.raises(UserError, match="x.pth exists: replace it with --overwrite"):
        check(tmp_path)
    check(tmp_path, overwrite=True)
    save(tmp_path / "x.resume", 1)
    check(tmp_path, resume="newest")


def test_a_state_from_elsewhere_does_not_replace_the_run_that_is_here(tmp_path):
    save(tmp_path / "other" / "x.resume", 1)
    state = str(tmp_path / "other" / "x.resume" / "step_00000001")
    check(tmp_path, resume=state)
    (tmp_path / "x.pth").write_bytes(b"weights")
    with pytest.raises(UserError, match="x.pth exists"):
        check(tmp_path, resume=state)
    save(tmp_path / "x.resume", 2)
    for path in (state, str(tmp_path / "other" / "x.resume")):
        with pytest.raises(UserError, match="holds a run of its own, which .*other.* does not belong to"):
            check(tmp_path, resume=path)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json", "COMPLETE"])
def test_damage_is_found_in_every_file(tmp_path, name):
    save(tmp_path, 1)
    state = tmp_path / "step_00000001"
    assert find_damage(state) is None
    file = state / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert find_damage(state)
    file.unlink()
    assert find_damage(state)


def test_a_state_cannot_run_code(tmp_path):
    save(tmp_path, 1)
    state = tmp_path / "step_00000001"

    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (state / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError, match="exec does not belong there"):
        tensor_layout(state)
    with pytest.raises(
        AssertionError, match="exec does not belong there|metadata is None"
    ):  # torch 2.11 gives no reason
        load_tensors(state, {"model/w": torch.zeros(200)})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("enforce fail at inline_container.cc")]
)
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, error):
    save(tmp_path, 1)

    def full(*_, **__):
        raise error

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(UserError, match="no space left.*--resume.*step_00000001"):
        save(tmp_path, 2)
    assert steps(tmp_path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def save_for_ever(folder: Path, step: int) -> None:
    while True:
        step += 1
        tensors = {"model/w": torch.full((200_000,), float(step))}
        save_state(folder, step, lambda tmp: save_tensors(tmp, tensors), {}, DistEnv(), keep=2, since=step)  # noqa: B023
        print(step)


def test_killed_while_writing_leaves_a_loadable_state(tmp_path):
    """SIGKILL at a random moment of an endless series of saves: the newest complete state reads back whole."""
    folder, done = tmp_path / "states", 0
    for kill in range(6):
        output = tmp_path / f"output{kill}"
        process = fork(save_for_ever, folder, done, output=output)
        while not output.exists() or output.read_text().count("\n") < kill + 2:
            assert process.is_alive(), output.read_text()
        process.join(timeout=0.003 * kill)
        process.kill()
        process.join()
        done = int(output.read_text().split()[-1])
        found = steps(folder)[-1]
        assert found in (done, done + 1) and find_damage(complete_states(folder)[-1]) is None
        assert torch.equal(read_state(complete_states(folder)[-1])[0]["w"], torch.full((200_000,), float(found)))
        done = found


def test_differences_are_named_with_both_values():
    then = {"seed": 1, "config": {"dim": 512, "n_layers": 8}}
    now = {"seed": 1, "config": {"dim": 256, "n_layers": 8}, "new": 3}
    assert differences(now, then) == ["config.dim: 512 -> 256", "new: None -> 3"]
    assert differences(json.loads(json.dumps(now)), now) == []
