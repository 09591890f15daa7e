"""Teach a model a new identity with adapters of several ranks and by full fine-tuning: what it learns, what it forgets.

    python docs/experiments/lora.py

docs/lora.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

RANKS = (1, 4, 16)


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(80, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import copy

    from model.lora import add_adapter

    old = tiny.chat_rows()[1]
    new = tiny.chat_rows("lora_identity.jsonl", val_fraction=0.2)
    base = tiny.chat_model(300)
    results = [("before", 0, tiny.evaluate(base, new[1]), tiny.evaluate(base, old))]
    curves = {}

    def run(name: str, model, peak: float) -> None:
        curve = []

        def look(step: int) -> None:
            if step % 10 == 0 or step == 1:
                curve.append((step, tiny.evaluate(model, new[1]), tiny.evaluate(model, old)))

        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        tiny.train(model.train(), new[0], options.steps, peak, batch_size=4, each_step=look)
        curves[name] = curve
        results.append((name, trained, *curve[-1][1:]))

    for rank in RANKS:
        adapted = add_adapter(copy.deepcopy(base), rank=rank, alpha=2 * rank, dropout=0.0)
        run(f"LoRA, rank {rank}", adapted, 5e-3)
    run("all weights", copy.deepcopy(base), 5e-3)
    tiny.table(
        "trained, parameters, loss of the new identity (held out), loss of the old dialogues (held out)", results
    )

    def draw(learned, forgotten) -> None:
        for name, curve in curves.items():
            steps, new_losses, old_losses = zip(*curve, strict=True)
            learned.plot(steps, new_losses, label=name)
            forgotten.plot(steps, old_losses, label=name)
        learned.set(xlabel="optimizer step", ylabel="loss of the new identity", ylim=(0, None))
        forgotten.set(xlabel="optimizer step", ylabel="loss of the old dialogues", ylim=(0, None))
        learned.legend(frameon=False)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
