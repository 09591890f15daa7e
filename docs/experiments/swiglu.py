"""Compare SwiGLU with a ReLU and a GELU feed-forward of as many parameters, for two sizes of the initial weights.

    python docs/experiments/swiglu.py

docs/swiglu.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

SEEDS = 2
INITIAL = (0.02, 0.1)  # standard deviation of the initial weights


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(50, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import torch
    import torch.nn.functional as F

    from model.moe import residual_projection

    rows, val = tiny.text_rows()

    class Plain(torch.nn.Module):
        """w2(f(w1 x)), with half as many more hidden units as SwiGLU: two matrices instead of three."""

        def __init__(self, dim: int, hidden_dim: int, activation) -> None:
            super().__init__()
            self.w1 = torch.nn.Linear(dim, hidden_dim, bias=False)
            self.w2 = residual_projection(hidden_dim, dim)
            self.activation = activation

        def forward(self, x):
            return self.w2(self.activation(self.w1(x)))

    kinds = {"SwiGLU": None, "GELU": F.gelu, "ReLU": F.relu}
    curves, results = {}, []
    for std, (name, activation) in itertools.product(INITIAL, kinds.items()):
        found, histories = [], []
        for seed in range(SEEDS):
            model = tiny.new_model(seed=seed, hidden_dim=128, initializer_range=std)
            if activation is not None:
                for block in model.layers:
                    block.feed_forward = Plain(64, 192, activation)
                    block.feed_forward.apply(model._init_weights)
            histories.append(tiny.train(model, rows, options.steps, 8e-3, optimizer="muon", seed=seed))
            found.append(tiny.evaluate(model, val))
        parameters = sum(p.numel() for p in model.layers[0].feed_forward.parameters())
        curves[std, name] = [sum(one) / SEEDS for one in zip(*map(tiny.losses, histories), strict=True)]
        results.append((f"{std:g}", name, parameters, " ".join(f"{loss:.3f}" for loss in found), sum(found) / SEEDS))
    tiny.table("initial weights, feed-forward, parameters of a layer, validation loss of each seed, mean", results)

    def draw(function, loss) -> None:
        x = torch.linspace(-4, 4, 161)
        for name, f in (("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu)):
            function.plot(x, f(x), label=name)
        function.set(xlabel="x", ylabel="f(x)")
        function.legend(frameon=False)
        for (std, name), curve in curves.items():
            style, colour = "--" if std == INITIAL[0] else "-", f"C{[*kinds].index(name)}"
            loss.plot(range(1, len(curve) + 1), curve, style, color=colour, label=f"{name}, {std:g}")
        loss.set(xlabel="optimizer step", ylabel=f"training loss, mean of {SEEDS} seeds")
        loss.legend(frameon=False, title="initial weights", fontsize=8)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
