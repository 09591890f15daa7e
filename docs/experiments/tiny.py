"""What the experiments of the textbook share: the sample data, a tiny model, a short training loop, and plots.

The loop is `trainer.trainer.Trainer.step` without everything that long runs need: it shows an effect in seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import flag
from common.files import ROOT, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from data_pipeline.datasets import PackedRows
    from model.model import Transformer

SAMPLE = ROOT / "dataset" / "sample"
OUT = ROOT / "out" / "experiments"
TEXTS, CHATS = "mobvoi_seq_monkey_general_open_corpus.jsonl", "sft_data_zh.jsonl"
SHAPE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128)


@dataclass
class ExperimentOptions:
    """The flag of every experiment."""

    output: Path | None = flag(None, "file of the plot, .svg or .png (default: out/experiments/<script>.svg)")


def quiet(*_: object) -> None:
    """Print nothing: for what reports to the user elsewhere."""


@functools.cache
def tokenizer() -> Any:
    from model.tokenizer import load_tokenizer

    return load_tokenizer()


@functools.cache
def text_rows(seq_len: int = 128) -> tuple[PackedRows, PackedRows]:
    """Return (training, validation) rows of the sample texts, packed as in pretraining."""
    from data_pipeline.tokenize import tokenize_pretrain_data

    return _split(tokenize_pretrain_data([SAMPLE / TEXTS], tokenizer(), OUT / "cache"), seq_len, 0.05)


@functools.cache
def chat_rows(name: str = CHATS, seq_len: int = 128, val_fraction: float = 0.05) -> tuple[PackedRows, PackedRows]:
    """Return (training, validation) rows of dialogues of the sample data, packed and masked as in SFT."""
    from data_pipeline.tokenize_chats import tokenize_chat_data

    data = tokenize_chat_data([SAMPLE / name], tokenizer(), OUT / "cache", max_tokens=seq_len)
    return _split(data, seq_len, val_fraction)


def _split(dataset: Any, seq_len: int, val_fraction: float) -> tuple[PackedRows, PackedRows]:
    from data_pipeline.datasets import PackedRows

    train, val = dataset.split(val_fraction)
    return PackedRows(dataset, train, seq_len, seed=0), PackedRows(dataset, val, seq_len, seed=0)


def new_model(seed: int = 0, **fields: Any) -> Transformer:
    """Return a model with random weights and the shape `SHAPE`, single fields replaced."""
    import torch

    from model.LMConfig import LMConfig
    from model.model import Transformer

    torch.manual_seed(seed)
    return Transformer(LMConfig(**(SHAPE | fields))).train()


def train(
    model: Any,
    rows: Any,
    steps: int,
    peak: float = 5e-3,
    *,
    optimizer: str = "adamw",
    batch_size: int = 8,
    warmup: int = 10,
    floor: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
    loss_fn: Callable | None = None,
    change: Callable[[Any], Any] = lambda batch: batch,
    each_step: Callable[[int], object] = quiet,
) -> list[dict[str, float]]:
    """Train `model`; return for each step its losses per target, as the loss function logs them, and `grad_norm`.

    Args:
        rows: a data set of `data_pipeline`.
        peak, warmup, floor: of the learning rate, see `trainer.optim.get_lr`.
        change: changes a batch before the model gets it.
        each_step: called with the number of steps done.
    """
    from data_pipeline.datasets import Schedule
    from trainer.losses import next_token_loss
    from trainer.optim import clip_gradients, get_lr, gradient_norm, make_optimizers

    loss_fn = loss_fn or next_token_loss
    optimizers = make_optimizers(model, optimizer, weight_decay=0.1)
    schedule = Schedule(len(rows), batch_size, steps * batch_size, seed)
    history = []
    for step in range(steps):
        batch = change(rows.batch(schedule.samples(step)))
        loss_sum, n_targets, logged = loss_fn(model, batch)
        (loss_sum / n_targets).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = float(gradient_norm(gradients))
        clip_gradients(gradients, norm, clip)
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = get_lr(step, steps, peak, warmup, floor)
            one.step()
            one.zero_grad()
        history.append({name: float(value) / n_targets for name, value in logged.items()} | {"grad_norm": norm})
        each_step(step + 1)
    return history


def losses(history: Sequence[dict[str, float]], window: int = 5) -> list[float]:
    """Return the training loss of each step, averaged over the last `window` steps."""
    values = [line["loss"] for line in history]
    return [sum(values[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def evaluate(model: Any, rows: Any, loss_fn: Callable | None = None, n_rows: int = 64) -> float:
    """Return the mean loss per target of the first `n_rows` rows."""
    import torch

    from trainer.losses import next_token_loss

    was_training = model.training
    model.eval()
    with torch.no_grad():
        _, n_targets, logged = (loss_fn or next_token_loss)(model, rows.batch(range(min(n_rows, len(rows)))))
    model.train(was_training)
    return float(logged["loss"]) / n_targets


def chat_model(steps: int = 150, seq_len: int = 128, **fields: Any) -> Transformer:
    """Return a tiny model that has learned the sample dialogues a little."""
    model = new_model(**fields)
    train(model, chat_rows(seq_len=seq_len)[0], steps, 8e-3, optimizer="muon")
    return model


def plot(path: Path | None, script: str, draw: Callable[..., None], n_plots: int = 1) -> None:
    """Draw and write a figure of `n_plots` plots side by side: the same bytes for the same data.

    draw: gets the axes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no window
    from matplotlib.figure import Figure

    path = path or OUT / f"{Path(script).stem}.svg"
    kind = path.suffix.removeprefix(".") or "svg"
    settings = {
        "svg.hashsalt": "minimind",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6 * n_plots + 1.4 * (n_plots == 1), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes: list[Axes] = list(figure.subplots(1, n_plots, squeeze=False)[0])
        draw(*axes)
        for one in axes:
            one.grid(alpha=0.25)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    print(f"wrote {path}")


def table(header: str, rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown. `header`: names of the columns, separated by commas."""
    names = [name.strip() for name in header.split(",")]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
