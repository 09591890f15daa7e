"""Draw four training curves: a healthy one, two with wrong learning rates, one whose model ignores the context.

    python docs/experiments/loss_curve.py

Two lines help to read them: ln(vocabulary), the loss of a model that knows nothing, and the entropy of the single tokens,
the best loss without looking at the tokens before.

docs/loss_curve.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(120, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import numpy as np

    rows, val = tiny.text_rows()

    def shuffle_targets(batch):
        """Give the targets to the wrong positions: which tokens there are stays true, where they stand does not."""
        labels = batch.inputs["labels"]
        targets = labels[labels != -100].numpy()
        labels[labels != -100] = labels.new_tensor(np.random.default_rng(0).permutation(targets))
        return batch

    runs = {
        "healthy: 5e-3": {"peak": 5e-3},
        "rate too low: 1e-4": {"peak": 1e-4},
        "rate too high: 0.3": {"peak": 0.3},
        "targets shuffled": {"peak": 5e-3, "change": shuffle_targets},
    }
    curves, results = {}, []
    for name, settings in runs.items():
        model = tiny.new_model()
        history = tiny.train(model, rows, options.steps, **settings)
        curves[name] = tiny.losses(history)
        norms = [line["grad_norm"] for line in history]
        results.append((name, history[0]["loss"], curves[name][-1], tiny.evaluate(model, val), max(norms), norms[-1]))
    tiny.table("run, first loss, last loss, validation, largest gradient norm, last gradient norm", results)

    chance = math.log(model.config.vocab_size)
    counts = np.bincount(np.asarray(rows.dataset.tokens))
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    print(f"ln(vocabulary) {chance:.3f}; entropy of single tokens {entropy:.3f}")

    def draw(axes) -> None:
        for name, curve in curves.items():
            axes.plot(range(1, len(curve) + 1), curve, label=name)
        axes.axhline(chance, color="grey", linestyle=":")
        axes.text(options.steps, chance, f"ln(vocabulary) = {chance:.2f}", ha="right", va="bottom", color="grey")
        axes.axhline(entropy, color="grey", linestyle="--")
        axes.text(options.steps, entropy, f"single tokens: {entropy:.2f}", ha="right", va="bottom", color="grey")
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(0, 1.3 * chance))
        axes.legend(frameon=False, loc="lower left")

    tiny.plot(options.output, __file__, draw)


if __name__ == "__main__":
    run_script(main)
