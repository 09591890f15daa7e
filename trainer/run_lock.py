"""One writer of a name in a folder at a time, and no rubbish of writers that were killed."""

from __future__ import annotations

import contextlib
import glob
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import UserError

WAIT_SECONDS = 5.0  # a process that was just killed may still be dying


@contextlib.contextmanager
def hold_run(out_dir: Path, name: str) -> Iterator[None]:
    """Be the only run called `name` in `out_dir` while in here; see `hold_name`."""
    busy = (
        f"another run is training {name} in {out_dir} right now (its process is named in "
        f"{out_dir / 'logs' / name}.rank0.log): stop it, wait for it, or choose another --out_dir"
    )
    with hold_name(out_dir, name, busy):
        yield


@contextlib.contextmanager
def hold_name(folder: Path, name: str, busy: str) -> Iterator[None]:
    """Be the only one who writes `name` into `folder` while in here; remove what a killed one left half-written.

    The system's own lock on a file: it ends with the process, however that ends, so there is no stale one to delete by
    hand. Raises UserError with the message `busy` if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    lock = FileLock(path, timeout=WAIT_SECONDS)
    try:
        lock.acquire(poll_interval=0.1)
    except Timeout:
        if not path.exists():  # no such file can be made there
            busy = f"nothing can be written into {folder}: choose another folder"
        raise UserError(busy) from None
    except (NotImplementedError, OSError) as error:
        # A file system without locks, as some network ones are. A folder that cannot be written is found out elsewhere.
        print(f"WARNING: {folder} cannot be locked ({error}): do not start {name} there twice", file=sys.stderr)
    try:
        if lock.is_locked:
            _delete_leftovers(folder, name)
        yield
    finally:
        lock.release()


def _delete_leftovers(folder: Path, name: str) -> None:
    """Temporary files and folders of `model.files.atomic_write`, `model.lora.save_adapter` and, without a dot in front,
    `model.export.new_folder`: the lock makes them ours."""
    hidden = folder.glob(f".{glob.escape(name)}.*.tmp")
    exports = (path for path in folder.glob(f"{glob.escape(name)}.{'?' * 8}.tmp") if path.is_dir())
    for path in [*hidden, *exports]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
