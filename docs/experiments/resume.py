"""Stop a run in the middle and continue it exactly, without the optimizer's state, or with the data from the beginning.

    python docs/experiments/resume.py

docs/resume.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(160, "optimizer steps", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import copy

    import torch

    from data_pipeline.datasets import Schedule
    from trainer.losses import next_token_loss
    from trainer.optim import get_lr, make_optimizers

    rows, val = tiny.text_rows()
    half = options.steps // 2
    schedule = Schedule(len(rows), 8, options.steps * 8, seed=0)

    def advance(model, optimizers, first: int, last: int, shift: int = 0) -> list[tuple[int, float]]:
        """Do the steps from `first` to `last` with the samples of the steps `shift` later; return their losses."""
        curve = []
        for step in range(first, last):
            loss_sum, n_targets, logged = next_token_loss(model, batch := rows.batch(schedule.samples(step + shift)))
            (loss_sum / n_targets).backward()
            for one in optimizers:
                for group in one.param_groups:
                    group["lr"] = get_lr(step, options.steps, 8e-3, 10)
                one.step()
                one.zero_grad()
            curve.append((step + 1, float(logged["loss"]) / batch.n_targets))
        return curve

    model = tiny.new_model()
    optimizers = make_optimizers(model, "adamw", weight_decay=0.1)
    before = advance(model, optimizers, 0, half)
    weights, states = copy.deepcopy(model.state_dict()), [copy.deepcopy(one.state_dict()) for one in optimizers]
    curves = {"never stopped": before + advance(model, optimizers, half, options.steps)}
    results = [("never stopped", tiny.evaluate(model, val), "")]
    reference = [parameter.detach().clone() for parameter in model.parameters()]
    for name, keeps_optimizer, shift in (
        ("exact", True, 0),
        ("optimizer state lost", False, 0),
        ("data from the beginning", True, -half),
    ):
        again = tiny.new_model()
        again.load_state_dict(weights)
        optimizers = make_optimizers(again, "adamw", weight_decay=0.1)
        if keeps_optimizer:
            for one, state in zip(optimizers, copy.deepcopy(states), strict=True):
                one.load_state_dict(state)
        curves[name] = advance(again, optimizers, half, options.steps, shift)
        same = all(torch.equal(a, b) for a, b in zip(reference, again.parameters(), strict=True))
        results.append((name, tiny.evaluate(again, val), "identical" if same else "different"))
    tiny.table("continued, validation loss at the end, weights compared with those of the first run", results)

    def draw(losses, differences) -> None:
        whole = dict(curves["never stopped"])
        for name, curve in curves.items():
            width = 2.5 if name == "never stopped" else 1.2
            losses.plot(*zip(*curve, strict=True), label=name, linewidth=width)
            after = [(step, loss - whole[step]) for step, loss in curve if step > half]
            if name != "never stopped":
                differences.plot(*zip(*after, strict=True), label=name, color=losses.lines[-1].get_color())
        losses.axvline(half, color="grey", linestyle=":")
        losses.set(xlabel="optimizer step", ylabel="training loss")
        losses.legend(frameon=False, title="continued")
        differences.set(xlabel="optimizer step", ylabel="loss minus that of the first run")

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
