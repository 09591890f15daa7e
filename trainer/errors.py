"""Errors a user can act on: one clear line and a non-zero exit, no traceback."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable


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
        raise
    sys.exit(code or 0)


def fail(message: str, code: int = 1) -> None:
    """Print `error: message` on stderr and exit with `code`."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
