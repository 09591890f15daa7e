"""Training state: what a run needs to go on as if it had never stopped.

    out/pretrain_512.resume/step_00000200/state.pt     weights (float32), optimizers, gradient scaler, counters
                                         /run.json     what the run was: configuration, data, seed, ...
                                         /COMPLETE     written last: a folder without it does not exist

A folder is written under another name, flushed to the disk and renamed: whenever the process dies, the states written
before are still there. (The weights for use, `out/pretrain_512.pth`, are another thing: see `model.weights`.)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from common.files import fsync_dir

MARKER = "COMPLETE"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass
class TrainingCheckpoint:
    """A state read back: `tensors` is what was given to `save_state`, `run` the description beside it."""

    path: Path
    step: int
    tensors: dict
    run: dict


def save_state(folder: Path, step: int, tensors: dict, run: dict, keep: int) -> Path:
    """Write the state after `step` optimizer steps to `folder`; then delete all but the newest `keep` states.

    A state of the same step is replaced. If writing fails (a full disk), nothing that was there is lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(folder)
    target = folder / f"step_{step:08d}"
    tmp = Path(tempfile.mkdtemp(prefix=".writing_", dir=folder))
    try:
        with open(tmp / "state.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        _write(tmp / "run.json", json.dumps(run | {"step": step}, indent=2, ensure_ascii=False))
        _write(tmp / MARKER, "")
        fsync_dir(tmp)
        if target.exists():  # cannot be renamed over: give the old one a name that does not count
            os.replace(target, folder / f".replaced_{step:08d}")
        os.replace(tmp, target)
    except BaseException as error:
        shutil.rmtree(tmp, ignore_errors=True)
        # torch.save reports a disk that ran full as a RuntimeError of its zip writer.
        if isinstance(error, (OSError, RuntimeError)) and _disk_is_full(folder, error):
            raise UserError(
                f"no space left on the disk for {target}: free some space and run again"
                f"{' with --resume' if complete_states(folder) else ''}; {_newest_words(folder)}"
            ) from error
        raise
    fsync_dir(folder)
    for old in complete_states(folder)[:-keep]:
        delete_state(old)
    _delete_leftovers(folder)
    return target


def delete_state(path: Path) -> None:
    """Delete one state, its marker first: half-deleted it must not count."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def load_state(path: Path) -> TrainingCheckpoint:
    """Read a state: `path` is a step folder, or a .resume folder, whose newest complete state is taken.

    Raises UserError when there is none, or it cannot be read.
    """
    if not path.exists():
        raise UserError(f"--resume: there is no {path}; start without --resume, or with --resume auto")
    if not _STEP.fullmatch(path.name):
        states = complete_states(path)
        if not states:
            raise UserError(f"--resume: no complete state in {path}; start without --resume, or with --resume auto")
        path = states[-1]
    elif not (path / MARKER).exists():
        raise UserError(f"--resume: {path} is not complete ({MARKER} is missing); {_newest_words(path.parent)}")
    try:
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        step = int(run["step"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--resume: {path} cannot be read ({reason}); delete it to continue from the state before"
        ) from error
    return TrainingCheckpoint(path, step, tensors, run)


def complete_states(folder: Path) -> list[Path]:
    """The complete states in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path / MARKER).exists()]
    return sorted(found, key=lambda path: int(_STEP.fullmatch(path.name)[1]))


def differences(now: dict, then: dict) -> list[str]:
    """Lines `name: then -> now` for everything in which two (nested) run descriptions differ."""
    lines = []
    for name in now | then:
        a, b = then.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{name}.{line}" for line in differences(b, a)]
        elif a != b:
            lines.append(f"{name}: {a} -> {b}")
    return lines


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _delete_leftovers(folder: Path) -> None:
    """Remove what a killed process left: one run owns the folder, so whatever is half-written is nobody's."""
    for path in folder.iterdir():
        unfinished = _STEP.fullmatch(path.name) and not (path / MARKER).exists()
        if unfinished or path.name.startswith((".writing_", ".replaced_")):
            shutil.rmtree(path, ignore_errors=True)


def _disk_is_full(folder: Path, error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < 64 << 20 or "enforce fail" in str(error) or "write" in str(error)
    return False


def _newest_words(folder: Path) -> str:
    states = complete_states(folder)
    return f"the newest complete state is {states[-1]}" if states else "there is no complete state yet"
