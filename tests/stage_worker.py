"""Run stages, one after the other, in one of the processes of a launcher, for test_launchers.py: stage_worker.py CASES

CASES is a JSON file: a list of command lines, each a script and its flags. Starting processes takes longer than training
these models.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda: None  # the next stage trains with the same group
    for script, *flags in json.loads(Path(sys.argv[-1]).read_text()):
        sys.argv = [script, *flags]
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
    destroy()


if __name__ == "__main__":
    main()
