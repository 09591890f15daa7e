"""What each process writes about itself: out/logs/<run>.rank<N>.log, with times, warnings and the error it died of.

Rank 0 speaks on the terminal; when a run of many processes fails or is slow, the reason often stands in another's log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from trainer.distributed import DistEnv


class RankLog:
    """A log file of one process, open while the run is (`with`); otherwise writing does nothing.

    Every line is written at once: it is there when the process is killed the moment after. A disk that is full loses
    lines of the log and nothing else.
    """

    def __init__(self, out_dir: Path, name: str, dist_env: DistEnv) -> None:
        self.path = out_dir / "logs" / f"{name}.rank{dist_env.rank}.log"
        self.dist_env = dist_env
        self._file: IO[str] | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> RankLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", newline="", buffering=1)  # noqa: SIM115
        self._undo.callback(self._close)
        self._undo.enter_context(self._warnings())
        self.write(
            f"--- started: process {os.getpid()} on {platform.node()}, rank {self.dist_env.rank} of {self.dist_env.size}, "
            f"PyTorch {torch.__version__}"
        )
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.write("--- finished")
        elif isinstance(error, SystemExit):
            self.write(f"--- stopped (exit code {error.code})")
        else:
            self.write("ERROR " + "".join(traceback.format_exception(kind, error, trace)).rstrip())
        self._undo.close()
        self._file = None

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, text: str) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    @contextlib.contextmanager
    def _warnings(self) -> Iterator[None]:
        """Python's warnings and those of the logging module come here too; on the terminal only those of rank 0."""
        show = warnings.showwarning

        def record(message, category, filename, lineno, file=None, line=None) -> None:
            self.write(f"WARNING {category.__name__}: {message} ({filename}, line {lineno})")
            if self.dist_env.is_main:
                show(message, category, filename, lineno, file, line)

        handler = _Handler(self)
        warnings.showwarning = record
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            warnings.showwarning = show
            logging.getLogger().removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, log: RankLog) -> None:
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.write(f"{record.levelname} {record.name}: {record.getMessage()}")


class StepTimer:
    """How long this process works by itself: waiting for its data, and forward and backward up to where all meet.

    Processes that train together end every step at the same time, the slowest one's. What each did before tells which
    that is. On CUDA, events measure without stopping the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.data_seconds = 0.0  # since the last step
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.data_seconds = time.perf_counter() - start
        self._seconds += self.data_seconds

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        if self.cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds of work since the last call. On CUDA the device has to be done with them: the caller has synchronised."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds
