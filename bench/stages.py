"""Run scripts of the toolkit as a user does."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.request import urlopen

from common.errors import UserError
from common.files import ROOT


def run_stage(script: str, *flags: object) -> None:
    """Run a script of the root folder to its end. Raises UserError with the end of what it wrote if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(f"{script} failed: {result.stderr[-1000:].strip()}")


@contextlib.contextmanager
def running_server(*flags: object) -> Iterator[tuple[str, str, subprocess.Popen]]:
    """Run my_openai_api.py at a free port; yield (address, name of the model, process) when it answers."""
    command = [sys.executable, str(ROOT / "my_openai_api.py"), "--port", "0", *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            assert process.stdout is not None
            found = next(
                (match for line in process.stdout if (match := re.match(r"serving (\S+) at (\S+)/v1", line))), None
            )
            if found is None:
                raise UserError("the server did not start: its messages are above")
            while process.poll() is None:
                with contextlib.suppress(OSError), urlopen(f"{found[2]}/health"):
                    break
                time.sleep(0.1)
            else:
                raise UserError("the server has ended: its messages are above")
            yield found[2], found[1], process
        finally:
            process.terminate()
