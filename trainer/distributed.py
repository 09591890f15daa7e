"""The processes that train together. Alone, every function here does nothing and costs nothing."""

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
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError, fail, has_failed

BUCKET_BYTES = 32 << 20  # gradients are summed in flat pieces of about this size
FOREVER = timedelta(days=365)
ROOT = Path(__file__).resolve().parents[1]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class DistEnv:
    """Which of how many processes this is.

    Attributes:
        attempt: how often the launcher has started the processes again after one of them died.
        launch: the launcher's name for this run: the same after a restart; "" without a launcher.
        watch: notices processes that do not come; None alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restart_count: int = 0
    run_id: str = ""
    watch: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def heartbeat(self, doing: str) -> None:
        """Tell the watch that this process got on. Every process has to make the same calls in the same order."""
        if self.watch is not None:
            self.watch.heartbeat(doing)


def init_distributed(device_type: str, timeout: float = 600.0) -> DistEnv:
    """Join the processes started by a launcher (torchrun or deepspeed), or be alone.

    Launchers tell each process its place in RANK, WORLD_SIZE and LOCAL_RANK.

    timeout: seconds to wait for another process before giving up (see `Watchdog`).
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
        # The watch speaks first, with the names of those who are missing; PyTorch's own time-out is behind it.
        backend = "nccl" if device_type == "cuda" else "gloo"
        suspend = timedelta(seconds=timeout + 120)
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=suspend))
        name = _name_of_attempt(store, rank, size, timeout + 120)
        dist.init_process_group(
            backend, store=dist.PrefixStore(name, store), rank=rank, world_size=size, timeout=suspend
        )
    if rank != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process speaks; errors of all are heard
    watch = Watchdog(rank, size, timeout)
    watch.start()
    # After a restart the launchers of several machines count differently: what happened on one happened to all.
    names: list = [None] * size
    dist.all_gather_object(names, (restart_count, _run_id()))
    return DistEnv(rank, size, local_rank, max(count for count, _ in names), names[0][1], watch)


def _name_of_attempt(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name that these processes have in common with each other, and with none that were there before.

    torchrun keeps its store when it starts processes again, with what the dead ones have written: addresses where nobody
    listens any more (https://github.com/pytorch/pytorch/issues/135712), or that one has failed. Its count of restarts
    names no attempt either: each machine has its own. So rank 0 calls out a new name with everyone it has heard of, until
    all have answered to it.
    """
    me = uuid.uuid4().hex
    others = range(1, size)
    deadline = time.monotonic() + timeout
    if rank != 0:
        store.set(f"here/{rank}", me)
    while time.monotonic() < deadline:
        if rank == 0:
            heard = [store.get(f"here/{r}").decode() for r in others if store.check([f"here/{r}"])]
            store.set("attempt", json.dumps([me, heard]))
            if all(store.check([f"{me}/{r}"]) for r in others):
                return me
        elif store.check(["attempt"]):
            name, heard = json.loads(store.get("attempt"))
            if me in heard:
                store.set(f"{name}/{rank}", "")
                return name
        time.sleep(0.05)
    raise UserError(
        f"rank {rank} waited {timeout:g} seconds for the other {size - 1} processes to start: look whether one of them "
        "failed, and give all machines the same number of processes"
    )


def cleanup_distributed(dist_env: DistEnv) -> None:
    barrier(dist_env)
    if dist_env.watch is not None:
        dist_env.watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def _run_id() -> str:
    """What torchrun calls this run; where that is not unique, its process, which outlives a restart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name != "none":
        return name
    parent = psutil.Process().parent()
    return f"{parent.pid} {parent.create_time()}" if parent else ""


# ---- talking


def barrier(dist_env: DistEnv) -> None:
    """Wait until every process has come here."""
    if dist_env.size > 1:
        dist_env.heartbeat("meeting the others")
        dist.barrier()


def all_reduce_sum(dist_env: DistEnv, values: Iterable[float], device: torch.device) -> list[float]:
    """Each value summed over all processes, in double precision where the device has it."""
    values = list(values)
    if dist_env.size == 1:
        return values
    dist_env.heartbeat(f"{dist_env.watch.doing.partition(',')[0]}, adding up")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def broadcast_object(dist_env: DistEnv, question: Callable[[], Answer]) -> Answer:
    """What rank 0 answers, on every process; a UserError there is raised everywhere. The answer is sent pickled."""
    if dist_env.size == 1:
        return question()
    dist_env.heartbeat("asking rank 0")
    answer: list = [None, None]
    if dist_env.is_main:
        try:
            answer[0] = question()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def assert_same_on_all_ranks(dist_env: DistEnv, facts: dict) -> None:
    """UserError if a process was given other data, weights or flags than rank 0; `facts` are JSON-friendly."""
    if dist_env.size == 1:
        return
    dist_env.heartbeat("comparing data and flags")
    everyone: list = [None] * dist_env.size
    dist.all_gather_object(everyone, (socket.gethostname(), facts))
    for rank, (host, theirs) in enumerate(everyone):
        odd = [name for name in facts if theirs.get(name) != everyone[0][1][name]]
        if odd:
            name = odd[0]
            raise UserError(
                f"rank {rank} (on {host}) and rank 0 (on {everyone[0][0]}) do not train the same: {name} is "
                f"{theirs.get(name)} there and {everyone[0][1][name]} here; give all machines the same files and flags"
            )


@contextlib.contextmanager
def main_process_first(dist_env: DistEnv, what: str) -> Iterator[None]:
    """Work that leaves files (tokens): rank 0 does the block first, then one process of every other machine, then all.

    So what the first one makes, the others find, whether or not the machines share a folder. Waiting here may take hours
    and is no reason to give up.

    what: in words; different for every use.
    """
    if dist_env.size == 1:
        yield
        return
    leader = dist_env.rank - dist_env.local_rank  # of this machine
    waits_for = None if dist_env.is_main else 0 if dist_env.rank == leader else leader
    with dist_env.watch.suspend(f"preparing {what}"):
        if waits_for is not None:
            dist_env.watch.line.wait([f"done/{what}/{waits_for}"], FOREVER)
        yield
        dist_env.watch.line.set(f"done/{what}/{dist_env.rank}", "")


def broadcast_parameters(dist_env: DistEnv, model: nn.Module, device: torch.device) -> None:
    """Give every process the parameters of rank 0. Only one of them at a time needs room on the device."""
    if dist_env.size == 1:
        return
    dist_env.heartbeat("sharing the weights")
    for parameter in model.parameters():
        value = parameter.data.to(device)
        dist.broadcast(value, src=0)
        parameter.data.copy_(value)


def broadcast_tensors(
    dist_env: DistEnv, tensors: dict[str, dict[str, Tensor]], device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors) of rank 0 on every process, one name after the other; `tensors` counts on rank 0 only."""
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


class GradientSum:
    """Gradients summed over all processes, while the last micro-batch of a step still goes backward.

    Gradients are views of flat buckets, so nothing is copied. Buckets hold the parameters from the last to the first,
    about the order in which a backward pass reaches them, and are summed in that order on every process. Which values
    are summed together never changes, so that a run that was restarted gets the same sums to the bit.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.flat: list[Tensor] = []
        self._bucket: dict[nn.Parameter, int] = {}
        self._sizes: list[int] = []
        self._works: list[dist.Work] = []
        self._active = False
        for bucket in _buckets(list(reversed(parameters))):
            numbers = [parameter.numel() for parameter in bucket]
            flat = torch.zeros(sum(numbers), dtype=bucket[0].dtype, device=bucket[0].device)
            for parameter, piece in zip(bucket, flat.split(numbers), strict=True):
                parameter.grad = piece.view_as(parameter)
                parameter.register_post_accumulate_grad_hook(self._arrived)
                self._bucket[parameter] = len(self.flat)
            self.flat.append(flat)
            self._sizes.append(len(bucket))

    def begin(self) -> None:
        """The next backward pass is the last of the step: sum every bucket as soon as it is complete."""
        self._missing, self._active = list(self._sizes), True

    def finish(self) -> None:
        """Wait for the sums. What got no gradient (its bucket is not complete) takes part with what is there: zeros."""
        self._active = False
        while len(self._works) < len(self.flat):
            self._sum_next()
        for work in self._works:
            work.wait()

    def zero(self) -> None:
        self._works = []
        for flat in self.flat:
            flat.zero_()

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        self._missing[self._bucket[parameter]] -= 1
        while len(self._works) < len(self.flat) and not self._missing[len(self._works)]:
            self._sum_next()

    def _sum_next(self) -> None:
        self._works.append(dist.all_reduce(self.flat[len(self._works)], async_op=True))


def _buckets(parameters: list[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


# ---- noticing who does not come


class Watchdog(threading.Thread):
    """A thread that notices processes which hang, names them, and ends this one.

    Where processes wait for each other, one that does not come would keep all the others forever. So each counts how
    often it has got on (`heartbeat`; all make the same calls) and writes it into the launcher's store. Whoever has not got
    on for `timeout` seconds looks there who is behind.
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.rank, self.size, self.timeout = rank, size, timeout
        self.doing, self.ticks, self.since = "starting", 0, time.monotonic()
        self._patient = False
        self._stopped = threading.Event()
        store = dist.distributed_c10d._get_default_store()
        self.line = store.clone()  # the main thread's; a connection serves one request at a time
        self._line = store.clone()
        self._line.set_timeout(timedelta(seconds=max(timeout, 10)))

    def heartbeat(self, doing: str) -> None:
        self.doing, self.since = doing, time.monotonic()
        self.ticks += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=1)

    @contextlib.contextmanager
    def suspend(self, doing: str) -> Iterator[None]:
        """In here this process may take its time, or wait for another that does."""
        self.heartbeat(doing)
        self._patient = True
        yield
        self._patient = False
        self.heartbeat(doing)

    def run(self) -> None:
        interval = min(max(self.timeout / 20, 0.1), 2.0)
        while True:
            try:
                self._line.set(f"at/{self.rank}", self._position())
                failed = has_failed(self._line)
            except RuntimeError:
                # Rank 0 keeps the store where the launcher does not; its own message has said what happened.
                failed = True
            if failed and not self._stopped.wait(5.0):
                os._exit(1)  # the reason has been told; whoever still waits for a dead process waits in vain
            if not self._patient and time.monotonic() - self.since > self.timeout:
                fail(self._report(), line=self._line)
            if self._stopped.wait(interval):
                return

    def _position(self) -> str:
        frame = sys._current_frames().get(threading.main_thread().ident)
        while frame is not None and not frame.f_code.co_filename.startswith(str(ROOT / "trainer")):
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}" if frame is not None else ""
        return json.dumps([self.ticks, self.doing, where, socket.gethostname(), os.getpid()])

    def _report(self) -> str:
        time.sleep(0.5)  # whoever came at the same time has written it down by then
        positions = {}
        for rank in range(self.size):
            key = f"at/{rank}"
            positions[rank] = json.loads(self._line.get(key)) if self._line.check([key]) else [0, "starting", "", "", 0]
        furthest = max(position[0] for position in positions.values())
        late = [rank for rank, position in positions.items() if position[0] < furthest]
        names = [
            f"rank {rank}{f' (process {pid} on {host})' if pid else ''}, last seen at {doing}{f' ({at})' if at else ''}"
            for rank, (_, doing, at, host, pid) in positions.items()
            if rank in late or not late
        ]
        waiting = next(doing for ticks, doing, *_ in positions.values() if ticks == furthest)
        if late:
            return (
                f"{len(late)} of {self.size} processes did not come within --timeout {self.timeout:g} seconds, the others "
                f"wait ({waiting}): {'; '.join(names)}. Look what that one is doing, then continue with --resume"
            )
        return (
            f"no process has got on for --timeout {self.timeout:g} seconds, and none is behind the others: "
            f"{'; '.join(names)}. A longer --timeout helps if a step takes so long; else continue with --resume"
        )
