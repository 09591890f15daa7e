"""Training state: what a run needs to continue as if it had never stopped, and which state a new run may continue.

    out/pretrain_512.resume/step_00000200/state.pt     weights (float32), optimizer, gradient scaler, counters
                                         /run.json     what the run was: configuration, data, seed, ...
                                         /COMPLETE     a folder without it does not exist

A state is written into a temporary folder, flushed to the disk and renamed: whenever the process dies, the states written
before are still there. (The weights for use, `out/pretrain_512.pth`, are something else: see `model.weights`.)
"""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from common.files import atomic_folder, exclusive, recover_folder
from trainer.distributed import DistEnv
from trainer.optim import load_parameters
from trainer.options import TrainOptions

MARKER = "COMPLETE"
CONTENT = ("model", "optimizer", "scaler", "tokens", "metrics")  # of state.pt
_STEP = re.compile(r"step_(\d{8,})")


@dataclass
class TrainingCheckpoint:
    """A state read back: `tensors` is what was given to `save_state`, `run` the description beside it."""

    path: Path
    step: int
    tensors: dict
    run: dict


@contextlib.contextmanager
def hold_run(out_dir: Path, name: str) -> Iterator[None]:
    """Be the only run called `name` in `out_dir` for the block; see `common.files.exclusive`."""
    busy = (
        f"another run is training {name} in {out_dir} right now (its process is named in "
        f"{out_dir / 'logs' / name}.rank0.log): stop it, wait for it, or choose another --out_dir"
    )
    with exclusive(out_dir, name, busy):
        yield


# ---- states on the disk


def save_state(folder: Path, step: int, tensors: dict, run: dict, keep: int) -> Path:
    """Write the state after `step` optimizer steps to `folder`; then delete all but the newest `keep` states.

    A state of the same step is replaced. If writing fails (a full disk), nothing that was there is lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(folder)
    target = folder / f"step_{step:08d}"
    try:
        with atomic_folder(target) as tmp:
            torch.save(tensors, tmp / "state.pt")
            description = json.dumps(run | {"step": step}, indent=2, ensure_ascii=False)
            (tmp / "run.json").write_text(description, encoding="utf-8", newline="")
            (tmp / MARKER).touch()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError of its zip writer
        if not _disk_is_full(folder, error):
            raise
        raise UserError(
            f"no space left on the disk for {target}: free some space and run again"
            f"{' with --resume' if complete_states(folder) else ''}; {_newest_state(folder)}"
        ) from error
    for old in complete_states(folder)[:-keep]:
        delete_state(old)
    return target


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
        raise UserError(f"--resume: {path} is not complete ({MARKER} is missing); {_newest_state(path.parent)}")
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
    """Return the complete states in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    for old in folder.glob(".step_*.old"):  # killed while it was replaced
        recover_folder(folder / old.name[1:].removesuffix(".old"))
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path / MARKER).exists()]
    return sorted(found, key=step_of)


def step_of(state: Path) -> int:
    return int(state.name.removeprefix("step_"))


def delete_state(path: Path) -> None:
    """Delete one state, its marker first: half-deleted it must not count as complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _delete_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written: only one run writes into the folder."""
    complete_states(folder)  # recovers what a killed replacement left under another name
    for path in folder.iterdir():
        incomplete = _STEP.fullmatch(path.name) and not (path / MARKER).exists()
        if incomplete or path.name.startswith((".step_", ".writing_", ".replaced_")):  # the latter: older versions
            shutil.rmtree(path, ignore_errors=True)


def _disk_is_full(folder: Path, error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < 64 << 20 or "enforce fail" in str(error) or "write" in str(error)
    return False


def _newest_state(folder: Path) -> str:
    states = complete_states(folder)
    return f"the newest complete state is {states[-1]}" if states else "there is no complete state yet"


# ---- the state to resume


def find_state(
    folder: Path, options: TrainOptions, dist_env: DistEnv, model: nn.Module, identity: dict, settings: dict
) -> TrainingCheckpoint | None:
    """Return the state to resume, with its weights loaded into `model`; None at the start of a run.

    States in `folder` that the new run replaces are deleted.

    Args:
        identity: what has to be the same as in the state.
        settings: what may differ; the differences are printed.
    """
    found = complete_states(folder)
    ours = [path for path in found if dist_env.restart_count and _description(path).get("launch") == dist_env.run_id]
    if dist_env.restart_count:
        where = f"continuing from {ours[-1].name}" if ours else "nothing was saved yet, starting from the beginning"
        print(f"restarted by the launcher (restart {dist_env.restart_count}): {where}")
    if not ours and (options.resume is None or (options.resume == "auto" and not found)):
        # A damaged description does not say that the run is finished: its state is not replaced unless asked.
        if found and not options.overwrite and not _description(found[-1]).get("finished"):
            raise UserError(
                f"{folder} holds a run that was stopped at step {step_of(found[-1])}: continue it with --resume, "
                "discard it with --overwrite, or choose another --out_dir"
            )
        if options.resume == "auto":
            print(f"nothing to resume in {folder}: starting from the beginning")
        for old in found:
            delete_state(old)
        return None
    path = folder if options.resume in (None, "newest", "auto") else Path(options.resume)
    state = load_state(ours[-1] if ours else path)
    _check_same_run(state, model, identity, options)
    load_parameters(model, state.tensors["model"])
    print(f"resuming after step {state.step} from {state.path}")
    if state.path.parent.resolve() == folder.resolve():
        for later in [path for path in found if step_of(path) > state.step]:
            print(f"discarding {later.name}: this run continues from an earlier step")
            delete_state(later)
    if changed := differences(settings, state.run["settings"]):
        print(f"note: changed since then, so the result will differ from an uninterrupted run: {'; '.join(changed)}")
    if state.step >= settings["total_steps"]:
        print(f"the run is finished: {state.step} of {settings['total_steps']} steps are done")
    return state


def _check_same_run(state: TrainingCheckpoint, model: nn.Module, identity: dict, options: TrainOptions) -> None:
    changed = differences(identity, state.run["identity"])
    if any(line.startswith(("train_data", "val_data")) for line in changed):
        changed.append(_why_data_differs(options.describe(), state.run.get("options", {})))
    if changed:
        raise UserError(f"cannot resume {state.path}: this is a different run: {'; '.join(changed)}")
    if missing := [name for name in CONTENT if name not in state.tensors]:
        raise UserError(
            f'cannot resume {state.path}: an older version wrote it, and it lacks "{missing[0]}"; finish the run with '
            "that version, or start again with --overwrite"
        )
    parameters = {name for name, p in model.named_parameters() if p.requires_grad}
    if unknown := sorted(state.tensors["model"].keys() ^ parameters):
        raise UserError(f"cannot resume {state.path}: it has different parameters ({', '.join(unknown[:3])} ...)")


def differences(now: dict, then: dict) -> list[str]:
    """Return lines `name: then -> now` for everything in which two (nested) run descriptions differ."""
    lines = []
    for name in now | then:
        a, b = then.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{name}.{line}" for line in differences(b, a)]
        elif a != b:
            lines.append(f"{name}: {a} -> {b}")
    return lines


def _why_data_differs(now: dict, then: dict) -> str:
    names = ("data_path", "val_fraction", "val_tokens", "tokenizer", "text_field", "max_dropped", "seed", "model")
    flags = [f"--{name} {then[name]} -> {now[name]}" for name in names if name in then and then[name] != now.get(name)]
    if flags:
        return f"the data differs because of {', '.join(flags)}"
    return "no flag that selects data has changed: the files of --data_path have other content than before"


def _description(path: Path) -> dict:
    """Return the description of a state; {} if it is damaged."""
    try:
        content = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
