"""common/errors.py: how a script ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import atexit, os, signal, sys
from common.errors import UserError, exit_on_sigterm, known_flags, run_script

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
        ("exit_on_sigterm(); os.kill(os.getpid(), signal.SIGTERM)", 143, "error: interrupted\n"),
        ("raise OSError(28, '', 'x.pth')", 1, f"{FULL}\n"),
        ("known_flags.add('resume'); raise OSError(28, '', 'x.pth')", 1, f"{FULL} with --resume auto\n"),
    ],
)
def test_how_a_script_ends(processes, end, code, said):
    """One of several processes ends without taking the interpreter apart, under PyTorch's threads; all else is the same."""
    environment = os.environ | {"WORLD_SIZE": str(processes), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.replace("{end}", end)]
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (code, said)
    apart = "taken apart\n" if processes == 1 or said else ""
    assert found.stdout == f"done at exit\n{apart}"
