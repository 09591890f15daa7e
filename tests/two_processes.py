"""Run by test_survival.py under torchrun: what two processes do when one of them is in trouble. Writes what came of it.

torchrun --nproc_per_node 2 tests/two_processes.py FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tolerances import norm

from common.errors import UserError
from model.model import Transformer
from tests.test_trainer import config, options, rows, run_for, short_of_memory, weights
from trainer.distributed import DistEnv, cleanup_distributed, init_distributed
from trainer.losses import next_token_loss
from trainer.trainer import fit


def train(dist_env: DistEnv, folder: Path, loss_fn=next_token_loss, train_rows=None, **fields) -> dict:
    """What `fit` did: its metrics and weights, or its error."""
    torch.manual_seed(0)
    model = Transformer(config())
    opts = options(folder, **{"batch_size": 4, "log_interval": 1, "save_interval": 100} | fields)
    try:
        metrics = fit(model, loss_fn, train_rows or rows(), None, opts, run_for(model, opts), dist_env)
    except UserError as error:
        return {"error": str(error)}
    return {"metrics": metrics, "weights": weights(model)}


def poisoned(dist_env: DistEnv):
    """A loss that is nan in the sixth step, on rank 1 only."""
    steps = 0

    def loss_fn(model, batch):
        nonlocal steps
        steps += model.training
        loss, n, extras = next_token_loss(model, batch)
        if steps == 6 and dist_env.rank == 1:
            loss = loss * float("nan")
        return loss, n, extras

    return loss_fn


def broken_rows(dist_env: DistEnv):
    """Rows of which rank 1 cannot read some after a while."""
    data, n = rows(), 0

    class Rows:
        fingerprint, documents, __len__ = data.fingerprint, staticmethod(data.documents), lambda self: len(data)

        def batch(self, indices):
            nonlocal n
            n += 1
            if n >= 6 and dist_env.rank == 1:
                raise OSError(5, "Input/output error", "tokens.bin")
            return data.batch(indices)

    return Rows()


def main() -> None:
    folder = Path(sys.argv[1])
    dist_env = init_distributed("cpu")
    results = {
        "whole": train(dist_env, folder / "whole"),
        "memory": train(
            dist_env,
            folder / "memory",
            auto_batch=True,
            loss_fn=short_of_memory(2) if dist_env.rank == 1 else next_token_loss,
        ),
        "nan": train(dist_env, folder / "nan", poisoned(dist_env)),
        "nan_resumed": train(dist_env, folder / "nan", resume="newest"),
        "data": train(dist_env, folder / "data", train_rows=broken_rows(dist_env)),
        "data_resumed": train(dist_env, folder / "data", resume="newest"),
    }
    whole = results["whole"]["weights"]
    facts = {}
    for name, result in results.items():
        facts[name] = {key: value for key, value in result.items() if key != "weights"}
        if "weights" in result:
            difference = norm(value - whole[key] for key, value in result["weights"].items())
            facts[name]["apart"] = difference / math.sqrt(sum(value.numel() for value in whole.values()))
    (folder / f"rank{dist_env.rank}.json").write_text(json.dumps(facts))
    cleanup_distributed(dist_env)


if __name__ == "__main__":
    main()
