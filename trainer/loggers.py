"""Where the figures go beside the terminal and JSONL: Weights & Biases, TensorBoard. No trouble of theirs ends a run."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainer.trainer import Trainer

FINISH_SECONDS = 60  # how long the end of a run waits for an upload


class Dashboard(Protocol):
    """What can be told figures. `failures` are the exceptions it may raise when its service or its disk is gone."""

    name: str
    failures: tuple[type[Exception], ...]

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Dashboards:
    """Those that were asked for. One that fails is dropped with a warning, and the run goes on."""

    def __init__(self, dashboards: list[Dashboard]) -> None:
        self.active = dashboards

    def log(self, figures: dict[str, float], step: int) -> None:
        for dashboard in list(self.active):
            try:
                dashboard.log(figures, step)
            except dashboard.failures as error:
                self._drop(dashboard, error)

    def close(self) -> None:
        for dashboard in list(self.active):
            try:
                dashboard.close()
            except dashboard.failures as error:
                self._drop(dashboard, error)
        self.active = []

    def _drop(self, dashboard: Dashboard, error: Exception) -> None:
        self.active.remove(dashboard)
        _warn(
            f"{dashboard.name} failed ({_words(error)}): nothing more goes there in this run; training goes on, and all "
            "figures are in .metrics.jsonl"
        )


def open_dashboards(trainer: Trainer) -> Dashboards:
    """What --use_wandb and --use_tensorboard ask for."""
    options = trainer.options
    dashboards: list[Dashboard] = []
    if options.use_wandb and (wandb := _open_wandb(trainer)) is not None:
        dashboards.append(wandb)
    if options.use_tensorboard:
        dashboards.append(TensorBoard(trainer))
    return Dashboards(dashboards)


class Wandb:
    """A run at Weights & Biases. What it cannot upload stays in OUT_DIR/wandb, for `wandb sync`."""

    name = "wandb"

    def __init__(self, trainer: Trainer, mode: str) -> None:
        import wandb

        self.failures = _wandb_failures()
        options = trainer.options
        self.run = wandb.init(
            project=options.wandb_project,
            name=options.wandb_run_name or trainer.run.name,
            dir=options.out_dir,
            mode=mode,
            config=options.describe(),
            # A connection that is lost at the end must not keep the GPUs: whatever is left can be synced later.
            settings=wandb.Settings(finish_timeout=FINISH_SECONDS),
        )

    def log(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Scalars in OUT_DIR/tensorboard/<run>: tensorboard --logdir out/tensorboard."""

    name = "TensorBoard"
    failures = (OSError, RuntimeError, ValueError)

    def __init__(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only who asks for it pays

        self.folder = trainer.options.out_dir / "tensorboard" / trainer.run.name
        # After a resume, what was logged behind that step is not shown twice.
        self.writer = SummaryWriter(self.folder, purge_step=trainer.steps_done + 1)
        print(f"TensorBoard: tensorboard --logdir {self.folder.parent}")

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def _open_wandb(trainer: Trainer) -> Wandb | None:
    """Online where there is an account, else offline; offline as well if the server cannot be reached; None at worst."""
    import wandb

    folder = trainer.options.out_dir / "wandb"
    mode = os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if wandb.api.api_key else "offline"
        if mode == "offline":
            print(f"wandb: no account on this machine, logging offline to {folder}")
    try:
        return Wandb(trainer, mode)
    except _wandb_failures() as error:
        if mode == "online":
            _warn(
                f"wandb cannot be reached ({_words(error)}): logging offline to {folder}, upload it with `wandb sync`"
            )
            try:
                return Wandb(trainer, "offline")
            except _wandb_failures() as second:
                error = second
        _warn(f"wandb cannot be used ({_words(error)}): training without it")
        return None


def _wandb_failures() -> tuple[type[Exception], ...]:
    import wandb
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    ours = (OSError, RuntimeError, ValueError, TypeError, EOFError)  # TimeoutError and lost connections are OSErrors
    return (wandb.Error, WandbServiceConnectionError, HandleAbandonedError, MailboxClosedError, *ours)


def _words(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
