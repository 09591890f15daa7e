"""Errors that a user can fix: one clear line and a non-zero exit code, no traceback."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

_LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "recvBytes",
    "failed to recv",
    "remote process exited",
)


class UserError(ValueError):
    """Something that the user can fix. The message says what was wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the name of its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


known_flags: set[str] = set()  # of this process's command line; common.cli fills it
failure_key = "failed"  # in the process group's store: the first process to fail puts it there


def name_flags(message: str) -> str:
    """Return `message` with `field=value` written as `--field value` (`--field` for True) where the script has that flag.

    Code below the command line names the fields it was given; a user who typed a flag should read that flag.
    """

    def as_flag(found: re.Match) -> str:
        name, value = found.groups()
        if name not in known_flags:
            return found[0]
        return f"--{name}" if value == "True" else f"--{name} {value}"

    return re.sub(r"(?<![-\w/\\.])(\w+)=(True\b|(?=\S))", as_flag, message)


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main()`; turn an error that a user can fix into one line on stderr and exit code 1.

    A bug still ends in its traceback: hiding it would help nobody.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot print Chinese must not end a run
    code: Any = 0
    try:
        code = main()
    except SystemExit as ended:  # a run that was stopped by a signal has said and saved everything: it ends as below
        if isinstance(ended.code, str):
            raise
        code = ended.code
    except UserError as error:
        fail(name_flags(str(error)))
    except KeyboardInterrupt as stop:
        number = (stop.args or (signal.SIGINT,))[0]
        what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        fail(": ".join([what, *getattr(stop, "__notes__", [])]), code=128 + number)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f" while writing {error.filename}" if error.filename else ""
            again = " with --resume auto" if "resume" in known_flags else ""  # a training: it may have saved a state
            fail(f"no space left on the disk{where}: free some space and run the same command again{again}")
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            fail(f"no permission for {error.filename}: choose another folder or change its permissions")
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            fail(f"{error.filename} cannot be used ({os.strerror(error.errno)}): choose another path")
        raise
    except RuntimeError as error:
        dist = _distributed()
        if dist is not None and any(words in str(error) for words in _LOST_CONNECTION):
            fail(
                f"rank {dist.get_rank()} lost the connection to another process, which exited without an error message "
                "(killed, or out of memory?): continue with --resume"
            )
        raise
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _exit_without_teardown(code or 0)
    sys.exit(code or 0)


def _distributed() -> ModuleType | None:
    """Return torch.distributed if this process has joined a process group. Scripts without torch do not import it."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _exit_without_teardown(code: int) -> NoReturn:
    """Exit as Python would, but before it takes the interpreter apart.

    PyTorch's communication threads may still hold a tensor then, find no interpreter, and abort the process ("terminate
    called without an active exception"): a training that was finished and saved would count as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader of a pipe may be gone
            stream.flush()
    os._exit(code)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print `error: message` on stderr and exit with `code`. Of several processes only the first to fail prints it."""
    dist = _distributed()
    if dist is None or _is_first_to_fail(dist):
        print(f"error: {message}", file=sys.stderr, flush=True)
    if dist is not None:  # at once: no process may be kept waiting by a connection to one that is gone
        sys.stdout.flush()
        os._exit(code)
    if code > 128:  # a signal: a thread may be computing outside of Python, and for long
        _exit_without_teardown(code)
    sys.exit(code)


def _is_first_to_fail(dist: ModuleType) -> bool:
    try:
        # A connection of its own: the main thread may be waiting on the other one.
        return dist.distributed_c10d._get_default_store().clone().add(failure_key, 1) == 1
    except RuntimeError:  # the store is gone, and with it rank 0, which has printed its own message
        return dist.get_rank() == 0


def exit_on_sigterm() -> None:
    """Let SIGTERM end the process as Ctrl-C does, so that temporary files are removed; `run_script` exits with 143."""

    def interrupt(number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)


@contextlib.contextmanager
def stoppable(note: str) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the block alike; `note` says what was kept, and `run_script` prints it."""
    main_thread = threading.current_thread() is threading.main_thread()  # only there a handler can be set
    before = signal.getsignal(signal.SIGTERM)
    if main_thread:
        exit_on_sigterm()
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(note)
        raise
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stop_signals(note: str = "") -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C, so that the block can stop when it is ready; a second Ctrl-C stops at once.

    note: printed when a signal arrives.
    """
    received: list[int] = []

    def collect(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if note:  # os.write: print may be in the middle of a line
            os.write(2, f"\n{note}\n".encode())

    previous = {number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
