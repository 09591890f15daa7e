"""Fit a teacher with two peaks by three divergences, and train a student on few dialogues with and without a teacher.

    python docs/experiments/distillation.py

docs/distillation.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

KINDS = ("forward", "reverse", "js")
# alpha, temperature, divergence of each student; without a divergence there is no teacher
STUDENTS = {
    "labels alone": (1.0, 1.0, None),
    "half and half": (0.5, 1.0, "forward"),
    "teacher alone": (0.0, 1.0, "forward"),
    "teacher, T = 4": (0.0, 4.0, "forward"),
    "teacher, reverse": (0.0, 1.0, "reverse"),
}


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    dialogues: int = flag(300, "dialogues that the students learn from", min=10)
    teacher_steps: int = flag(200, "optimizer steps of the teacher, which learns from all dialogues", min=10)
    steps: int = flag(120, "optimizer steps of each student", min=10)


def main() -> None:
    options = parse_options(Options, __doc__)
    import numpy as np
    import torch

    from data_pipeline.datasets import PackedRows
    from trainer.distillation import Teacher, distillation_loss, divergence, predicted_targets

    places = torch.arange(40.0)

    def peak(middle: float, width: float) -> torch.Tensor:
        return (-((places - middle) ** 2) / (2 * width**2)).softmax(-1)

    two_peaks = 0.6 * peak(11, 2.5) + 0.4 * peak(28, 2.5)

    def fit(kind: str) -> torch.Tensor:
        """Return the single peak that is nearest to the two peaks, as probabilities."""
        middle, width = torch.tensor(15.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
        optimizer = torch.optim.Adam([middle, width], lr=0.1)
        for _ in range(400):
            student = (-((places - middle) ** 2) / (2 * width**2)).log_softmax(-1)
            optimizer.zero_grad()
            divergence(student[None], two_peaks.log()[None], kind).sum().backward()
            optimizer.step()
        return student.detach().exp()

    peaks = {kind: fit(kind) for kind in KINDS}

    rows, val = tiny.chat_rows()
    few = PackedRows(rows.dataset, np.unique(rows.packing.document)[: options.dialogues], 128, seed=0)
    teacher = Teacher(tiny.chat_model(options.teacher_steps).eval().requires_grad_(False), "")
    batch = val.batch(range(min(64, len(val))))
    at, _ = predicted_targets(batch.inputs["labels"], batch.n_targets)
    shares = []
    for temperature in (1.0, 2.0, 4.0):
        best = teacher.logps(batch.inputs, at, temperature).exp().sort(descending=True).values.cumsum(-1).mean(0)
        shares.append((f"{temperature:g}", *(float(best[k - 1]) for k in (1, 4, 16, 64))))
    tiny.table("temperature, the teacher's best token, best 4, best 16, best 64", shares)

    curves, results = {}, [("the teacher itself", "", tiny.evaluate(teacher.model, val))]
    for name, (alpha, temperature, kind) in STUDENTS.items():
        model, losses = tiny.new_model(1, dim=48), []
        loss_fn = distillation_loss(alpha, temperature, kind, teacher) if kind else None

        def measure(step: int, model=model, losses=losses) -> None:
            if step % 10 == 0:
                losses.append((step, tiny.evaluate(model, val)))

        history = tiny.train(model, few, options.steps, 8e-3, optimizer="muon", loss_fn=loss_fn, each_step=measure)
        curves[name] = losses
        results.append((name, tiny.losses(history)[-1], losses[-1][1]))
    tiny.table("student, cross entropy in training, held out", results)

    def draw(fits, loss) -> None:
        fits.fill_between(places, two_peaks, color="0.85", label="teacher")
        for kind, values in peaks.items():
            fits.plot(places, values, "--" if kind == "js" else "-", label=kind)
        fits.set(xlabel="token", ylabel="probability", ylim=(0, None))
        fits.legend(frameon=False)
        for name, points in curves.items():
            loss.plot(*zip(*points, strict=True), label=name)
        loss.axhline(results[0][2], color="grey", linestyle=":", label="the teacher itself")
        loss.set(xlabel="optimizer step", ylabel="loss of held-out dialogues", ylim=(0, None))
        loss.legend(frameon=False, fontsize=8)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
