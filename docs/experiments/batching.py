"""Answer 48 requests of different lengths in 8 rows: in fixed batches, and with sequences that join at any step.

    python docs/experiments/batching.py

docs/batching.md explains what it shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

ROWS, REQUESTS = 8, 48


def main() -> None:
    options = parse_options(tiny.ExperimentOptions, __doc__)
    import random

    from inference.generator import BatchGenerator
    from inference.options import SamplingParams

    model = tiny.new_model().eval()
    lengths = [random.Random(i).choice((4, 8, 12, 16, 24, 90)) for i in range(REQUESTS)]
    requests = [([1, 100 + i], SamplingParams(max_new_tokens=length)) for i, length in enumerate(lengths)]

    def run(continuous: bool) -> tuple[dict[int, tuple[int, int]], int]:
        """Return (first, last) step of each request, and the number of steps."""
        generator = BatchGenerator(model, ROWS, 128, eos_id=None)
        waiting = list(enumerate(requests))
        spans: dict[int, tuple[int, int]] = {}
        step = 0
        while waiting or generator.rows:
            outputs = []
            if waiting and (generator.free if continuous else not generator.rows):
                joining = [waiting.pop(0) for _ in range(min(generator.free, len(waiting)))]
                prompts, samplings = zip(*(request for _, request in joining), strict=True)
                outputs = generator.add(prompts, samplings, [key for key, _ in joining])
            else:
                outputs = generator.step()
            step += 1
            for output in outputs:
                spans[output.key] = (spans.get(output.key, (step, step))[0], step)
        return spans, step

    plans = {"fixed batches": run(False), "continuous batching": run(True)}
    results = []
    for name, (spans, steps) in plans.items():
        ends = sorted(end for _, end in spans.values())
        results.append((name, steps, f"{sum(lengths) / (steps * ROWS):.0%}", f"{sum(ends) / len(ends):.0f}"))
    tiny.table("scheme, calls of the model, rows in use, call at which an answer ends (mean)", results)

    last_step = max(steps for _, steps in plans.values())

    def draw(*axes) -> None:
        for one, (name, (spans, steps)) in zip(axes, plans.items(), strict=True):
            ends = [0] * ROWS  # of each row of the picture
            for key, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
                row = next((i for i, end in enumerate(ends) if end < first), ends.index(min(ends)))
                one.barh(row, last - first + 1, left=first - 1, color=f"C{key % 10}", edgecolor="white")
                ends[row] = last
            one.set(title=f"{name}: {steps} calls", xlabel="call of the model", ylabel="row", xlim=(0, last_step))
            one.invert_yaxis()

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
