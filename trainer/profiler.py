"""--profile N: what a few steps do, as a trace to look at in chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from trainer.distributed import DistEnv

SKIPPED_STEPS = 2  # at the start: they allocate and compile
WARM_UP_STEPS = 1  # the profiler itself is slow in its first step


class Profiler:
    """Records `n_steps` optimizer steps of this process after a short warm-up; with 0 it does nothing.

    Each process writes its own file, beside the checkpoints; rank 0 says where.
    """

    def __init__(self, n_steps: int, out_dir: Path, name: str, dist_env: DistEnv, device: torch.device) -> None:
        self.n_steps, self.dist_env = n_steps, dist_env
        self.path = out_dir / f"{name}.rank{dist_env.rank}.trace.json"
        self._steps = 0
        self._profile: profile | None = None
        if n_steps:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
            self._profile = profile(
                activities=activities,
                schedule=schedule(skip_first=SKIPPED_STEPS, wait=0, warmup=WARM_UP_STEPS, active=n_steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )

    def __enter__(self) -> Profiler:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(self, *_) -> None:
        """A run that ends before all is recorded writes what there is."""
        if self._profile is None:
            return
        self._profile.stop()  # writes
        self._profile = None

    def step(self) -> None:
        """One more optimizer step is done."""
        if self._profile is None:
            return
        self._steps += 1
        self._profile.step()
        if self._steps == SKIPPED_STEPS + WARM_UP_STEPS + self.n_steps:  # written: nothing more to pay for
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: profile) -> None:
        n = self._steps - SKIPPED_STEPS - WARM_UP_STEPS
        if n < 1:
            print(f"--profile: no trace, the run had {self._steps} steps, and the first {self._steps - n} are warm-up")
            return
        try:
            recorded.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            print(f"WARNING: --profile could not write {self.path} ({error})", file=sys.stderr)
            return
        others = f" (and one file for each of the {self.dist_env.size} processes)" if self.dist_env.size > 1 else ""
        print(
            f"--profile: a trace of {n} steps is in {self.path}{others}; open it in ui.perfetto.dev or chrome://tracing"
        )
