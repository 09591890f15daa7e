"""Train a mixture of 8 experts without balancing, with the balance loss, and with biases: who gets the tokens.

    python docs/experiments/moe.py

docs/moe.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

EXPERTS = 8
WAYS = {
    "nothing": {"aux_loss_alpha": 0.0},
    "balance loss, 0.01": {"aux_loss_alpha": 0.01},
    "biases, 0.003": {"aux_loss_alpha": 0.0, "router_bias_rate": 0.003},
}


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(120, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    rows, val = tiny.text_rows()
    curves, results = {}, []
    for name, fields in WAYS.items():
        model = tiny.new_model(
            use_moe=True, n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=2, hidden_dim=64, **fields
        )
        history = tiny.train(model, rows, options.steps, 8e-3, optimizer="muon")
        curves[name] = history
        late = history[-options.steps // 4 :]
        busiest = sum(line["expert_max_load"] for line in late) / len(late)
        shares = [[line[f"expert_{i}_share"] for i in range(EXPERTS)] for line in late]
        low, high = (sum(map(pick, shares)) / len(late) for pick in (min, max))
        results.append((name, tiny.evaluate(model, val), busiest, f"{low:.0%} to {high:.0%}"))
    tiny.table("balanced by, validation loss, load of the busiest expert, shares of the experts", results)

    def draw(load, loss) -> None:
        for name, history in curves.items():
            steps = range(1, len(history) + 1)
            load.plot(steps, [line["expert_max_load"] for line in history], label=name)
            loss.plot(steps, tiny.losses(history), label=name)
        load.axhline(1, color="grey", linestyle=":")
        load.set(xlabel="optimizer step", ylabel="load of the busiest expert (mean: 1)", ylim=(0, EXPERTS / 2 + 0.1))
        load.legend(frameon=False)
        loss.set(xlabel="optimizer step", ylabel="training loss")

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
