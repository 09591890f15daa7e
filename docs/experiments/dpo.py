"""Train on preference pairs with three values of beta: rewards, accuracy, and how far the model moves.

    python docs/experiments/dpo.py

docs/dpo.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

BETAS = (0.03, 0.3, 3.0)


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(60, "optimizer steps of each run", min=10)


def main() -> None:
    options = parse_options(Options, __doc__)
    import contextlib
    import copy
    import io

    import torch

    from data_pipeline.preferences import PreferencePairs, read_pairs
    from trainer.losses import compute_ref_logps, dpo_loss

    base = tiny.chat_model(300)
    with contextlib.redirect_stdout(io.StringIO()):
        files = [tiny.SAMPLE / "dpo" / "preference.json", tiny.SAMPLE / "dpo_heldout.json"]
        train, held_out = (PreferencePairs(read_pairs([path], tiny.tokenizer(), 128, 0.1), "") for path in files)
        for pairs in (train, held_out):
            pairs.ref_logps = compute_ref_logps(base, pairs, torch.device("cpu"), torch.float32, 32)
    curves, results = {}, []
    for beta in BETAS:
        model = copy.deepcopy(base)
        loss_fn = dpo_loss(beta)
        curves[beta] = tiny.train(model, train, options.steps, 3e-4, warmup=5, loss_fn=loss_fn)
        model.eval()
        with torch.no_grad():
            _, n, logged = loss_fn(model, held_out.batch(range(128)))
        found = {name: float(value) / n for name, value in logged.items()}
        gained = [found[f"{name}_reward"] / beta for name in ("chosen", "rejected")]
        results.append((beta, curves[beta][0]["loss"], found["loss"], found["accuracy"], *gained, found["kl_estimate"]))
    names = "beta, first loss, loss, accuracy, gain of the chosen answer (nats), of the rejected one, kl_estimate"
    tiny.table(names, results)

    def draw(gains, loss) -> None:
        for i, (beta, history) in enumerate(curves.items()):
            for name, style in (("chosen", "-"), ("rejected", "--")):
                values = [line[f"{name}_reward"] / beta for line in history]
                gains.plot(range(1, len(values) + 1), values, style, color=f"C{i}", label=f"{name}, beta {beta:g}")
            loss.plot(range(1, len(history) + 1), tiny.losses(history), color=f"C{i}", label=f"beta {beta:g}")
        gains.set(xlabel="optimizer step", ylabel="log p - log p of the reference (nats)")
        gains.legend(frameon=False, fontsize=8)
        loss.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None))
        loss.legend(frameon=False)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
