"""The processes that train together. With a single process every function here does nothing and costs nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError, fail, has_failed
from common.files import ROOT

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
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restart_count: int = 0
    run_id: str = ""
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def heartbeat(self, doing: str) -> None:
        """Report progress to the watchdog. Every process has to make the same calls in the same order."""
        if self.watchdog is not None:
            self.watchdog.heartbeat(doing)


def init_distributed(device_type: str, timeout: float = 600.0) -> DistEnv:
    """Join the processes started by a launcher (torchrun or deepspeed), if there is one.

    Launchers put the place of each process into RANK, WORLD_SIZE and LOCAL_RANK.

    timeout: seconds to wait for a process that does not respond (see `Watchdog`).
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    restart_count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if size == 1:
        return DistEnv(restart_count=restart_count, run_id=_run_id())
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
        backend = "nccl" if device_type == "cuda" else "gloo"
        later = timedelta(seconds=timeout + 120)
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=later))
        prefix = _rendezvous_prefix(store, rank, size, timeout + 120)
        dist.init_process_group(
            backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=size, timeout=later
        )
    if rank != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - rank 0 prints for all; errors of every process are shown
    watchdog = Watchdog(rank, size, timeout)
    watchdog.start()
    # After a restart the launchers of several machines count differently: a restart on one is a restart of all.
    found = [(0, "")] * size
    dist.all_gather_object(found, (restart_count, _run_id()))
    return DistEnv(rank, size, local_rank, max(count for count, _ in found), found[0][1], watchdog)


def _rendezvous_prefix(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """Agree on a prefix for keys in the store that no earlier process has used.

    torchrun keeps its store when it restarts processes, with the keys of the dead ones: addresses where nobody listens
    any more (https://github.com/pytorch/pytorch/issues/135712), or the mark that one has failed. Its count of restarts
    cannot serve as a prefix, because each machine has its own. So rank 0 publishes a new prefix, together with the names
    of all processes that it has seen, until every one of them has confirmed it.
    """
    me = uuid.uuid4().hex
    others = range(1, size)
    deadline = time.monotonic() + timeout
    if rank != 0:
        store.set(f"here/{rank}", me)
    while time.monotonic() < deadline:
        if rank == 0:
            seen = [store.get(f"here/{r}").decode() for r in others if store.check([f"here/{r}"])]
            store.set("prefix", json.dumps([me, seen]))
            if all(store.check([f"{me}/{r}"]) for r in others):
                return me
        elif store.check(["prefix"]):
            prefix, seen = json.loads(store.get("prefix"))
            if me in seen:
                store.set(f"{prefix}/{rank}", "")
                return prefix
        time.sleep(0.05)
    raise UserError(
        f"rank {rank} waited {timeout:g} seconds for the other {size - 1} processes to start: check whether one of them "
        "failed, and start the same number of processes on all machines"
    )


def cleanup_distributed(dist_env: DistEnv) -> None:
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


# ---- collective operations


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
    if dist_env.size == 1:
        return function()
    dist_env.heartbeat("waiting for rank 0")
    answer: list = [None, None]
    if dist_env.is_main:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
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
def main_process_first(dist_env: DistEnv, what: str) -> Iterator[None]:
    """Run a block that writes files: rank 0 first, then one process of every other machine, then all others.

    So what the first one writes, the others find, whether the machines share a folder or not. This may take hours: the
    watchdog is suspended.

    what: shown in errors; different for every use.
    """
    if dist_env.watchdog is None:
        yield
        return
    leader = dist_env.rank - dist_env.local_rank  # of this machine
    waits_for = None if dist_env.is_main else 0 if dist_env.rank == leader else leader
    with dist_env.watchdog.suspend(f"preparing {what}"):
        if waits_for is not None:
            dist_env.watchdog.store.wait([f"done/{what}/{waits_for}"], FOREVER)
        yield
        dist_env.watchdog.store.set(f"done/{what}/{dist_env.rank}", "")


def broadcast_parameters(dist_env: DistEnv, model: nn.Module, device: torch.device) -> None:
    """Give every process the parameters of rank 0. They pass through the device one at a time."""
    if dist_env.size == 1:
        return
    dist_env.heartbeat("broadcasting the weights")
    for parameter in model.parameters():
        value = parameter.data.to(device)
        dist.broadcast(value, src=0)
        parameter.data.copy_(value)


def broadcast_tensors(
    dist_env: DistEnv, tensors: dict[str, dict[str, Tensor]], device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, tensors) of rank 0 on every process, one name at a time; `tensors` is used on rank 0 only."""
    layout = {name: {key: (x.shape, x.dtype) for key, x in group.items()} for name, group in tensors.items()}
    for name, group in broadcast_object(dist_env, lambda: layout).items():
        values = {}
        for key, (shape, dtype) in group.items():
            value = (
                tensors[name][key].to(device) if dist_env.is_main else torch.empty(shape, dtype=dtype, device=device)
            )
            if dist_env.size > 1:
                dist.broadcast(value, src=0)
            values[key] = value
        yield name, values


# ---- processes that hang


class Watchdog(threading.Thread):
    """A thread that notices processes which hang, names them, and ends this process.

    Where processes wait for each other, one that does not respond would block all the others forever. So each counts its
    heartbeats (all make the same calls) and publishes the count in the launcher's store. A process that had no heartbeat
    for `timeout` seconds looks there which one is behind.
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.size, self.timeout = rank, size, timeout
        self.doing, self.heartbeats, self.since = "starting", 0, time.monotonic()
        self._suspended = False
        self._stopped = threading.Event()
        store: Any = dist.distributed_c10d._get_default_store()
        self.store = store.clone()  # for the main thread; a connection serves one request at a time
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=max(timeout, 10)))

    def heartbeat(self, doing: str) -> None:
        self.doing, self.since = doing, time.monotonic()
        self.heartbeats += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=1)

    @contextlib.contextmanager
    def suspend(self, doing: str) -> Iterator[None]:
        """Let this process take any time in the block, also to wait for another process."""
        self.heartbeat(doing)
        self._suspended = True
        yield
        self._suspended = False
        self.heartbeat(doing)

    def run(self) -> None:
        interval = min(max(self.timeout / 20, 0.1), 2.0)
        while True:
            try:
                self._store.set(f"at/{self.rank}", self._position())
                failed = has_failed(self._store)
            except RuntimeError:
                # Rank 0 holds the store where the launcher does not; its own message has said what happened.
                failed = True
            if failed and not self._stopped.wait(5.0):
                os._exit(1)  # the reason has been printed; waiting for a dead process would never end
            if not self._suspended and time.monotonic() - self.since > self.timeout:
                fail(self._report(), store=self._store)
            if self._stopped.wait(interval):
                return

    def _position(self) -> str:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and not frame.f_code.co_filename.startswith(str(ROOT / "trainer")):
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}" if frame is not None else ""
        return json.dumps([self.heartbeats, self.doing, where, socket.gethostname(), os.getpid()])

    def _report(self) -> str:
        time.sleep(0.5)  # a process that arrived at the same moment has published it by then
        positions: dict[int, list] = {}
        for rank in range(self.size):
            key = f"at/{rank}"
            known = self._store.check([key])
            positions[rank] = json.loads(self._store.get(key)) if known else [0, "starting", "", "", 0]
        furthest = max(position[0] for position in positions.values())
        late = [rank for rank, position in positions.items() if position[0] < furthest]
        names = [
            f"rank {rank}{f' (process {pid} on {host})' if pid else ''}, last seen at {doing}{f' ({at})' if at else ''}"
            for rank, (_, doing, at, host, pid) in positions.items()
            if rank in late or not late
        ]
        waiting = next(doing for count, doing, *_ in positions.values() if count == furthest)
        if late:
            return (
                f"{len(late)} of {self.size} processes did not respond within --timeout {self.timeout:g} seconds, and the "
                f"others wait for them ({waiting}): {'; '.join(names)}. Check what is wrong there, then continue with "
                "--resume"
            )
        return (
            f"no process made progress for --timeout {self.timeout:g} seconds, and none is behind the others: "
            f"{'; '.join(names)}. If a step takes so long, use a longer --timeout; otherwise continue with --resume"
        )
