"""Run scripts of the toolkit as a user does: what benchmarks that train share."""

from __future__ import annotations

import subprocess
import sys

from common.errors import UserError
from common.files import ROOT


def run_stage(script: str, *flags: object) -> None:
    """Run a script of the root folder to its end. Raises UserError with the end of what it wrote if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(f"{script} failed: {result.stderr[-1000:].strip()}")
