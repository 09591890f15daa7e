"""The processes that train together. With a single process every function here does nothing and costs nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from common import errors
from common.errors import UserError
from model.device import resolve_device
from trainer.watchdog import Watchdog

FOREVER = timedelta(days=365)
T = TypeVar("T")


@dataclass(frozen=True)
class DistEnv:
    """This process's place among the processes that train together.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on its machine.
        restart_count: how often the launcher has restarted the processes after one of them died.
        run_id: the launcher's name for this run, the same after a restart; "" without a launcher.
        watchdog: notices processes that hang; None with a single process.
        untimed_group: a process group whose collectives never time out; None with a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restart_count: int = 0
    run_id: str = ""
    watchdog: Watchdog | None = None
    untimed_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def heartbeat(self, doing: str, count: bool = True) -> None:
        """Report progress to the watchdog. Every process has to make the same calls that count, in the same order."""
        if self.watchdog is not None:
            self.watchdog.heartbeat(doing, count)


def init_distributed(device: str, timeout: float = 600.0) -> DistEnv:
    """Join the processes started by a launcher (torchrun or deepspeed), if there is one.

    Launchers put the place of each process into RANK, WORLD_SIZE and LOCAL_RANK.

    Args:
        device: what --device says; each process takes its own one of that kind.
        timeout: seconds to wait for a process that does not respond (see `Watchdog`).
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    restart_count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if size == 1:
        return DistEnv(restart_count=restart_count, run_id=_run_id())
    resolved = resolve_device(device)
    device_type = resolved.type
    if resolved.index is not None:
        raise UserError(
            f"--device {device} with {size} processes: each takes its own; use --device {device_type}, and "
            "CUDA_VISIBLE_DEVICES to choose among them"
        )
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} is process {local_rank + 1} on {socket.gethostname()}, which has only "
                f"{torch.cuda.device_count()} CUDA devices: start fewer processes there, or train with --device cpu"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        # The watchdog reports first, with the names of the missing processes; PyTorch's own timeout comes later.
        later = timedelta(seconds=timeout + 120)
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=later))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps its store, with the addresses of dead processes, when it restarts them. (On several machines
            # each launcher has a count of its own; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives them a new store.)
            store = dist.PrefixStore(f"restart_{restart_count}", store)
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=later)
    if rank != 0:
        # Rank 0 prints for all; errors of every process are shown.
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115
    # After a restart the launchers of several machines count differently: a restart on one is a restart of all.
    found = [(0, "")] * size
    dist.all_gather_object(found, (restart_count, _run_id()))
    restarts = sum(count for count, _ in found)  # grows with every restart, whichever machine counts it
    errors.failure_key = f"failed/{restarts}"
    watchdog = Watchdog(rank, size, timeout, restarts)
    watchdog.start()
    untimed_group = dist.new_group(backend="gloo", timeout=FOREVER)
    return DistEnv(rank, size, local_rank, max(count for count, _ in found), found[0][1], watchdog, untimed_group)


def cleanup_distributed(dist_env: DistEnv) -> None:
    """Wait for all processes, and end what connects them."""
    barrier(dist_env)
    if dist_env.watchdog is not None:
        dist_env.watchdog.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def _run_id() -> str:
    """Return torchrun's id of this run; where that is not unique, its process, which survives a restart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name != "none":
        return name
    parent = psutil.Process().parent()
    return f"{parent.pid} {parent.create_time()}" if parent else ""


# ---- what the processes exchange


def barrier(dist_env: DistEnv) -> None:
    """Wait until every process has arrived here."""
    if dist_env.size > 1:
        dist_env.heartbeat("waiting for the others")
        dist.barrier()


def all_reduce_sum(dist_env: DistEnv, values: Iterable[float], device: torch.device) -> list[float]:
    """Return each value summed over all processes, in double precision where the device has it."""
    values = list(values)
    if dist_env.watchdog is None:
        return values
    dist_env.heartbeat(f"{dist_env.watchdog.doing.partition(',')[0]}, summing over processes")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_gather_object(dist_env: DistEnv, value: T) -> list[T]:
    """Return the `value` of every process, by rank."""
    if dist_env.size == 1:
        return [value]
    gathered = [value] * dist_env.size
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(dist_env: DistEnv, function: Callable[[], T]) -> T:
    """Return on every process what `function` returns on rank 0; a UserError there is raised everywhere."""
    if dist_env.watchdog is None:
        return function()
    answer: list = [None, None]
    with dist_env.watchdog.suspend("waiting for rank 0"):  # it may have much to read
        if dist_env.is_main:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, group=dist_env.untimed_group)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def assert_same_on_all_ranks(dist_env: DistEnv, facts: dict) -> None:
    """Raise UserError if a process has other data, weights or flags than rank 0; `facts` are JSON-friendly."""
    dist_env.heartbeat("comparing data and flags")
    everyone = all_gather_object(dist_env, (socket.gethostname(), facts))
    main_host, main_facts = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        for name in facts:
            if theirs.get(name) != main_facts[name]:
                raise UserError(
                    f"rank {rank} (on {host}) and rank 0 (on {main_host}) do not train the same: {name} is "
                    f"{theirs.get(name)} there and {main_facts[name]} here; give all machines the same files and flags"
                )


@contextlib.contextmanager
def main_process_first(dist_env: DistEnv, doing: str) -> Iterator[None]:
    """Run a block that writes files: rank 0 first, then one process of every other machine, then all others.

    So what the first one writes, the others find, whether the machines share a folder or not. This may take hours: the
    watchdog is suspended.
    """
    if dist_env.watchdog is None:
        yield
        return
    turn = 0 if dist_env.is_main else 1 if dist_env.local_rank == 0 else 2
    with dist_env.watchdog.suspend(doing):
        for _ in range(turn):
            dist.barrier(dist_env.untimed_group)
        yield
        for _ in range(2 - turn):
            dist.barrier(dist_env.untimed_group)
