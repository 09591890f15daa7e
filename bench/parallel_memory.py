"""Measure how much memory each process needs where weights, gradients and optimizer state are sharded.

    python bench/parallel_memory.py                                # --fsdp and ZeRO-3, 1, 2 and 4 processes, 440M parameters
    python bench/parallel_memory.py --processes 2 --engines fsdp

Real steps of the training loop on this machine's CPU, with a state saved and the weights written; then the run is resumed
in new processes. The table has the peak of the process that needs most, and the limit: with N processes 1/N of weights,
gradients and optimizer state (16 bytes per parameter; 20 with ZeRO-3, which keeps a second copy of the weights for the
optimizer, also where they are float32 already), two whole layers with their gradients, and what a process needs before it
has a model. Activations are not in it: rows are short, and --gradient_checkpointing keeps few. Memory of files that are
mapped (the starting weights) belongs to the system's cache; it is in the column "with files". MALLOC_MMAP_THRESHOLD_=65536
is set, because the C library would keep freed tensors for reuse, and they would count as used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import Parser  # noqa: E402

SHAPE = {"dim": 1280, "n_layers": 24, "max_seq_len": 64}
BYTES_PER_PARAMETER = {"fsdp": 16, "zero3": 20}
ENGINES = {"fsdp": {"fsdp": True}, "zero3": {"deepspeed": ROOT / "configs" / "zero3.json"}}


class PeakMemory(threading.Thread):
    """Watch the memory of this process; `peak` in bytes: its own, and with mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"own": 0, "with_files": 0}

    def run(self) -> None:
        while True:
            found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for name, field in (("own", "RssAnon"), ("with_files", "VmRSS")):
                self.peak[name] = max(self.peak[name], int(found[field].split()[0]) << 10)
            time.sleep(0.005)


def worker(folder: Path, engine: str, steps: int) -> None:
    """Train `steps` steps, or continue until there are as many; write what it took."""
    watch = PeakMemory()
    import numpy as np
    import torch

    from data_pipeline.datasets import PackedRows
    from data_pipeline.tokenize import TokenizedDataset
    from model.LMConfig import LMConfig
    from model.model import Transformer, parameter_counts
    from model.tokenizer import load_tokenizer
    from trainer.distributed import cleanup_distributed, init_distributed
    from trainer.losses import next_token_loss
    from trainer.options import TrainOptions
    from trainer.recipe import load_model, weights_run
    from trainer.trainer import fit

    class Options(TrainOptions):
        stage = "pretrain"

    dist_env = init_distributed("cpu")
    if engine == "zero3":
        from trainer.parallel.zero import import_deepspeed

        import_deepspeed(torch.device("cpu"))
    tokenizer = load_tokenizer()
    config = LMConfig(**SHAPE)
    with torch.device("meta"):
        empty = Transformer(config)
    layer = sum(p.numel() for p in empty.layers[0].parameters())
    options = Options(
        out_dir=folder, batch_size=1, max_steps=steps, device="cpu", dtype="float32", save_interval=1000, log_interval=1,
        resume="auto", gradient_checkpointing=True, model=dict(SHAPE), **ENGINES[engine],
    )  # fmt: skip
    n = 64
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, n * config.max_seq_len).astype(np.uint16)
    size = config.max_seq_len
    dataset = TokenizedDataset(
        tokens, None, np.arange(n + 1) * size, np.full(n, size), np.arange(n).astype(np.uint64), "random", {}
    )
    time.sleep(0.1)
    watch.start()
    time.sleep(0.1)
    base = dict(watch.peak)
    run = weights_run(options, config, tokenizer, dist_env)
    model, _ = load_model(options, None, tokenizer, dist_env)
    fit(model, next_token_loss, PackedRows(dataset, np.arange(n), size, 0), None, options, run, dist_env)
    facts = {"base": base, "peak": dict(watch.peak), "parameters": parameter_counts(empty)["total"], "layer": layer}
    (folder / f"memory.{dist_env.rank}.json").write_text(json.dumps(facts))
    cleanup_distributed(dist_env)


def measure(engine: str, n: int) -> list[str]:
    """Return the rows of the table for `n` processes: training and saving, and resuming."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for phase, steps in (("train, save", 2), ("resume, train, save", 3)):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(n),
                __file__,
            ]
            command += ["--worker", folder, "--engines", engine, "--steps", str(steps)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(result.stdout[-2000:] + result.stderr[-4000:])
            facts = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("memory.*.json"))]
            worst = max(facts, key=lambda x: x["peak"]["own"])
            limit = (
                worst["base"]["own"] + BYTES_PER_PARAMETER[engine] * worst["parameters"] / n + 2 * 8 * worst["layer"]
            )
            mb = [worst["base"]["own"], worst["peak"]["own"], limit, max(x["peak"]["with_files"] for x in facts)]
            kept = "yes" if worst["peak"]["own"] <= limit else "NO"
            cells = [engine, str(n), phase, *(f"{value / 1e6:,.0f}" for value in mb), kept]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", default=[*ENGINES], choices=[*ENGINES])
    parser.add_argument("--steps", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.engines[0], args.steps)
        return
    print("| engine | processes | phase | before the model, MB | peak, MB | limit, MB | with files, MB | within |")
    print("|---|---|---|---|---|---|---|---|")
    for engine in args.engines:
        for n in args.processes:
            measure(engine, n)


if __name__ == "__main__":
    main()
