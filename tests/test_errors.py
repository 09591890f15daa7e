"""common/errors.py: how a script ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import atexit, signal, sys
from common.errors import UserError, exit_on_sigterm, known_flags, run_script, stoppable

class Last:
    def __del__(self):
        print("taken apart")

last = Last()
atexit.register(print, "at exit")

def main():
    print("done", end=" ")
    {end}

run_script(main)
"""
FULL = "error: no space left on the disk while writing x.pth: free some space and run the same command again"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "end, code, said",
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("raise UserError('wrong')", 1, "error: wrong\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("exit_on_sigterm(); signal.raise_signal(signal.SIGTERM)", 143, "error: stopped by SIGTERM\n"),
        *(
            (
                f"with stoppable('nothing is lost'): signal.raise_signal(signal.{name})",
                code,
                f"error: {said}: nothing is lost\n",
            )
            for name, code, said in [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "stopped by SIGTERM")]
        ),
        ("raise OSError(28, '', 'x.pth')", 1, f"{FULL}\n"),
        ("known_flags.add('resume'); raise OSError(28, '', 'x.pth')", 1, f"{FULL} with --resume auto\n"),
    ],
)
def test_how_a_script_ends(processes, end, code, said):
    """The interpreter is not taken apart under the threads of PyTorch (one of several processes) or after a signal."""
    environment = os.environ | {"WORLD_SIZE": str(processes), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.replace("{end}", end)]
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (code, said)
    stopped = code > 128 and said
    apart = "taken apart\n" if (processes == 1 or said) and not stopped else ""
    assert found.stdout == f"done at exit\n{apart}"
