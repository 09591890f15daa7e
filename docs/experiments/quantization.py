"""Round the weights of a trained model to fewer and fewer bits: its loss, and how often its best token stays the same.

    python docs/experiments/quantization.py

docs/quantization.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

BITS = (8, 6, 5, 4, 3, 2)


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(250, "optimizer steps of the model", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import copy

    import torch

    from inference.kernels.decode_weights import quantize_int8

    rows, val = tiny.text_rows()
    model = tiny.new_model(dim=128)
    tiny.train(model, rows, options.steps, 8e-3, optimizer="muon")
    model.eval()
    batch = val.batch(range(32))
    targets = batch.inputs["labels"][:, 1:] != -100

    def rounded(bits: int, per_output: bool):
        """Return a copy of the model whose matrices have only 2^bits - 1 different values for each scale."""
        other = copy.deepcopy(model)
        steps = 2 ** (bits - 1) - 1
        for name, module in other.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "output":
                weight = module.weight.data
                scale = (weight.abs().amax(1, keepdim=True) if per_output else weight.abs().amax()) / steps
                module.weight.data = (weight / scale).round() * scale
        return other

    def best(one) -> torch.Tensor:
        with torch.no_grad():
            return one(**{name: x for name, x in batch.inputs.items() if name != "labels"}).logits[:, :-1].argmax(-1)

    ours, exact = (
        quantize_int8(model.layers[0].feed_forward.w1.weight),
        rounded(8, True).layers[0].feed_forward.w1.weight,
    )
    assert torch.allclose(ours.weight.float() * ours.scale[:, None], exact, atol=1e-6)
    reference = best(model)
    results = [("32 (not rounded)", tiny.evaluate(model, val), "100.0%", "", "")]
    for bits in BITS:
        cells = []
        for per_output in (True, False):
            other = rounded(bits, per_output)
            same = float((best(other) == reference)[targets].float().mean())
            cells += [tiny.evaluate(other, val), f"{same:.1%}"]
        results.append((bits, *cells))
    names = (
        "bits, loss with a scale for each output, same best token, loss with one scale for each matrix, same best token"
    )
    tiny.table(names, results)

    def draw(axes) -> None:
        for column, name in ((1, "a scale for each output"), (3, "a scale for each matrix")):
            axes.plot(BITS, [row[column] for row in results[1:]], "o-", label=name)
        axes.axhline(results[0][1], color="grey", linestyle=":", label="not rounded")
        axes.set(xlabel="bits of a weight", ylabel="validation loss")
        axes.invert_xaxis()
        axes.legend(frameon=False)

    tiny.plot(options.output, __file__, draw)


if __name__ == "__main__":
    run_script(main)
