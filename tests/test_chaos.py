"""A short bench/chaos.py: a few faults against one run of two processes, which ends as if there had been none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_survives_faults(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "chaos.py"), "--faults", "3", "--seed", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=550)
    finally:
        process.terminate()  # it ends its processes itself
    assert process.returncode == 0, printed
    assert "are those of the undisturbed run, to the bit" in printed
    for kind in ("SIGKILL of all while saving", "bit flipped in the newest state", "power cut between two renames"):
        assert f"| {kind} | 1 |" in printed
