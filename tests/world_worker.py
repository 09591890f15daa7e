"""One of several processes that train tiny models together, for tests/test_world.py: torchrun ... world_worker.py CASES.

PYTHONPATH has to hold the project and tests/.

CASES is a JSON file: a list of what `train` takes, done one after the other. A case may also have "fails": then the error
that ends it goes into error.rank{N}.txt in its folder, and the next case follows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_loop import config, options, rows, run_for

from model.model import Transformer
from trainer.distributed import World, join_world, leave_world
from trainer.errors import UserError, run_script
from trainer.loop import fit
from trainer.losses import next_token_loss


def spoiled(world: World, how: str, at: int):
    """The loss, which on the last rank at the so-and-so-many-th training batch is spoiled."""
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        loss, n, extras = next_token_loss(model, batch)
        calls += model.training
        if model.training and calls == at and world.rank == world.size - 1:
            if how == "error":
                raise UserError("this process has a reason to stop")
            loss = loss * float(how)
        return loss, n, extras

    return loss_fn


def train(case: dict, world: World) -> Transformer:
    """Train as `case` says; the same model and data everywhere.

    out_dir, options, model: where, TrainOptions, and fields of the model.
    spoil: [how, at], see `spoiled`.
    odd: TrainOptions of the last rank only.
    """
    given = case.get("options", {}) | (case.get("odd", {}) if world.rank == world.size - 1 else {})
    fields = {name: Path(value) if name == "deepspeed" else value for name, value in given.items()}
    opts = options(Path(case["out_dir"]), **fields)
    torch.manual_seed(0)
    model = Transformer(config(**case.get("model", {})))
    loss_fn = spoiled(world, *case["spoil"]) if "spoil" in case else next_token_loss
    fit(model, loss_fn, rows(range(50)), rows(range(50, 60)), opts, run_for(model, opts), world)
    return model


def main() -> None:
    world = join_world("cpu", timeout=200)
    for case in json.loads(Path(sys.argv[-1]).read_text()):
        print(f"case {case['out_dir']}", flush=True)
        try:
            train(case, world)
        except UserError as error:
            if "fails" not in case:
                raise
            (Path(case["out_dir"]) / f"error.rank{world.rank}.txt").write_text(str(error))
    leave_world(world)


if __name__ == "__main__":
    run_script(main)
