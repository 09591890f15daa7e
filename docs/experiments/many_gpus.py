"""Split a step over 1 to 16 processes in two ways, compare the gradients, and compute what each process has to hold.

    python docs/experiments/many_gpus.py

One process plays them all: it computes the gradients of the parts one after another and adds them up, as an all-reduce does.

docs/many_gpus.md explains what it shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

SIZES = (1, 2, 4, 8, 16)


def main() -> None:
    options = parse_options(tiny.ExperimentOptions, __doc__)
    import torch

    from model.LMConfig import preset
    from model.model import Transformer, parameter_counts
    from trainer.losses import next_token_loss

    rows, _ = tiny.chat_rows()
    samples = list(range(0, len(rows), len(rows) // 16))[:16]
    model = tiny.new_model()

    def gradient(parts, weights) -> torch.Tensor:
        """Return the sum of the parts' gradients, each of its summed loss times a weight."""
        model.zero_grad()
        for part, weight in zip(parts, weights, strict=True):
            (next_token_loss(model, part)[0] * weight).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    whole = rows.batch(samples)
    reference = gradient([whole], [1 / whole.n_targets])
    results = []
    for n in SIZES:
        parts = [rows.batch(samples[rank::n]) for rank in range(n)]
        ours = gradient(parts, [1 / whole.n_targets] * n)
        means = gradient(parts, [1 / (n * part.n_targets) for part in parts])
        results.append((n, *(float((found - reference).norm() / reference.norm()) for found in (ours, means))))
    header = "processes, difference of the gradient: sum / targets of the step, mean of the processes' means"
    tiny.table(header, [(n, f"{ours:.1e}", f"{means:.1e}") for n, ours, means in results])

    with torch.device("meta"):
        n_parameters = parameter_counts(Transformer(preset("minimind-v1")))["total"]
    kinds = {  # bytes of a parameter that every process holds, and those that are shared out
        "data parallel": (16, 0),
        "ZeRO-1": (8, 8),
        "ZeRO-2": (4, 12),
        "ZeRO-3, FSDP": (0, 16),
    }
    memory = {name: [(held + shared / n) * n_parameters / 1e9 for n in SIZES] for name, (held, shared) in kinds.items()}
    tiny.table(
        f"GB for each of n processes, {', '.join(f'n = {n}' for n in SIZES)}",
        [(name, *(f"{value:.2f}" for value in values)) for name, values in memory.items()],
    )

    def draw(differences, held) -> None:
        for column, name in ((1, "sum / targets of the step"), (2, "mean of the means")):
            differences.plot(SIZES[1:], [row[column] for row in results[1:]], "o-", label=name)
        differences.set(xlabel="processes", ylabel="relative difference of the gradient", xscale="log", yscale="log")
        for name, values in memory.items():
            held.plot(SIZES, values, "o-", label=name)
        held.set(xlabel="processes", ylabel="GB in each: weights, gradient, AdamW", xscale="log", ylim=(0, None))
        for axes in (differences, held):
            axes.set_xticks(SIZES, map(str, SIZES))
            axes.minorticks_off()
            axes.legend(frameon=False)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
