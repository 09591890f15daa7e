"""Metrics of a run: a progress bar, one line every few steps, the same as JSONL, a plot, loggers; timers and a profiler."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonlines
import psutil
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from common.files import atomic_write
from evaluation.runs import SUFFIX, curve, logged_shares, read_metrics
from model.device import peak_flops
from model.LMConfig import LMConfig
from model.model import training_flops
from trainer.distributed import DistEnv, all_reduce_sum
from trainer.loggers import Loggers, RankLog, open_loggers
from trainer.options import TrainOptions
from trainer.report import write_report

# Parts of the terminal's line that have a form of their own; anything else a loss reports is shown by its name.
FORMATTED = {
    "step", "loss", "bits_per_byte", "lr", "grad_norm", "tokens", "tokens_per_second", "tokens_per_second_per_process",
    "mfu", "skew", "slowest_rank", "memory_gb", "eta_seconds", "rollout_tokens_per_second", "training_tokens_per_second",
}  # fmt: skip


@dataclass
class MetricsLogger:
    """Collect the sums of each step and report them; only rank 0 prints and writes.

    Attributes:
        name: of the run.
        config: of the model.
        active_parameters: those that a token passes through, for the MFU; None if some are frozen: these need fewer FLOPs.
        first_step: steps before this process started (a resumed run).
        timer, rank_log: those of this process.
    """

    options: TrainOptions
    name: str
    dist_env: DistEnv
    config: LMConfig
    active_parameters: int | None
    device: torch.device
    dtype: torch.dtype
    total_steps: int
    first_step: int
    timer: StepTimer
    rank_log: RankLog

    def __post_init__(self) -> None:
        self.path: Path = self.options.out_dir / f"{self.name}{SUFFIX}"
        self.samples_path: Path = self.options.out_dir / f"{self.name}.samples.jsonl"
        # Read now: this run may replace one of them.
        self.others = [(f"{path.parent.name}/{path.name}", read_metrics(path)) for path in self.options.compare]
        self.peak = peak_flops(self.device, self.dtype)
        self._sums: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._validated_now = False
        self._waited = 0.0  # seconds for data since the last line
        self._written = self._writing = 0.0  # tokens of answers, and seconds for them, since their speed was logged
        self._plotted = -math.inf
        self._bar: tqdm | None = None
        self._loggers = Loggers([])
        if self.dist_env.is_main and self.first_step < self.total_steps:
            print(self._plan(), flush=True)  # a first step can take minutes, and nothing else is printed before its end

    def _plan(self) -> str:
        """Return what is known before the first step; its duration is not."""
        options, size = self.options, self.dist_env.size
        rows = options.batch_size * options.accumulation_steps * size
        scale = options.embedding_lr_scale
        text = f"{options.optimizer}, learning rate {options.learning_rate:g}"
        text += "; " if scale == 1 else f" ({options.learning_rate * scale:g} for the embedding); "
        text += f"steps to do: {self.total_steps - self.first_step:,}; rows in each: {rows:,}"
        if rows > options.batch_size:
            text += f", {options.batch_size:,} at once" + (f" in each of {size} processes" if size > 1 else "")
        if options.compile:
            text += "; --compile takes about a minute before the first"
        text += f"; the log begins after step {self.first_step + 1}"
        return text

    def __enter__(self) -> MetricsLogger:
        if self.dist_env.is_main:
            self._delete_lines_after(self.first_step)
            self._loggers = open_loggers(self.options, self.name, self.first_step)
            self._bar = tqdm(
                total=self.total_steps,
                initial=self.first_step,
                unit="step",
                dynamic_ncols=True,
                disable=None,
                leave=False,
            )
        self._since = self._step_since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bar and the loggers; the metrics file is complete after every line."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._loggers.close()

    def add(self, step: int, sums: dict[str, float]) -> None:
        """Add the sums of one step; `step` is the number of steps done."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._sums["steps"] = self._sums.get("steps", 0) + 1
        if self._bar is not None:
            self._bar.update()
        now = time.perf_counter()
        if step == self.first_step + 1:
            self._first_step_done = now
        waited = self.timer.data_seconds
        self._waited += waited
        self.rank_log.write(f"step {step}: {now - self._step_since:.4f} s, of which {waited:.4f} s waiting for data")
        self._step_since = now

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time of the block (validating, saving) as training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start
        self._step_since = time.perf_counter()

    def add_validation(self, means: dict[str, float]) -> None:
        """Take the means of a validation, for the next line."""
        self._validation = means
        self._validated_now = True

    def log(self, step: int, tokens_done: int) -> dict[str, float]:
        """Report the steps since the last call; return their metrics."""
        sums, self._sums = self._sums, {}
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        steps, n_targets = sums.pop("steps"), sums.pop("n_targets")
        tokens, pairs = sums.pop("n_tokens"), sums.pop("attention_pairs")
        # The learning rate and the gradient's norm are means over steps; for everything else see `means_of`.
        skipped = sums.pop("skipped_steps")
        line: dict[str, float] = {"step": step, "lr": sums.pop("lr") / steps}
        line["grad_norm"] = sums.pop("grad_norm") / max(steps - skipped, 1)
        if skipped:
            line["skipped_steps"] = int(skipped)
        n_rollouts, waited, self._waited = sums.get("n_answers", 0.0), self._waited, 0.0
        line |= means_of(sums, n_targets)
        if self._validated_now:
            line |= {name if name == "bits_per_byte" else f"val_{name}": v for name, v in self._validation.items()}
        line["tokens"] = tokens_done
        line["tokens_per_second"] = tokens / seconds
        line["tokens_per_second_per_process"] = tokens / seconds / self.dist_env.size
        if n_rollouts:  # the model writes the batches, those of several steps at once, and the loop waits for them
            self._written += n_rollouts * line["answer_length"]
            self._writing += waited
            if step % getattr(self.options, "steps_per_generation", 1) == 0 or step == self.total_steps:
                line["rollout_tokens_per_second"] = self._written / self._writing
                line["training_tokens_per_second"] = tokens / max(seconds - waited, 1e-9)
                self._written = self._writing = 0.0
        if self.peak and self.active_parameters is not None:
            flops = training_flops(self.config, self.active_parameters, tokens, pairs)
            line["mfu"] = flops / seconds / self.peak / self.dist_env.size
        line |= self._skew()
        line["memory_gb"] = _memory_gb(self.device)
        # The first step also allocates and compiles: it says how long the others take only where that hardly counts.
        if step > self.first_step + 1:
            step_seconds = (now - self._first_step_done) / (step - self.first_step - 1)
            line["eta_seconds"] = step_seconds * (self.total_steps - step)
        elif seconds > 10 and not self.options.compile:
            line["eta_seconds"] = seconds * (self.total_steps - step)
        if self.dist_env.is_main:
            with jsonlines.open(self.path, "a") as writer:
                writer.write(line)
            tqdm.write(self._format(line))
            self._loggers.log({name: value for name, value in line.items() if name != "step"}, step)
        self._validated_now = False
        return line

    def _skew(self) -> dict[str, float]:
        """Compare the processes: the slowest one's seconds of work in a step, divided by the mean of all (1: equal)."""
        mine, size = self.timer.take(), self.dist_env.size
        if size == 1:
            return {}
        each = all_reduce_sum(self.dist_env, [mine * (rank == self.dist_env.rank) for rank in range(size)], self.device)
        mean = sum(each) / size
        return {"skew": max(each) / mean if mean else 1.0, "slowest_rank": each.index(max(each))}

    def _format(self, line: dict[str, float]) -> str:
        step = int(line["step"])
        parts = [f"step {step}/{self.total_steps} {100 * step // self.total_steps}%", f"loss {line['loss']:.4f}"]
        if self._validation:  # the newest; a star marks one of this very step
            parts.append(f"val {self._validation[headline(line)]:.4f}{'*' if self._validated_now else ''}")
            if "bits_per_byte" in self._validation:
                parts.append(f"bpb {self._validation['bits_per_byte']:.4f}")
        parts += [
            f"{name} {value:.4f}"
            for name, value in line.items()
            if name not in FORMATTED and not name.startswith(("val_", "expert_"))
        ]
        if shares := logged_shares(line):
            parts.append(f"experts {min(shares):.0%}-{max(shares):.0%}, busiest {line['expert_max_load']:.2f}x")
        parts += [f"lr {line['lr']:.2e}", f"grad {line['grad_norm']:.2f}", f"{line['tokens_per_second']:,.0f} tok/s"]
        if "rollout_tokens_per_second" in line:
            parts[-1] += f" (rollouts {line['rollout_tokens_per_second']:,.0f}, training "
            parts[-1] += f"{line['training_tokens_per_second']:,.0f})"
        if self.dist_env.size > 1:
            each = "GPU" if self.device.type == "cuda" else "process"
            parts[-1] += f" ({line['tokens_per_second_per_process']:,.0f} per {each})"
            parts.append(f"skew {line['skew']:.2f} (rank {int(line['slowest_rank'])})")
        parts += [f"mfu {line['mfu']:.1%}"] if "mfu" in line else []
        parts.append(f"mem {line['memory_gb']:.1f} GB")
        if "eta_seconds" in line:
            minutes, seconds = divmod(round(line["eta_seconds"]), 60)
            parts.append(f"eta {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
        return " | ".join(parts)

    def add_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Print what the model wrote after `step` steps, and keep it for the report."""
        with jsonlines.open(self.samples_path, "a") as writer:
            writer.write_all({"step": step} | sample for sample in samples)
        tqdm.write(f"written after step {step}:")
        for sample in samples:
            tqdm.write(f"  {sample['prompt']} → {' '.join(sample['text'].split())}")

    def report(self, info: dict, last: bool) -> None:
        """Write OUT_DIR/<run>.png and .report.html of the run so far: `last`, or if the last are older than ten seconds.

        info: the description beside the weights.
        """
        now = time.perf_counter()
        if (last or now - self._plotted > 10) and (lines := read_metrics(self.path)):
            self._plotted = now
            plot = self.options.out_dir / f"{self.name}.png"
            plot_losses(lines, plot, title=self.name, others=self.others)
            size = self.dist_env.size
            launcher = ["python"] if size == 1 else ["torchrun", "--nproc_per_node", str(size)]
            command = shlex.join([*launcher, Path(sys.argv[0]).name, *self.options.flags()])
            facts = {"config": self.config.own_fields()} | info
            samples = read_metrics(self.samples_path)
            write_report(plot.with_suffix(".report.html"), self.name, command, facts, lines, samples, plot)

    def _delete_lines_after(self, step: int) -> None:
        """Delete the lines of steps that are repeated after a resume; they are kept aside until `forget_old_lines`."""
        for path, old in self._files_and_copies():
            if old.exists():  # the start before has saved nothing
                os.replace(old, path)
            if path.exists():
                lines = read_metrics(path)
                kept = [line for line in lines if line["step"] <= step]
                if len(kept) < len(lines):
                    os.replace(path, old)
                with atomic_write(path) as file:
                    jsonlines.Writer(file).write_all(kept)

    def forget_old_lines(self) -> None:
        """Delete for good what an earlier run wrote: this one has saved a state."""
        for _, old in self._files_and_copies():
            old.unlink(missing_ok=True)

    def _files_and_copies(self) -> list[tuple[Path, Path]]:
        return [(path, path.with_name(f".{path.name}.old")) for path in (self.path, self.samples_path)]


def means_of(sums: dict[str, float], n_targets: float) -> dict[str, float]:
    """Return means of what a loss function logs: over targets, or all but the loss over answers if it counts those, too."""
    n = sums.get("n_answers", n_targets)
    return {name: value / (n_targets if name == "loss" else n) for name, value in sums.items() if name != "n_answers"}


def headline(line: dict) -> str:
    """Return the name of the metric that a run is about: the reward if there is one, or else the loss."""
    return "reward" if "reward" in line else "loss"


def plot_losses(lines: list[dict], image: Path, title: str, others: Sequence[tuple[str, list[dict]]]) -> None:
    """Draw the loss (nats per token) or the reward of training and validation; and for a mixture, who got the tokens.

    others: names and lines of other runs, to draw with this one: over the tokens seen, since their steps may be of
        another size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no window
    from matplotlib.figure import Figure

    name = headline(lines[0])
    shared = [(x["step"], shares) for x in lines if (shares := logged_shares(x))]
    n_plots = 2 if shared else 1
    figure = Figure(figsize=(7, 4 * n_plots), layout="constrained")
    ylabel = {"loss": "loss (nats per token)", "reward": "mean reward"}[name]
    over, xlabel = ("tokens", "tokens seen") if others else ("step", "optimizer step")
    axes = figure.add_subplot(n_plots, 1, 1, xlabel=xlabel, ylabel=ylabel, title=title)
    for run, found in [("", lines), *others]:
        for metric, style, label in ((name, "-", "training"), (f"val_{name}", "o-", "validation")):
            if points := curve(found, metric, over, points=1000):
                axes.plot(*zip(*points, strict=True), style, label=f"{run} {label}".lstrip(), alpha=0.5 if run else 1)
    axes.grid(alpha=0.3)
    axes.legend()
    if shared:
        axes = figure.add_subplot(n_plots, 1, 2, xlabel="optimizer step", ylabel="share of the tokens of each expert")
        axes.plot([step for step, _ in shared], [shares for _, shares in shared])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    with atomic_write(image, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def _memory_gb(device: torch.device) -> float:
    """Return the peak memory of a CUDA device, or the memory in use now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    return psutil.Process().memory_info().rss / 1e9


class StepTimer:
    """Measure the work of this process: waiting for its data, forward and backward, up to where all processes meet.

    Processes that train together end every step at the same time, that of the slowest. Their work before that shows which
    one it is. On CUDA, events measure without stopping the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.data_seconds = 0.0  # of the last step
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the block as waiting for data."""
        start = time.perf_counter()
        yield
        self.data_seconds = time.perf_counter() - start
        self._seconds += self.data_seconds

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Measure the block as computation of this process."""
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
        """Return the seconds of work since the last call. On CUDA the caller has synchronised with the device."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


# Parts of a step: the first counts whose pattern fits an operator's name or that of an operator which called it.
PARTS = {
    "optimizer": re.compile(r"Optimizer\.step#"),
    "attention": re.compile(r"attention|varlen|flash", re.IGNORECASE),
    "softmax and loss": re.compile(r"log_?softmax|nll_?loss|cross_?entropy", re.IGNORECASE),
    "matrix products": re.compile(r"aten::\w*mm$"),
}


def time_table(recorded: profile, device: torch.device) -> str:
    """Return where the time of the recorded steps went: a line for each of `PARTS` and for the rest, longest first.

    On CUDA the time of its kernels: of when it was idle nothing is known. What `torch.compile` fused counts as the rest.
    """
    seconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in recorded.events() or ():
        if event.device_type != DeviceType.CPU:  # a kernel: its time is that of the operator that launched it
            continue
        names, caller = [], event
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        part = next((part for part, pattern in PARTS.items() if any(map(pattern.search, names))), "the rest")
        seconds[part] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(seconds.values()) or 1.0
    rows = sorted(seconds.items(), key=lambda row: row[1], reverse=True)
    return "\n".join(f"  {part:<16}{value / total:6.1%}" for part, value in rows)


SKIPPED = 2  # steps that --profile does not record: the first ones allocate and compile,
WARM_UP = 1  # and the profiler itself is slow in its first step


def make_profiler(n_steps: int, path: Path, dist_env: DistEnv, device: torch.device) -> profile:
    """Return a profiler that records `n_steps` optimizer steps of this process as a Chrome trace in `path`.

    If the run ends before, it writes the trace so far.
    """

    def write(recorded: profile) -> None:
        steps, warm_up = recorded.step_num, SKIPPED + WARM_UP
        if steps <= warm_up:
            print(f"--profile: no trace, the run had {steps} steps, and the first {warm_up} are warm-up")
            return
        if dist_env.is_main and device.type != "mps":  # whose operators only wait for each other
            print(f"--profile: where the time of {steps - warm_up} steps went\n{time_table(recorded, device)}")
        try:
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            print(f"WARNING: --profile could not write {path} ({error})", file=sys.stderr)
            return
        others = f" (and one file for each of the {dist_env.size} processes)" if dist_env.size > 1 else ""
        print(
            f"--profile: a trace of {steps - warm_up} steps is in {path}{others}; open it in ui.perfetto.dev or chrome://tracing"
        )

    return profile(
        activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else []),
        schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=n_steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
    )
