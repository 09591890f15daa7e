"""Train with tied and with separate output weights: loss, parameters, and which tokens become neighbours.

    python docs/experiments/embeddings.py

docs/embeddings.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

PAIRS = ((" France", " Germany"), (" Monday", " Friday"), (" red", " blue"), ("春", "秋"), ("大", "小"))


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(200, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import torch.nn.functional as F

    from model.model import parameter_counts
    from model.tokenizer import encode_text

    rows, val = tiny.text_rows()
    pairs = [tuple(encode_text(tiny.tokenizer(), text) for text in pair) for pair in PAIRS]
    words = [(pair, (a[0], b[0])) for pair, (a, b) in zip(PAIRS, pairs, strict=True) if len(a) == len(b) == 1]
    curves, results, similar = {}, [], {}
    for tied in (True, False):
        model = tiny.new_model(tie_word_embeddings=tied)
        curve = []

        def look(step: int, model=model, curve=curve) -> None:
            if step % 25 == 0:
                curve.append((step, tiny.evaluate(model, val)))

        def neighbours(model=model) -> list[float]:
            weight = F.normalize(model.tok_embeddings.weight.detach(), dim=1)
            return [float(weight[a] @ weight[b]) for _, (a, b) in words]

        before = neighbours()
        tiny.train(model, rows, options.steps, 5e-3, each_step=look)
        name = "tied" if tied else "separate"
        counts = parameter_counts(model)
        curves[name] = curve
        results.append(
            (name, f"{counts['total'] / 1e6:.2f}M", f"{counts['embedding'] / counts['total']:.0%}", curve[-1][1])
        )
        similar |= {"before training": before, name: neighbours()} if tied else {name: neighbours()}
    tiny.table("output weights, parameters, embedding's share, validation loss", results)
    tiny.table(
        f"cosine of the embeddings, {', '.join(f'{a.strip()} / {b.strip()}' for (a, b), _ in words)}",
        [(name, *values) for name, values in similar.items()],
    )

    def draw(axes) -> None:
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), label=name)
        axes.set(xlabel="optimizer step", ylabel="validation loss")
        axes.legend(frameon=False, title="output weights")

    tiny.plot(options.output, __file__, draw)


if __name__ == "__main__":
    run_script(main)
