"""What a run tells about itself: a progress bar, one line every few steps, the same as JSONL, a plot, dashboards."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from tqdm import tqdm

from common.files import atomic_write
from trainer.distributed import all_reduce_sum
from trainer.loggers import Dashboards, open_dashboards

if TYPE_CHECKING:
    from trainer.trainer import Trainer

# Dense half-precision peak of one device in FLOP/s, from the makers' data sheets (no sparsity).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of the device in half precision; None where it is not known (CPUs, float32)."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def training_flops(n_tokens: float, attention_pairs: float, parameters: int, n_layers: int, dim: int) -> float:
    """FLOPs of forward and backward on real tokens (padding is not counted as work).

    6 per parameter and token (PaLM, https://arxiv.org/abs/2204.02311, appendix B), and for attention
    2 products * 2 FLOPs * dim * length^2 / 2 (causal) per layer and document, three times for forward and backward.
    """
    return 6 * parameters * n_tokens + 6 * n_layers * dim * attention_pairs


class MetricsLogger:
    """Collects what steps report and writes it; only the main process writes."""

    def __init__(self, trainer: Trainer) -> None:
        options, run = trainer.options, trainer.run
        self.trainer = trainer
        self.path: Path = options.out_dir / f"{run.name}.metrics.jsonl"
        self.image: Path = options.out_dir / f"{run.name}.png"
        self.total = trainer.total_steps
        self.peak = peak_flops(trainer.device, trainer.dtype)
        self.main = trainer.dist_env.is_main
        self._sums: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._fresh_validation = False
        self._bar = None
        self._dashboards = Dashboards([])

    def __enter__(self) -> MetricsLogger:
        if self.main:
            self._forget_lines_after(self.trainer.steps_done)
            self._dashboards = open_dashboards(self.trainer)
            self._bar = tqdm(
                total=self.total,
                initial=self.trainer.steps_done,
                unit="step",
                dynamic_ncols=True,
                disable=None,
                leave=False,
            )
        self._since = self._started = self._step_since = time.perf_counter()
        self._started_at = self.trainer.steps_done
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._dashboards.close()

    def add(self, result: dict[str, float]) -> None:
        """Take up the sums of one step."""
        for name, value in result.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._sums["steps"] = self._sums.get("steps", 0) + 1
        if self._bar is not None:
            self._bar.update()
        now = time.perf_counter()
        step = self.trainer.steps_done
        waited = self.trainer.clock.data_seconds
        self.trainer.log.write(f"step {step}: {now - self._step_since:.4f} s, of which {waited:.4f} s waiting for data")
        self._step_since = now

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here (validating, saving) does not count as training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start
        self._step_since = time.perf_counter()

    def validated(self, means: dict[str, float]) -> None:
        self._validation = means
        self._fresh_validation = True

    def log(self, step: int) -> dict[str, float]:
        """Write one line about the steps since the last one; returns its figures."""
        sums, self._sums = self._sums, {}
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        steps, n_targets = sums.pop("steps"), sums.pop("n_targets")
        tokens, pairs = sums.pop("n_tokens"), sums.pop("attention_pairs")
        # The learning rate and the gradient's norm belong to steps, everything else to targets.
        skipped = sums.pop("skipped_steps")
        line: dict = {"step": step, "lr": sums.pop("lr") / steps}
        line["grad_norm"] = sums.pop("grad_norm") / max(steps - skipped, 1)
        if skipped:
            line["skipped_steps"] = int(skipped)
        line |= {name: value / n_targets for name, value in sums.items()}
        if self._fresh_validation:
            line |= {name if name == "bits_per_byte" else f"val_{name}": v for name, v in self._validation.items()}
        line["tokens"] = self.trainer.tokens_done
        line["tokens_per_second"] = tokens / seconds
        line["tokens_per_second_per_process"] = tokens / seconds / self.trainer.dist_env.size
        if self.peak and self.trainer.run.active_parameters:
            config = self.trainer.run.config
            flops = training_flops(tokens, pairs, self.trainer.run.active_parameters, config.n_layers, config.dim)
            line["mfu"] = flops / seconds / self.peak / self.trainer.dist_env.size
        line |= self._skew(steps)
        line["memory_gb"] = _memory_gb(self.trainer.device)
        done = step - self._started_at
        line["eta_seconds"] = (now - self._started) / done * (self.total - step)
        if self.main:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write(self._words(line))
            self._dashboards.log({name: v for name, v in line.items() if name != "step"}, step)
        self._fresh_validation = False
        return line

    def _skew(self, steps: float) -> dict[str, float]:
        """How much longer the slowest process works on a step than the mean of all, before they meet (1: even)."""
        dist_env = self.trainer.dist_env
        mine = self.trainer.clock.take()
        if dist_env.size == 1:
            self.trainer.log.write(f"the last {int(steps)} steps: {mine:.4f} s of work")
            return {}
        each = all_reduce_sum(
            dist_env, [mine * (rank == dist_env.rank) for rank in range(dist_env.size)], self.trainer.device
        )
        mean = sum(each) / dist_env.size
        skew = max(each) / mean if mean else 1.0
        slowest = each.index(max(each))
        self.trainer.log.write(
            f"the last {int(steps)} steps: {mine:.4f} s of work here, {mean:.4f} s in the mean, {max(each):.4f} s on rank "
            f"{slowest}, the slowest"
        )
        return {"skew": skew, "slowest_rank": slowest}

    def _words(self, line: dict) -> str:
        step = line["step"]
        parts = [f"step {step}/{self.total} {100 * step // self.total}%", f"loss {line['loss']:.4f}"]
        if self._validation:
            # The newest there is; a star marks one of this very step.
            star = "*" if self._fresh_validation else ""
            parts.append(f"val {self._validation['loss']:.4f}{star}")
            if "bits_per_byte" in self._validation:
                parts.append(f"bpb {self._validation['bits_per_byte']:.4f}")
        known = {
            "step",
            "loss",
            "lr",
            "grad_norm",
            "tokens",
            "tokens_per_second",
            "tokens_per_second_per_process",
            "mfu",
        }
        known |= {"skew", "slowest_rank", "memory_gb", "eta_seconds"}
        parts += [
            f"{name} {value:.4f}"
            for name, value in line.items()
            if name not in known and not name.startswith("val_") and name != "bits_per_byte"
        ]
        parts += [f"lr {line['lr']:.2e}", f"grad {line['grad_norm']:.2f}", f"{line['tokens_per_second']:,.0f} tok/s"]
        if self.trainer.dist_env.size > 1:
            each = "GPU" if self.trainer.device.type == "cuda" else "process"
            parts[-1] += f" ({line['tokens_per_second_per_process']:,.0f} per {each})"
            parts.append(f"skew {line['skew']:.2f} (rank {line['slowest_rank']})")
        parts.append(f"mfu {line['mfu']:.1%}" if "mfu" in line else "mfu n/a")
        minutes, seconds = divmod(round(line["eta_seconds"]), 60)
        parts += [f"mem {line['memory_gb']:.1f} GB", f"eta {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"]
        return " | ".join(parts)

    def plot(self) -> None:
        """Draw the loss so far as PNG."""
        if not self.main:
            return
        lines = read_metrics(self.path)
        if not lines:
            return
        plot_losses(lines, self.image, title=self.trainer.run.name)

    def _forget_lines_after(self, step: int) -> None:
        """Steps that are going to be done again must not be in the file twice."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; a last line cut off by a killed process is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot_losses(lines: Iterable[dict], image: Path, title: str) -> None:
    """Training and validation loss (nats per token) over optimizer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no window
    from matplotlib.figure import Figure

    lines = list(lines)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.plot([x["step"] for x in lines], [x["loss"] for x in lines], label="training")
    validated = [x for x in lines if "val_loss" in x]
    if validated:
        axes.plot([x["step"] for x in validated], [x["val_loss"] for x in validated], "o-", label="validation")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(image, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def _memory_gb(device: torch.device) -> float:
    """Peak memory of the accelerator, or the memory this process uses now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    return psutil.Process().memory_info().rss / 1e9
