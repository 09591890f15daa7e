"""Train tiny models in one of several processes, for test_distributed.py: torchrun ... distributed_worker.py CASES.

PYTHONPATH has to hold the project and tests/.

CASES is a JSON file: a list of what `train` takes, done one after the other. A case may also have "fails": then the error
that ends it goes into error.rank{N}.txt in its folder, and the next case follows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_trainer import config, options, rows, run_for

from common.errors import UserError, run_script
from model.model import Transformer
from trainer.distributed import DistEnv, cleanup_distributed, init_distributed
from trainer.losses import next_token_loss
from trainer.trainer import fit


def spoiled(dist_env: DistEnv, how: str, at: int):
    """The loss, which on the last rank at the so-and-so-many-th training batch is spoiled."""
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        loss, n, extras = next_token_loss(model, batch)
        calls += model.training
        if model.training and calls == at and dist_env.rank == dist_env.size - 1:
            if how == "error":
                raise UserError("this process has a reason to stop")
            loss = loss * float(how)
        return loss, n, extras

    return loss_fn


def train(case: dict, dist_env: DistEnv) -> Transformer:
    """Train as `case` says; the same model and data everywhere.

    out_dir, options, model: where, TrainOptions, and fields of the model.
    spoil: [how, at], see `spoiled`.
    odd: TrainOptions of the last rank only.
    """
    given = case.get("options", {}) | (case.get("odd", {}) if dist_env.rank == dist_env.size - 1 else {})
    fields = {name: Path(value) if name == "deepspeed" else value for name, value in given.items()}
    opts = options(Path(case["out_dir"]), **fields)
    torch.manual_seed(0)
    model = Transformer(config(**case.get("model", {})))
    loss_fn = spoiled(dist_env, *case["spoil"]) if "spoil" in case else next_token_loss
    fit(model, loss_fn, rows(range(50)), rows(range(50, 60)), opts, run_for(model, opts), dist_env)
    return model


def main() -> None:
    dist_env = init_distributed("cpu", timeout=200)
    for case in json.loads(Path(sys.argv[-1]).read_text()):
        print(f"case {case['out_dir']}", flush=True)
        try:
            train(case, dist_env)
        except UserError as error:
            if "fails" not in case:
                raise
            (Path(case["out_dir"]) / f"error.rank{dist_env.rank}.txt").write_text(str(error))
    cleanup_distributed(dist_env)


if __name__ == "__main__":
    run_script(main)
