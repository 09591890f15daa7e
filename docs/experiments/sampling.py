"""Let a small model continue texts at several temperatures: how much it repeats itself, how probable what it writes is.

    python docs/experiments/sampling.py

docs/sampling.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
N = 4  # an n-gram of tokens


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(250, "optimizer steps of the model", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import torch

    from inference.generator import generate
    from inference.options import SamplingParams
    from inference.sampling import BatchedSamplingParams, sample_next

    rows, val = tiny.text_rows()
    model = tiny.new_model()
    tiny.train(model, rows, options.steps, 8e-3, optimizer="muon")
    model.eval()
    prompts = [val.dataset.document(i)[:6].tolist() for i in val.packing.document[:48]]

    def write(**sampling) -> tuple[float, float]:
        """Return the share of 4-grams that occurred before in the same text, and the mean log-probability of a token."""
        texts: dict[int, list[int]] = {}
        logps = []
        params = SamplingParams(max_new_tokens=60, seed=0, logprobs=0, **sampling)
        for output in generate(model, prompts, params, eos_id=None):
            texts.setdefault(output.key, []).append(output.token)
            logps.append(output.logprob)
        grams = [[tuple(ids[i : i + N]) for i in range(len(ids) - N + 1)] for ids in texts.values()]
        repeated = sum(len(some) - len(set(some)) for some in grams) / sum(map(len, grams))
        return repeated, sum(logps) / len(logps)

    results = [(t, *write(temperature=t), *write(temperature=t, top_p=0.9)) for t in TEMPERATURES]
    tiny.table("temperature, repeated 4-grams, log-probability, with top_p 0.9: repeated, log-probability", results)

    with torch.no_grad():
        logits = model(torch.tensor([prompt for prompt in prompts if len(prompt) == 6])).logits[:, -1]
    # A place at which the model hesitates: the best token has about a third of the probability.
    place = (logits.softmax(-1).amax(-1) - 1 / 3).abs().argmin()
    logits = logits[place, None]
    best = logits[0].topk(12).indices
    drawn = {}
    for name, sampling in (
        ("temperature 1", SamplingParams(temperature=1.0)),
        ("temperature 0.5", SamplingParams(temperature=0.5)),
        ("top_p 0.9", SamplingParams(temperature=1.0, top_p=0.9)),
        ("min_p 0.1", SamplingParams(temperature=1.0, min_p=0.1)),
    ):
        n = 4000
        uniform = (torch.arange(n) + 0.5) / n
        tokens = sample_next(logits.expand(n, -1), BatchedSamplingParams([sampling] * n), uniform)
        drawn[name] = [float((tokens == token).float().mean()) for token in best]

    def draw(bars, repeats) -> None:
        for i, (name, shares) in enumerate(drawn.items()):
            bars.bar([x + 0.2 * i - 0.3 for x in range(len(shares))], shares, 0.2, label=name)
        bars.set(xlabel="token, by the model's probability", ylabel="how often it is drawn")
        bars.legend(frameon=False)
        repeats.plot(TEMPERATURES, [row[1] for row in results], "o-", label="no limit")
        repeats.plot(TEMPERATURES, [row[3] for row in results], "o-", label="top_p 0.9")
        repeats.set(xlabel="temperature", ylabel="share of repeated 4-grams", ylim=(0, None))
        repeats.legend(frameon=False)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
