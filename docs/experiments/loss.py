"""Compare two ways to average a loss over micro-batches: per target token, and the mean of the means.

    python docs/experiments/loss.py

Eight dialogues go through the model one at a time, as with --accumulation_steps 8. The gradients of both ways are compared
with that of one batch of all eight.

docs/loss.md explains what it shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402


def main() -> None:
    options = parse_options(tiny.ExperimentOptions, __doc__)
    import numpy as np
    import torch

    from data_pipeline.datasets import PackedRows
    from trainer.losses import next_token_loss

    dataset = tiny.chat_rows()[0].dataset
    n_answer = np.add.reduceat(np.asarray(dataset.loss_mask, np.int64), np.asarray(dataset.offsets[:-1]))
    by_length = np.argsort(n_answer, kind="stable")
    chosen = by_length[np.linspace(0, len(by_length) - 1, 8).astype(int)]  # from the shortest answer to the longest
    dialogues = [PackedRows(dataset, np.array([i]), 128, seed=0).batch([0]) for i in chosen]
    together = PackedRows(dataset, chosen, 128, seed=0)
    model = tiny.new_model()

    def gradient(batches, weights) -> torch.Tensor:
        """Return the gradient of the weighted sum of the batches' losses, as one vector."""
        model.zero_grad()
        for batch, weight in zip(batches, weights, strict=True):
            (next_token_loss(model, batch)[0] * weight).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    n_targets = [batch.n_targets for batch in dialogues]
    total = sum(n_targets)
    reference = gradient([together.batch(range(len(together)))], [1 / total])
    ways = {
        "sum / targets of the step": [1 / total] * 8,
        "mean of the means": [1 / (8 * n) for n in n_targets],
    }
    results = []
    for name, weights in ways.items():
        found = gradient(dialogues, weights)
        cosine = float(torch.cosine_similarity(found, reference, dim=0))
        results.append((name, f"{float((found - reference).norm() / reference.norm()):.1e}", f"{cosine:.4f}"))
    tiny.table("loss of a step, difference of the gradient, cosine", results)

    def draw(axes) -> None:
        x = np.arange(8)
        for i, (name, weights) in enumerate(ways.items()):
            axes.bar(x + 0.4 * i - 0.2, np.array(weights) * total, 0.4, label=name)
        axes.set_xticks(x, map(str, n_targets))
        axes.set(xlabel="target tokens of the dialogue", ylabel="weight of each of its tokens", yscale="log")
        axes.set_yticks([0.25, 0.5, 1, 2, 5], ["1/4", "1/2", "1", "2", "5"])
        axes.minorticks_off()
        axes.legend(frameon=False)

    tiny.plot(options.output, __file__, draw)


if __name__ == "__main__":
    run_script(main)
