"""Files and folders that are either the old one or the new one, never half of one; and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the project's folder
Cached = TypeVar("Cached")
WAIT_SECONDS = 5.0  # a process that was just killed may still be exiting


def fsync_dir(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut. Windows cannot open folders and needs no such call."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "w", encoding: str = "utf-8") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it over `path`.

    If the block raises (a full disk, Ctrl-C) or the process is killed, `path` keeps its old content.
    Text is written with "\\n" line ends on every system; a file name in it that is not Unicode becomes escapes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": encoding, "errors": "backslashreplace", "newline": ""}
    try:
        with os.fdopen(fd, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(tmp, 0o666 & ~_umask())  # mkstemp makes files private
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        raise
    fsync_dir(path.parent)


def read_lines(flag: str, path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank. Raises UserError, naming the flag, if there are none."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    if not lines:
        raise UserError(f"{flag} {path} is empty")
    return lines


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Return (time of writing in ns, bytes), which changes with a file; None if it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def short_hash(value: Any) -> str:
    """Return 16 hex digits that change with a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented JSON, atomically. Raises ValueError for NaN, which JSON does not have."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is none, or it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def atomic_folder(target: Path | str, *, hidden: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success flush it to disk and rename it to `target`.

    If the block raises, `target` stays as it was. Two folders cannot be exchanged in one step: an old `target` has the
    name `.<name>.old` for a moment, and `recover_folder` gives it its name back if the process was killed just then.

    hidden: start the temporary name with a dot. (transformers makes a module name of a folder that holds code, which
        must not start with one.)
    """
    target = Path(os.path.realpath(target))  # a link stays a link, and what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f"{'.' * hidden}{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield tmp
        for path in tmp.rglob("*"):
            if path.is_dir():
                fsync_dir(path)
                continue
            with path.open("rb+" if os.name == "nt" else "rb") as file:  # only Windows needs to write for it
                os.fsync(file.fileno())
        fsync_dir(tmp)
        tmp.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
        recover_folder(target)
        old = _old_name(target)
        if target.exists():
            os.replace(target, old)
        os.replace(tmp, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    fsync_dir(target.parent)


def recover_folder(target: Path) -> None:
    """Finish or undo a replacement of `target` by `atomic_folder` that was killed half-way."""
    target = Path(os.path.realpath(target))
    old = _old_name(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, target)


def _old_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


@contextlib.contextmanager
def explain_write_errors(folder: Path, choose: str = "another folder", note: str = "") -> Iterator[None]:
    """Turn errors of writing into `folder` that the user can fix into a UserError.

    Args:
        choose: what to choose instead, for example "another --out_dir".
        note: added to the message of a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Errors without a number: numpy's tofile ("819200 requested and 14936 written"), torch's writer of zip files.
        number = getattr(error, "errno", None)
        unnumbered = any(words in str(error) for words in ("requested and", "inline_container", "PytorchStreamWriter"))
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or (number is None and unnumbered):
            raise UserError(f"no space left in {folder}: free some space or choose {choose}{note}") from None
        no_access = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)
        if isinstance(error, OSError) and error.errno in no_access:
            place = error.filename or folder
            raise UserError(f"cannot write to {place} ({error.strerror}): choose {choose}") from None
        raise


def _umask() -> int:
    umask = os.umask(0)  # it cannot be read without being set
    os.umask(umask)
    return umask


@contextlib.contextmanager
def exclusive(folder: Path, name: str, busy: str, wait: float = WAIT_SECONDS) -> Iterator[bool]:
    """Be the only process that writes `name` into `folder`; remove what a killed one left half-written.

    Yields True; False where the file system has no locks, so that another process may be writing after all.

    The lock is the operating system's: it ends with the process, however that ends, so no stale one has to be deleted by
    hand.

    Args:
        busy: the message of the UserError if another process holds the lock; with wait=-1 it is printed instead.
        wait: seconds to wait for that process; -1: as long as it takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    lock = FileLock(path, timeout=wait)
    try:
        try:
            lock.acquire(poll_interval=0.1, timeout=1 if wait < 0 else wait)
        except Timeout:
            if wait >= 0 or not path.exists():
                raise
            print(busy, file=sys.stderr, flush=True)
            lock.acquire(poll_interval=0.1)
    except Timeout:
        if not path.exists():  # no such file can be created there
            busy = f"nothing can be written into {folder}: choose another folder"
        raise UserError(busy) from None
    except (NotImplementedError, OSError) as error:
        # A file system without locks, as some network ones are. A folder that cannot be written is reported elsewhere.
        print(f"WARNING: {folder} cannot be locked ({error}): do not start {name} there twice", file=sys.stderr)
    try:
        if lock.is_locked:
            delete_leftovers(folder, name)
        yield lock.is_locked
    finally:
        lock.release()


def cached_folder(
    folder: Path, read: Callable[[Path], Cached | None], build: Callable[[Path], object], doing: str
) -> tuple[Cached, bool]:
    """Return what `read` finds in a folder of a cache, and whether it had to be built. One process builds, others wait.

    Args:
        read: returns None if there is nothing, or if it is damaged.
        build: writes the content into a temporary folder.
        doing: what building is, for messages: "tokenizing".
    """
    if (found := read(folder)) is not None:
        return found, False
    busy = f"waiting for another process that is {doing} into {folder}"
    with exclusive(folder.parent, folder.name, busy, wait=-1):
        if (found := read(folder)) is not None:  # the other process has built it
            return found, False
        if folder.exists():
            print(f"{folder} is damaged, or of an earlier version: {doing} again")
        _delete_stale_builds(folder.parent)
        with atomic_folder(folder) as tmp:
            build(tmp)
        if (found := read(folder)) is None:
            raise UserError(f"{folder}: another program changed it just after it was written; run again")
    return found, True


def _delete_stale_builds(cache_dir: Path) -> None:
    """Delete what killed builds of other folders left behind. A running build holds its lock and is left alone."""
    for folder in cache_dir.glob(".*.tmp"):
        if folder.is_dir():
            name = folder.name[1:].rsplit(".", 2)[0]
            with contextlib.suppress(UserError), exclusive(cache_dir, name, "", wait=0):
                pass  # the holder of the lock has deleted them


def delete_leftovers(folder: Path, name: str) -> None:
    """Delete the temporary files and folders of killed writers of `name`. Only the holder of the lock may call this."""
    hidden = folder.glob(f".{glob.escape(name)}.*.tmp")
    visible = (path for path in folder.glob(f"{glob.escape(name)}.{'?' * 8}.tmp") if path.is_dir())
    for path in [*hidden, *visible]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
