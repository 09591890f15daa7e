"""Compute how the communication cost grows with the number of GPUs: the tables of docs/scaling.md.

    python bench/scaling.py                     # the simulated table
    python bench/scaling.py --measure           # also steps and saves of 1, 2 and 4 processes on this machine's CPU
    python bench/scaling.py --write docs/scaling.md

Simulated, not measured: the time for computing follows from the FLOPs of a step and an assumed share of a published peak
(--gpu, --mfu), the time for communication from the bytes of the real parameters and the published rates of the links
(--nvlink, --network, of which the share --efficiency is reached). The formula is in docs/scaling.md and in
`communication_time` below. --write replaces the tables between the markers of that page.

--measure runs steps and saves of the training loop. It reads the bytes sent from the counters of the network interfaces, so
nothing else should use them at that time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import Parser  # noqa: E402
from model.device import PEAK_FLOPS  # noqa: E402
from model.LMConfig import preset  # noqa: E402
from model.model import Transformer, parameter_counts, training_flops  # noqa: E402
from trainer.distributed import DistEnv, all_gather_object, barrier, cleanup_distributed, init_distributed  # noqa: E402
from trainer.parallel.ddp import ParallelStrategy  # noqa: E402

PRESETS = ("minimind-v1-small", "minimind-v1", "minimind-v1-moe")
WORLDS = (8, 64, 512)
ROWS, ROW_LENGTH = 32, 512  # of one micro-batch on one GPU: as in a long run of 1-pretrain.py
SAVES = 3  # number of saves to measure


@dataclass(frozen=True)
class Links:
    """The links between GPUs: bytes per second of one GPU in one direction, seconds for one message."""

    per_node: int
    nvlink: float
    network: float
    nvlink_latency: float
    network_latency: float
    bucket: float  # size in bytes of the pieces in which gradients are sent


@dataclass(frozen=True)
class Message:
    """A transfer of all processes once per step or once per micro-batch: `ways` is 2 for an all-reduce (all have the sum),
    1 for a reduce-scatter or an all-gather (half of that). `pieces`: number of messages; 0: one per bucket."""

    bytes: float
    ways: int
    per_micro_batch: bool = False
    pieces: int = 0


def messages(strategy: str, parameters: int, n_layers: int) -> list[Message]:
    """Return the messages of a strategy, with 4 bytes per number in float32 and 2 in bfloat16."""
    if strategy == "DDP":  # float32 gradients, summed once a step
        return [Message(4 * parameters, 2)]
    if strategy == "ZeRO-1/2":  # bfloat16 gradients to their owners, bfloat16 weights back
        return [Message(2 * parameters, 1), Message(2 * parameters, 1)]
    # ZeRO-3, FSDP: weights before the forward and again before the backward pass, gradients to their owners; by layer
    every = dict(ways=1, per_micro_batch=True, pieces=n_layers)
    return [Message(2 * parameters, **every), Message(2 * parameters, **every), Message(4 * parameters, **every)]


def communication_time(message: Message, n: int, links: Links) -> float:
    """Return the seconds for one message between n GPUs: a ring inside each machine, rings between machines, inside again.

    Inside, of g GPUs: (g - 1)/g * bytes / nvlink. Between m machines each GPU has its g-th part to send:
    (m - 1)/m * bytes/g / network. An all-reduce does both twice. Every piece pays a latency for every hop.
    """
    g = min(n, links.per_node)
    m = math.ceil(n / g)
    pieces = message.pieces or math.ceil(message.bytes / links.bucket)
    seconds = (g - 1) / g * message.bytes / links.nvlink + (m - 1) / m * message.bytes / g / links.network
    hops = (g - 1) * links.nvlink_latency + (m - 1) * links.network_latency
    return message.ways * (seconds + pieces * hops)


@dataclass(frozen=True)
class Work:
    """The work of a preset for one micro-batch on one GPU."""

    parameters: int
    n_layers: int
    flops: float


def work(name: str) -> Work:
    config = preset(name)
    with torch.device("meta"):
        counts = parameter_counts(Transformer(config))
    # Rows are packed full; the documents in them are taken to be half a row long.
    tokens, pairs = ROWS * ROW_LENGTH, ROWS * 2 * (ROW_LENGTH / 2) ** 2
    flops = training_flops(config, counts["active"], tokens, pairs)
    return Work(counts["total"], config.n_layers, flops)


def efficiency(
    job: Work, strategy: str, n: int, micro_batches: int, compute: float, links: Links, hidden: bool
) -> float:
    """Return the share of the time in which the GPUs compute. hidden: communication overlaps with two thirds of the
    computation (the backward passes) where it can."""
    computing = micro_batches * compute
    often = once = 0.0
    for message in messages(strategy, job.parameters, job.n_layers):
        seconds = communication_time(message, n, links)
        often, once = (often + seconds, once) if message.per_micro_batch else (often, once + seconds)
    if hidden:
        # Transfers of every micro-batch overlap with all of it; the sum of gradients overlaps with the last backward pass.
        often = max(0.0, often - compute)
        once = max(0.0, once - compute * 2 / 3)
    return computing / (computing + micro_batches * often + once)


def simulated(args: argparse.Namespace) -> str:
    links = Links(
        args.per_node, args.nvlink * 1e9 * args.efficiency, args.network * 1e9 / 8 * args.efficiency,
        args.nvlink_latency * 1e-6, args.network_latency * 1e-6, args.bucket_mb * 2**20,
    )  # fmt: skip
    peak = PEAK_FLOPS[args.gpu]
    lines = [
        f"Assumed: {args.gpu}, {peak / 1e12:g} TFLOP/s in bfloat16, of which {args.mfu:.0%} are reached; {args.per_node} "
        f"GPUs in a machine, connected by {args.nvlink:g} GB/s (NVLink, one GPU, one way, {args.nvlink_latency:g} µs); "
        f"one network port of {args.network:g} Gbit/s for each GPU ({args.network_latency:g} µs); {args.efficiency:.0%} of "
        f"these rates are reached. One micro-batch on one GPU is {ROWS} rows of {ROW_LENGTH} tokens.",
        "",
        "| preset | computing per micro-batch | strategy | micro-batches per step | sent per GPU, 512 GPUs | "
        + " | ".join(f"{n} GPUs" for n in WORLDS)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(WORLDS),
    ]
    for name in PRESETS:
        job = work(name)
        compute = job.flops / peak / args.mfu
        for strategy in ("DDP", "ZeRO-1/2", "ZeRO-3, FSDP"):
            for micro in (1, 8):
                sent = sum(
                    m.ways * (511 / 512) * m.bytes * (micro if m.per_micro_batch else 1)
                    for m in messages(strategy, job.parameters, job.n_layers)
                )
                rates = [
                    f"{efficiency(job, strategy, n, micro, compute, links, False):.0%} to "
                    f"{efficiency(job, strategy, n, micro, compute, links, True):.0%}"
                    for n in WORLDS
                ]
                cells = [f"`{name}`", f"{compute * 1e3:.1f} ms", strategy, str(micro), f"{sent / 1e6:,.0f} MB", *rates]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- measured on this machine


def measured(steps: int) -> str:
    """Measure steps and saves of minimind-v1-small on the CPU, by engine and number of processes."""
    lines = [
        f"Measured on a CPU with {os.cpu_count()} cores: `minimind-v1-small`, one row of 512 tokens per process, gloo on "
        f"the loopback. Medians of {steps} steps and {SAVES} saves, of the slowest process.",
        "",
        "| engine | processes | a step, s | sent per step and process, MB | by the formula, MB | state per process, MB | "
        "saving blocks training, s | `async_save` would block, s | and be done after, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    parameters = work("minimind-v1-small").parameters
    for engine, ways in (("DDP", 2), ("FSDP", 3)):  # FSDP: weights twice, gradients once
        for n in (1, 2, 4):
            found = _run(engine, n, steps)
            formula = ways * (n - 1) / n * 4 * parameters
            stalls = [f"{found[name]:.2f}" if name in found else "–" for name in ("save", "async", "async_done")]
            step = f"{found['step']:.2f}"
            sizes = [f"{size / 1e6:.0f}" for size in (found["sent"], formula, found["state"])]
            lines.append(f"| {' | '.join([engine, str(n), step, *sizes, *stalls])} |")
    return "\n".join(lines)


def _run(engine: str, n: int, steps: int) -> dict[str, float]:
    """Return what `worker` measures with n processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), __file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        flags = ["--worker", folder, "--engine", engine, "--steps", str(steps)]
        subprocess.run([*command, *flags], check=True, env=environment)
        return json.loads((Path(folder) / "measured.json").read_text())


def worker(folder: Path, engine: str, steps: int) -> None:
    """Do steps and saves of the training loop, and write what the slowest process took."""
    dist_env = init_distributed("cpu")
    everyone = all_gather_object(dist_env, _measure(folder, engine, steps, dist_env))
    if dist_env.is_main:
        worst = {name: max(found[name] for found in everyone) for name in everyone[0]}
        (folder / "measured.json").write_text(json.dumps(worst))
    cleanup_distributed(dist_env)


def _measure(folder: Path, engine: str, steps: int, dist_env: DistEnv) -> dict[str, float]:
    """Return medians of seconds, bytes sent per step and process, and bytes of this process's part of a state."""
    import numpy as np

    from data_pipeline.datasets import PackedRows
    from data_pipeline.tokenize import TokenizedDataset
    from trainer.losses import next_token_loss
    from trainer.options import TrainOptions
    from trainer.trainer import Run, Trainer

    config = preset("minimind-v1-small")
    n = (steps + 1) * dist_env.size
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, n * 512).astype(np.uint16)
    documents = np.arange(n + 1) * 512, np.full(n, 512), np.arange(n).astype(np.uint64)
    rows = PackedRows(TokenizedDataset(tokens, None, *documents, "random", {}), np.arange(n), 512, 0)
    torch.manual_seed(0)
    options = TrainOptions(
        out_dir=folder, batch_size=1, max_steps=steps + 1, device="cpu", dtype="float32", fsdp=engine == "FSDP"
    )
    run = Run("pretrain", "scaling", config, {}, lambda info, tensors: None)
    trainer = Trainer(Transformer(config), next_token_loss, rows, None, options, run, dist_env)

    def timed(action: Callable[[], object]) -> float:
        barrier(dist_env)
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def save() -> None:
        trainer.steps_done += 1
        trainer.save(weights=False)

    seconds: dict[str, list[float]] = {}
    with trainer.log:
        trainer.prepare()
        trainer.strategy.train(True)
        batches = trainer.loader.prefetch(0)
        trainer.step(0, *next(batches))  # the first one allocates
        barrier(dist_env)
        sent = psutil.net_io_counters().bytes_sent
        seconds["step"] = [timed(lambda i=i: trainer.step(i, *next(batches))) for i in range(1, steps + 1)]
        barrier(dist_env)
        sent = (psutil.net_io_counters().bytes_sent - sent) / steps / dist_env.size
        seconds["save"] = [timed(save) for _ in range(SAVES)]
        newest = max(trainer.folder.glob("step_*"))
        state = sum(path.stat().st_size for path in newest.glob(f"__{dist_env.rank}_*.distcp"))
        if dist_env.size > 1:
            seconds["async"], seconds["async_done"] = _time_async_saves(trainer.strategy, folder, timed)
        trainer.metrics_logger.close()
    return {name: statistics.median(times) for name, times in seconds.items()} | {"sent": sent, "state": state}


def _time_async_saves(
    strategy: ParallelStrategy, folder: Path, timed: Callable[[Callable[[], object]], float]
) -> tuple[list[float], list[float]]:
    """Save the same tensors in the background; return how long that blocks, and after how long it is done."""
    blocked, done, futures = [], [], []

    def save_async(target: Path, tensors: dict) -> None:
        futures.append(dcp.async_save(tensors, storage_writer=dcp.FileSystemWriter(target)))

    with mock.patch("trainer.parallel.ddp.save_tensors", save_async):
        for i in range(SAVES):
            target = folder / f"async_{i}"
            target.mkdir(exist_ok=True)
            blocked.append(timed(lambda target=target: strategy.save(target)))
            start = time.perf_counter()
            futures[-1].result()
            done.append(blocked[-1] + time.perf_counter() - start)
    return blocked, done


def put(page: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    old = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    head, _, rest = old.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no markers {begin.strip()} and {end.strip()}")
    page.write_text(head + begin + text + end + tail, encoding="utf-8", newline="\n")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--gpu", default="H100", choices=[*PEAK_FLOPS], help="GPU whose peak is assumed")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak that is reached")
    parser.add_argument("--per_node", type=int, default=8, help="GPUs in one machine")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s of one GPU in one direction, inside a machine")
    parser.add_argument("--network", type=float, default=400, help="Gbit/s of one GPU's port, between machines")
    parser.add_argument("--efficiency", type=float, default=0.8, help="share of both that is reached")
    parser.add_argument("--nvlink_latency", type=float, default=3, help="microseconds for one hop inside a machine")
    parser.add_argument("--network_latency", type=float, default=10, help="microseconds for one hop between machines")
    parser.add_argument("--bucket_mb", type=float, default=25, help="gradients are sent in pieces of this many MiB")
    parser.add_argument("--measure", action="store_true", help="also measure 1, 2 and 4 processes here (some minutes)")
    parser.add_argument("--steps", type=int, default=8, help="number of steps to measure")
    parser.add_argument("--write", type=Path, help="write the tables into this page")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.worker:
        worker(args.worker, args.engine, args.steps)
        return
    tables = {"simulated": simulated(args)} | ({"measured": measured(args.steps)} if args.measure else {})
    for name, text in tables.items():
        print(f"{text}\n")
        if args.write:
            put(args.write, name, text)


if __name__ == "__main__":
    main()
