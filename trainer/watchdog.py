"""A thread that notices processes which hang, and names them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from common.errors import fail


class Watchdog(threading.Thread):
    """End this process with the names of the processes that hang.

    Where processes wait for each other, one that does not respond blocks all the others until the process group's own
    timeout, whose error does not say which one it was. So each counts its heartbeats (all make the same calls) and
    publishes the count in the launcher's store. A process that had no heartbeat for `timeout` seconds looks there which
    one is behind, or publishes nothing any more: it was stopped. Where a process may take any time (`suspend`), it looks
    only for those that have published nothing for `timeout` seconds.

    attempt: a number that grows when the launcher restarts the processes, because its store lives on.
    """

    def __init__(self, rank: int, size: int, timeout: float, attempt: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.size, self.timeout = rank, size, timeout
        self.doing, self.heartbeats, self.since = "starting", 0, time.monotonic()
        self._suspended = False
        self._interval, self._published = min(max(timeout / 20, 0.1), 2.0), 0
        self._changes: dict[int, tuple[list, float]] = {}  # rank -> its last position, and since when it is that
        self._looked = 0.0
        self._stopped = threading.Event()
        store: Any = dist.distributed_c10d._get_default_store()  # PyTorch has no public way to the launcher's store
        # A connection serves one request at a time: this thread gets its own.
        self._store = dist.PrefixStore(f"watchdog_{attempt}", store.clone())
        self._store.set_timeout(timedelta(seconds=max(timeout, 10)))

    def heartbeat(self, doing: str, count: bool = True) -> None:
        self.doing, self.since = doing, time.monotonic()
        self.heartbeats += count

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
        wait = 0.0  # the others have to know this process from the start
        while not self._stopped.wait(wait):
            wait = self._interval
            try:
                self._publish()
                if self._suspended:
                    self._look_for_stopped()
                elif time.monotonic() - self.since > self.timeout:
                    fail(self._report())
            except RuntimeError:  # the store is gone, and with it rank 0, which has printed its own message
                os._exit(1)

    def _publish(self) -> None:
        self._published += 1
        position = [self.heartbeats, self.doing, socket.gethostname(), os.getpid(), self._published]
        self._store.set(str(self.rank), json.dumps(position))

    def _positions(self) -> list[list]:
        keys = [str(rank) for rank in range(self.size)]
        unknown = [0, "starting", "an unknown host", 0, 0]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else unknown for key in keys]

    def _look_for_stopped(self) -> None:
        """End this process if others have published nothing for `timeout` seconds."""
        now = time.monotonic()
        if now - self._looked < self.timeout / 4:  # each look asks the store for every process
            return
        self._looked = now
        positions = self._positions()
        for rank, position in enumerate(positions):
            if self._changes.get(rank, ([], 0.0))[0] != position:
                self._changes[rank] = position, now
        late = [rank for rank, (_, since) in self._changes.items() if now - since > self.timeout]
        if late:
            fail(self._not_responding(late, positions))

    def _not_responding(self, late: list[int], positions: list[list]) -> str:
        waiting = max(positions)[1]  # what the furthest is doing
        return (
            f"{len(late)} of {self.size} processes did not respond within --timeout {self.timeout:g} seconds, and the "
            f"others wait for them ({waiting}): {_names(late, positions)}. Check what is wrong there, then continue with "
            "--resume"
        )

    def _report(self) -> str:
        before = self._positions()
        for _ in range(4):  # a process that arrived at the same moment has published it by then
            time.sleep(self._interval / 2)
            self._publish()
        positions = self._positions()
        furthest = max(count for count, *_ in positions)
        late = [rank for rank, now in enumerate(positions) if now[0] < furthest or now == before[rank]]
        if late:
            return self._not_responding(late, positions)
        return (
            f"no process made progress for --timeout {self.timeout:g} seconds, and none is behind the others: "
            f"{_names(range(self.size), positions)}. If a step takes so long, use a longer --timeout; otherwise continue "
            "with --resume"
        )


def _names(ranks: Iterable[int], positions: list[list]) -> str:
    """Describe processes and what they were doing."""
    found = ((rank, *positions[rank]) for rank in ranks)
    return "; ".join(
        f"rank {rank} (process {pid} on {host}), last seen at {doing}" for rank, _, doing, host, pid, _ in found
    )
