"""Where a run is reported beside the terminal and the JSONL file: Weights & Biases, TensorBoard, and a log per process.

None of them can end a run: wandb or TensorBoard are dropped with a warning when they fail.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from common.errors import first_line
from trainer.distributed import DistEnv
from trainer.options import TrainOptions

FINISH_SECONDS = 60  # the end of a run waits for an upload at most this long


@dataclass
class Logger:
    """A service that gets the metrics of every log line."""

    name: str
    log: Callable[[dict[str, float], int], Any]  # takes metrics and step
    close: Callable[[], Any]


class Loggers:
    """The loggers of a run. One that fails is dropped with a warning, and the run continues."""

    def __init__(self, active: list[Logger]) -> None:
        self.active = active

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._call_each(lambda logger: logger.log(metrics, step))

    def close(self) -> None:
        """Close every logger that is still open."""
        self._call_each(lambda logger: logger.close())
        self.active = []

    def _call_each(self, action: Callable[[Logger], None]) -> None:
        for logger in list(self.active):
            try:
                action(logger)
            except Exception as error:
                if not _is_outage(error):
                    raise
                self.active.remove(logger)
                _warn(
                    f"{logger.name} failed ({first_line(error)}): nothing more is sent there in this run; training "
                    "continues, and all metrics are in .metrics.jsonl"
                )


def open_loggers(options: TrainOptions, run_name: str, steps_done: int) -> Loggers:
    """Open what --use_wandb and --use_tensorboard ask for."""
    active = []
    if options.use_wandb and (logger := _open_wandb(options, run_name)) is not None:
        active.append(logger)
    if options.use_tensorboard:
        active.append(_open_tensorboard(options.out_dir / "tensorboard", run_name, steps_done))
    return Loggers(active)


def _open_tensorboard(folder: Path, run_name: str, steps_done: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    writer = SummaryWriter(folder / run_name, purge_step=steps_done + 1)  # a resumed run logs later steps again
    print(f"TensorBoard: tensorboard --logdir {folder}")

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Logger("TensorBoard", log, writer.close)


def _open_wandb(options: TrainOptions, run_name: str) -> Logger | None:
    """Open wandb online if there is an account and the server responds, else offline; None if neither works.

    What it cannot upload stays in OUT_DIR/wandb, for `wandb sync`.
    """
    import wandb

    folder = options.out_dir / "wandb"
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    if mode == "offline" and "WANDB_MODE" not in os.environ:
        print(f"wandb: no account on this machine, logging offline to {folder}")
    for attempt in [mode, "offline"] if mode == "online" else [mode]:
        try:
            run = wandb.init(
                project=options.wandb_project,
                name=options.wandb_run_name or run_name,
                dir=options.out_dir,
                mode=attempt,
                config=options.describe(),
                # A connection that is lost at the end must not keep the GPUs: the rest can be uploaded later.
                settings=wandb.Settings(finish_timeout=FINISH_SECONDS),
            )
            return Logger("wandb", run.log, run.finish)
        except Exception as error:
            if not _is_outage(error):
                raise
            if attempt == "online":
                what, then = "reached", f"logging offline to {folder}, upload it with `wandb sync`"
            else:
                what, then = "used", "training without it"
            _warn(f"wandb cannot be {what} ({first_line(error)}): {then}")
    return None


def _is_outage(error: Exception) -> bool:
    """Return whether a service or a disk is gone, and not our code wrong. Lost connections are OSErrors."""
    known = (OSError, RuntimeError, ValueError, TypeError, EOFError)
    return isinstance(error, known) or type(error).__module__.split(".")[0] == "wandb"


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


class RankLog(logging.Handler):
    """The log of one process, out/logs/<run>.rank<N>.log: times, warnings, and the error that ended it.

    The terminal shows rank 0 only. When a run of many processes fails or is slow, the reason is often in another log.

    It is open while the run is (`with`); otherwise writing does nothing. Every line is written at once, so that it is
    there when the process is killed the moment after. A full disk loses lines of the log and nothing else.
    """

    def __init__(self, out_dir: Path, name: str, dist_env: DistEnv) -> None:
        super().__init__(logging.WARNING)
        self.path = out_dir / "logs" / f"{name}.rank{dist_env.rank}.log"
        self.dist_env = dist_env
        self._file: IO[str] | None = None

    def __enter__(self) -> RankLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", newline="", buffering=1)  # noqa: SIM115
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._record_warning
        logging.getLogger().addHandler(self)
        self.write(
            f"--- started: process {os.getpid()} on {platform.node()}, rank {self.dist_env.rank} of {self.dist_env.size}, "
            f"PyTorch {torch.__version__}"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.write("--- finished")
        elif isinstance(error, SystemExit):
            self.write(f"--- stopped (exit code {error.code})")
        else:
            self.write("ERROR " + "".join(traceback.format_exception(error)).rstrip())
        warnings.showwarning = self._show_warning
        logging.getLogger().removeHandler(self)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def write(self, text: str) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Write a warning of the logging module."""
        self.write(f"{record.levelname} {record.name}: {record.getMessage()}")

    def _record_warning(
        self, message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any
    ) -> None:
        """Write a warning of Python; the terminal shows only those of rank 0."""
        self.write(f"WARNING {category.__name__}: {message} ({filename}, line {lineno})")
        if self.dist_env.is_main:
            self._show_warning(message, category, filename, lineno, *rest, **more)
