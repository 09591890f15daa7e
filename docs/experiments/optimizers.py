"""Compare AdamW and Muon over learning rates, and a schedule with a constant rate.

    python docs/experiments/optimizers.py

docs/optimizers.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(50, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    rows, val = tiny.text_rows()

    def run(optimizer: str, peak: float, **settings) -> tuple[list[float], float]:
        model = tiny.new_model()
        history = tiny.train(model, rows, options.steps, peak, optimizer=optimizer, **settings)
        return tiny.losses(history), tiny.evaluate(model, val)

    final = {name: [run(name, peak)[1] for peak in RATES] for name in ("adamw", "muon")}
    tiny.table(
        "peak learning rate, validation loss with AdamW, with Muon",
        [(f"{rate:g}", *(values[i] for values in final.values())) for i, rate in enumerate(RATES)],
    )
    schedules = {
        "warm-up, then cosine": {},
        "warm-up, then constant": {"floor": 1.0},
        "no warm-up, no clipping, constant": {"warmup": 0, "floor": 1.0, "clip": float("inf")},
    }
    curves = {name: run("muon", 2e-2, **settings) for name, settings in schedules.items()}
    tiny.table("schedule (Muon; 2e-2), validation loss", [(name, loss) for name, (_, loss) in curves.items()])

    def draw(rates, schedule) -> None:
        for name, values in final.items():
            rates.plot(RATES, values, "o-", label={"adamw": "AdamW", "muon": "Muon"}[name])
        rates.set(xscale="log", xlabel="peak learning rate", ylabel=f"validation loss after {options.steps} steps")
        rates.legend(frameon=False)
        for name, (curve, _) in curves.items():
            schedule.plot(range(1, len(curve) + 1), curve, label=name)
        schedule.set(xlabel="optimizer step", ylabel="training loss")
        schedule.legend(frameon=False)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
