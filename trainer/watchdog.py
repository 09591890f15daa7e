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
    publishes the count in the launcher's store, again and again. One that publishes nothing any more was stopped. A
    process that had no heartbeat for `timeout` seconds also looks there which one is behind, except where it may take any
    time (`suspend`).

    restarts: a number that grows when the launcher restarts the processes, because its store lives on.
    """

    def __init__(self, rank: int, size: int, timeout: float, restarts: int) -> None:
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
        self._store = dist.PrefixStore(f"watchdog_{restarts}", store.clone())
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
                now = time.monotonic()
                stuck = not self._suspended and now - self.since > self.timeout
                if stuck or now - self._looked > self.timeout / 4:  # each look asks the store for every process
                    self._look(now, stuck)
            except RuntimeError:  # the store is gone, and with it rank 0, which has printed its own message
                os._exit(1)

    def _publish(self) -> None:
        self._published += 1
        position = [self.heartbeats, self.doing, socket.gethostname(), os.getpid(), self._published]
        self._store.set(str(self.rank), json.dumps(position))

    def _look(self, now: float, stuck: bool) -> None:
        """End this process if others publish nothing any more, or if it is stuck."""
        self._looked = now
        unknown = [0, "starting", "an unknown host", 0, 0]
        keys = [str(rank) for rank in range(self.size)]
        positions = [json.loads(self._store.get(key)) if self._store.check([key]) else unknown for key in keys]
        for rank, position in enumerate(positions):
            if self._changes.get(rank, ([], 0.0))[0] != position:
                self._changes[rank] = position, now
        furthest = max(positions)
        # A process that was stopped has blocked this one only some time later.
        silence = self.timeout / 2 if stuck else self.timeout
        late = [
            rank
            for rank, (position, since) in self._changes.items()
            if now - since > silence or (stuck and position[0] < furthest[0])
        ]
        if late:
            fail(
                f"{len(late)} of {self.size} processes did not respond within --timeout {self.timeout:g} seconds, and the "
                f"others wait for them ({furthest[1]}): {_names(late, positions)}. Check what is wrong there, then "
                "continue with --resume"
            )
        if stuck:
            fail(
                f"no process made progress for --timeout {self.timeout:g} seconds, and none is behind the others: "
                f"{_names(range(self.size), positions)}. If a step takes so long, use a longer --timeout; otherwise "
                "continue with --resume"
            )


def _names(ranks: Iterable[int], positions: list[list]) -> str:
    """Describe processes and what they were doing."""
    found = ((rank, *positions[rank]) for rank in ranks)
    return "; ".join(
        f"rank {rank} (process {pid} on {host}), last seen at {doing}" for rank, _, doing, host, pid, _ in found
    )
