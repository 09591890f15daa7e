"""Errors a user can act on: one clear line and a non-zero exit, no traceback."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "recvBytes",
    "failed to recv",
    "remote process exited",
)


class UserError(Exception):
    """Something the user can fix. The message says what was wrong, where, and what to do."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main()`; turn what a user can fix into one line on stderr and exit code 1.

    A bug still ends in its traceback: hiding it would help nobody.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # the script's head set it, for as long as libraries load
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot print Chinese must not end a run
    try:
        code = main()
    except SystemExit as ended:  # a run that a signal ended has said and saved all it should: it ends as below
        if isinstance(ended.code, str):
            raise
        code = ended.code
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f" while writing {error.filename}" if error.filename else ""
            fail(f"no space left on the disk{where}: free some space and run the same command again")
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            fail(f"no permission for {error.filename}: choose another folder or change its permissions")
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            fail(f"{error.filename} cannot be used ({os.strerror(error.errno)}): choose another path")
        raise
    except RuntimeError as error:
        if dist.is_initialized() and any(words in str(error) for words in _LOST):
            fail(
                f"rank {dist.get_rank()} lost the connection to another process, which ended without a word (killed, or "
                "out of memory?): continue with --resume"
            )
        raise
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _end_one_of_several(code or 0)
    sys.exit(code or 0)


def _end_one_of_several(code: int) -> NoReturn:
    """End as Python would, but before it takes itself apart.

    PyTorch's communication threads may still have a tensor to give back then, find no interpreter, and abort the process
    ("terminate called without an active exception"): a training that was done and saved would count as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it is gone
            stream.flush()
    os._exit(code)


def fail(message: str, code: int = 1, line: dist.Store | None = None) -> None:
    """Print `error: message` on stderr and exit with `code`. Of several processes only the first to fail speaks.

    line: a connection to the store of the processes, for a thread that has one of its own.
    """
    together = dist.is_initialized()
    if not together or _first_to_fail(line):
        print(f"error: {message}", file=sys.stderr, flush=True)
    if together:  # at once: no process may be kept by a connection to one that is gone
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def has_failed(line: dist.Store) -> bool:
    """Whether some process has told why it ends."""
    return line.check(["failed"])


def _first_to_fail(line: dist.Store | None) -> bool:
    try:
        return (line or dist.distributed_c10d._get_default_store()).add("failed", 1) == 1
    except RuntimeError:  # the store is gone, and with it rank 0, which has spoken
        return dist.get_rank() == 0
