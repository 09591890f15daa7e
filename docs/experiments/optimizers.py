"""Compare AdamW and Muon over learning rates.

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

RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256)


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(50, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    rows, val = tiny.text_rows()

    curves, final = {}, {}
    for name in ("AdamW", "Muon"):
        for peak in RATES:
            model = tiny.new_model()
            curves[name, peak] = tiny.losses(tiny.train(model, rows, options.steps, peak, optimizer=name.lower()))
            final[name, peak] = tiny.evaluate(model, val)
    tiny.table(
        "peak learning rate, validation loss with AdamW, with Muon",
        [(f"{peak:g}", final["AdamW", peak], final["Muon", peak]) for peak in RATES],
    )

    def draw(rates, best) -> None:
        for name in ("AdamW", "Muon"):
            losses = [final[name, peak] for peak in RATES]
            rates.plot(RATES, losses, "o-", label=name)
            peak = RATES[losses.index(min(losses))]
            best.plot(range(1, options.steps + 1), curves[name, peak], label=f"{name}, {peak:g}")
        rates.set(xscale="log", xlabel="peak learning rate", ylabel=f"validation loss after {options.steps} steps")
        rates.legend(frameon=False)
        best.set(xlabel="optimizer step", ylabel="training loss at the best rate")
        best.legend(frameon=False)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
