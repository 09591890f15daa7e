"""One of several processes that train tiny models together, for tests/test_world.py: torchrun ... world_worker.py CASES.

PYTHONPATH has to hold the project and tests/.

CASES is a JSON file: a list of {"out_dir": ..., "options": {...}, "model": {...}}, trained one after the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_loop import config, options, rows, run_for

from model.model import Transformer
from trainer.distributed import World, join_world, leave_world
from trainer.errors import run_script
from trainer.loop import fit
from trainer.losses import next_token_loss


def train(case: dict, world: World) -> Transformer:
    """Train as `case` says; the same model and data everywhere."""
    fields = {name: Path(value) if name == "deepspeed" else value for name, value in case.get("options", {}).items()}
    opts = options(Path(case["out_dir"]), **fields)
    torch.manual_seed(0)
    model = Transformer(config(**case.get("model", {})))
    fit(model, next_token_loss, rows(range(50)), rows(range(50, 60)), opts, run_for(model, opts), world)
    return model


def main() -> None:
    world = join_world("cpu", timeout=120)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        print(f"case {case['out_dir']}", flush=True)
        train(case, world)
    leave_world(world)


if __name__ == "__main__":
    run_script(main)
