"""Training state: what a run needs to continue as if it had never stopped, and which state a new run may continue.

    out/pretrain_512.resume/step_00000200/*.distcp   weights (float32) and optimizer: what each process has of them
                                         /.metadata  which part of which tensor is in which file
                                         /run.json   what the run was: configuration, data, seed, counters, ...
                                         /COMPLETE   a checksum of every file; a folder without it does not exist

The first two are those of `torch.distributed.checkpoint` (DCP); any number of processes reads them back. (`--deepspeed`
writes DeepSpeed's own instead.) A state is written into a temporary folder, flushed to the disk and renamed: whenever a
process dies, the states written before are still there. (The weights for use, `out/pretrain_512.pth`, are something else:
see `model.weights_file`.)
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from common.errors import UserError
from common.files import (
    atomic_folder,
    checksum,
    exclusive,
    explain_write_errors,
    read_json_or_empty,
    recover_folder,
    write_json,
)
from trainer.distributed import DistEnv, all_gather_object, barrier, broadcast_object
from trainer.options import TrainOptions

MARKER = "COMPLETE"
_STEP = re.compile(r"step_(\d{8,})")
_METADATA = "torch.distributed.checkpoint.metadata"
_LAYOUT_CLASSES = {
    (_METADATA, "Metadata"), (_METADATA, "MetadataIndex"), (_METADATA, "StorageMeta"), (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"), (_METADATA, "ChunkStorageMetadata"), (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    ("torch", "Size"), ("torch", "float32"), ("torch", "float64"), ("torch", "bfloat16"), ("torch", "int64"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}  # fmt: skip


@dataclass
class TrainingCheckpoint:
    """A state on the disk; `run` is its description, run.json."""

    path: Path
    step: int
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


def save_state(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    run: dict,
    dist_env: DistEnv,
    keep: int,
    since: int,
) -> None:
    """Write the state after `step` optimizer steps to `folder`; then delete all but the newest `keep` states.

    Every process calls it, and each has to see the same `folder`. A state of the same step is replaced. If writing fails
    (a full disk), nothing that was there is lost.

    Args:
        write: writes this process's part into a folder.
        since: the step of this run's state before this one; later states are those of a run that it replaces, and go.
    """
    target = folder / f"step_{step:08d}"
    if dist_env.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(folder)
    again = f"; then run again{' with --resume' if complete_states(folder) else ''}: {_newest_state(folder)}"
    with (
        explain_write_errors(target, "another --out_dir", again),
        atomic_folder(target) if dist_env.is_main else contextlib.nullcontext(Path()) as mine,
    ):
        tmp = Path(broadcast_object(dist_env, lambda: str(mine)))
        torch.serialization.set_crc32_options(False)  # slower than ours, of the whole file
        try:
            write(tmp)
        finally:
            torch.serialization.set_crc32_options(True)
        barrier(dist_env)
        checksums = _checksums(tmp, dist_env)
        if dist_env.is_main:
            write_json(tmp / "run.json", run | {"step": step})
            write_json(tmp / MARKER, checksums | {"run.json": checksum(tmp / "run.json")})
    if dist_env.is_main:
        for old in complete_states(folder):
            if step_of(old) > since and old != target:
                delete_state(old)
        for old in complete_states(folder)[:-keep]:
            delete_state(old)


def _checksums(folder: Path, dist_env: DistEnv) -> dict[str, int]:
    """Return a checksum of every file; each process computes those of its share."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if any(found != files for found in all_gather_object(dist_env, files)):
        raise UserError(f"the processes do not see the same files in {folder}: all machines need the same --out_dir")
    mine = {name: checksum(folder / name) for name in files[dist_env.rank :: dist_env.size]}
    return {name: value for found in all_gather_object(dist_env, mine) for name, value in found.items()}


def find_damage(state: Path) -> str | None:
    """Return what is wrong with a state: a file that is missing or has another checksum than when it was written."""
    try:
        checksums = json.loads((state / MARKER).read_text(encoding="utf-8"))
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: checksum(state / name), checksums)
            wrong = [name for name, value in zip(checksums, found, strict=True) if value != checksums[name]]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return str(error) or type(error).__name__
    return f"{wrong[0]} has changed since it was written" if wrong else None


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
        if incomplete or path.name.startswith((".step_", ".universal_")):
            shutil.rmtree(path, ignore_errors=True)


def _newest_state(folder: Path) -> str:
    states = complete_states(folder)
    return f"the newest complete state is {states[-1]}" if states else "there is no complete state yet"


# ---- the tensors of a state


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` (whole, or DTensors) into `folder`. Every process has to call it.

    Raises the error of the process that failed, for example OSError, on every process.
    """
    with _plain_errors():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read from `folder` into `tensors`, in place. Every process has to call it, for the same names."""
    with _plain_errors():
        dcp.load(tensors, storage_reader=_Reader(folder))


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the error of the process that failed instead of DCP's summary; no warning that there is only one process."""
    with warnings.catch_warnings(action=None if dist.is_initialized() else "ignore", category=UserWarning):
        try:
            yield
        except CheckpointException as error:
            failure, _trace = next(iter(error.failures.values()))
            raise failure from error


def tensor_layout(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every tensor in `folder`, by name."""
    entries = _Reader(folder).read_metadata().state_dict_metadata
    return {name: (x.size, x.properties.dtype) for name, x in entries.items() if isinstance(x, TensorStorageMetadata)}


class _LayoutUnpickler(pickle.Unpickler):
    """DCP keeps the layout of its files as a pickle, which could run code: only the classes of a layout are loaded."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _LAYOUT_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _LayoutUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# ---- what a run may continue or replace


def check_run(output: Path, options: TrainOptions, dist_env: DistEnv, start: Path | None = None) -> None:
    """Raise UserError if the run that writes `output` cannot start: a cheap check, before data is read.

    Another process is training it, there is nothing to resume, or something would be replaced without --overwrite; the
    weights `start` that it starts from are never replaced.
    """
    if start is not None and start.resolve() == output.resolve():
        raise UserError(
            f"--init_from {start}: this run would replace the weights it starts from; choose another --out_dir"
        )

    def check() -> None:
        options.out_dir.mkdir(parents=True, exist_ok=True)
        with hold_run(options.out_dir, output.stem):
            folder = options.out_dir / f"{output.stem}.resume"
            _candidates(folder, options, dist_env)
            if output.exists() and not (complete_states(folder) or options.overwrite or dist_env.restart_count):
                raise UserError(f"{output} exists: replace it with --overwrite, or choose another --out_dir")

    broadcast_object(dist_env, check)


def _candidates(folder: Path, options: TrainOptions, dist_env: DistEnv) -> list[Path]:
    """Return the states from which the run may continue, the best first; [] if it starts from the beginning."""
    found = complete_states(folder)
    ours = [
        path
        for path in found
        if dist_env.restart_count and read_json_or_empty(path / "run.json").get("run_id") == dist_env.run_id
    ]
    if ours:  # the processes wrote them before the launcher restarted them
        return ours[::-1]
    if options.resume is None or (options.resume == "auto" and not found):
        if found and not options.overwrite:
            finished = read_json_or_empty(found[-1] / "run.json").get("finished")
            raise UserError(
                f"{folder} holds a finished run of {step_of(found[-1])} steps: replace it with --overwrite, continue it "
                "with --resume and more --max_steps or --epochs, or choose another --out_dir"
                if finished
                else f"{folder} holds a run that was stopped at step {step_of(found[-1])}: continue it with --resume, "
                "discard it with --overwrite, or choose another --out_dir"
            )
        return []
    path = folder if options.resume in ("newest", "auto") else Path(options.resume)
    if found and folder.resolve() not in (path.resolve(), path.resolve().parent):
        raise UserError(
            f"--resume: {folder} holds a run of its own, which {path} does not belong to: give the --out_dir that it is "
            "in, or another one"
        )
    if not _STEP.fullmatch(path.name):
        if not (states := complete_states(path)):
            raise UserError(
                f"--resume: there is no complete state in {path}; start without --resume, or with --resume auto"
            )
        return states[::-1]
    if not (path / MARKER).exists():
        raise UserError(f"--resume: {path} is not complete (no {MARKER} in it); {_newest_state(path.parent)}")
    return [path]


def find_state(
    folder: Path, options: TrainOptions, dist_env: DistEnv, identity: dict, settings: dict
) -> TrainingCheckpoint | None:
    """Return the state to resume; None: start from the beginning.

    Args:
        identity: what has to be the same as in the state.
        settings: what may differ; the differences are printed.

    Raises UserError if there is nothing to resume, it is damaged, or belongs to a different run.
    """
    candidates = _candidates(folder, options, dist_env)
    if dist_env.restart_count:
        print(f"restarted by the launcher (restart {dist_env.restart_count})")
    if not candidates:
        if options.resume == "auto" or dist_env.restart_count:
            print(f"nothing to resume in {folder}: starting from the beginning")
        return None
    for path in candidates:
        if (path / "state.pt").exists():
            raise UserError(
                f"cannot resume {path}: an older version wrote it; finish the run with that version, or start again with "
                "--overwrite"
            )
        if (reason := find_damage(path)) is None:
            break
        if path != candidates[-1]:
            print(f"WARNING: {path} is damaged ({reason}): falling back to the state before it")
    else:
        raise UserError(
            f"--resume: {path} is damaged ({reason}): resume from another state with --resume PATH, or start again with "
            "--overwrite"
        )
    state = TrainingCheckpoint(path, step_of(path), read_json_or_empty(path / "run.json"))
    changed = differences(identity, state.run["identity"])
    if any(line.startswith(("train_data", "val_data")) for line in changed):
        changed.append(_why_data_differs(options.describe(), state.run.get("options", {})))
    if any(line.startswith("origin") for line in changed):
        changed.append(
            "it started from random weights: leave --init_from out"
            if state.run["identity"].get("origin") is None
            else f"--init_from {getattr(options, 'init_from', None)} has other weights than those it started from: name a "
            "file with those"
        )
    if any(line.startswith("samples_per_step") for line in changed):
        changed.append(
            f"choose --batch_size and --accumulation_steps so that their product, times {dist_env.size} (processes), is "
            f"{state.run['identity']['samples_per_step']}"
        )
    if changed:
        raise UserError(f"cannot resume {path}: this is a different run: {'; '.join(changed)}")
    if (state.run["format"] == "deepspeed") != (options.deepspeed is not None):
        saved = "with" if state.run["format"] == "deepspeed" else "without"
        raise UserError(f"cannot resume {path}: it was saved {saved} --deepspeed, and can only be continued so")
    print(f"resuming after step {state.step} from {path}")
    for later in complete_states(folder):
        if step_of(later) > state.step:
            print(f"{later.name} will be deleted at the next save: this run continues from an earlier step")
    if changed := differences(settings, state.run["settings"]):
        print(f"note: changed since then, so the result will differ from an uninterrupted run: {'; '.join(changed)}")
    if state.step >= settings["total_steps"]:
        print(f"the run is finished: it has done {state.step} steps, and {settings['total_steps']} were asked for")
    return state


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
    names = ("data_path", "mix", "val_fraction", "val_tokens", "tokenizer", "text_field", "seed", "model")
    flags = [f"--{name} {then[name]} -> {now[name]}" for name in names if name in then and then[name] != now.get(name)]
    if flags:
        return f"the data differs because of {', '.join(flags)}"
    return "no flag that selects data has changed: the files of --data_path have other content than before"
