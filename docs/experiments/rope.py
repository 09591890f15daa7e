"""Train a model on rows of 64 tokens and let it read 256: its loss at each position, with and without RoPE scaling.

    python docs/experiments/rope.py

docs/rope.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

TRAINED, READ = 64, 256


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(250, "optimizer steps", min=20)


class Stream:
    """One long text cut into rows: every row is a single document of `seq_len` tokens."""

    def __init__(self, tokens, seq_len: int) -> None:
        self.rows = tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices):
        import torch

        from data_pipeline.datasets import Batch

        ids = torch.from_numpy(self.rows[list(indices)].astype("int64"))
        return Batch({"input_ids": ids, "labels": ids}, ids.numel() - len(ids), ids.numel(), 0)


def main() -> None:
    options = parse_options(Options, __doc__)
    import torch
    import torch.nn.functional as F

    from model.rope import RopeScaling

    rows, val = tiny.text_rows()
    dataset = rows.dataset

    def stream(packed, seq_len: int) -> Stream:
        import numpy as np

        documents = packed.packing.document
        return Stream(np.concatenate([dataset.document(i) for i in documents]), seq_len)

    model = tiny.new_model(max_seq_len=TRAINED)
    tiny.train(model, stream(rows, TRAINED), options.steps, 8e-3, optimizer="muon", batch_size=16)
    model.eval()
    ids = stream(val, READ).batch(range(min(64, len(stream(val, READ))))).inputs["input_ids"]

    ways = {"none": None}
    ways |= {method: RopeScaling(method, READ / TRAINED, TRAINED) for method in ("linear", "ntk", "yarn")}
    curves = {}
    with torch.no_grad():
        for name, scaling in ways.items():
            logits = model(ids, rope_scaling=scaling, use_cache=False).logits
            each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            curves[name] = each.view(len(ids), -1).mean(0)
    parts = {"1 to 64": slice(0, 63), "65 to 128": slice(63, 127), "129 to 256": slice(127, 255)}
    results = [(name, *(float(curve[part].mean()) for part in parts.values())) for name, curve in curves.items()]
    tiny.table(f"scaling, {', '.join(f'loss at positions {name}' for name in parts)}", results)

    def draw(axes) -> None:
        for name, curve in curves.items():
            smooth = F.avg_pool1d(curve[None], 16, 8)[0]
            axes.plot([8 + 8 * i for i in range(len(smooth))], smooth, label=name)
        axes.axvline(TRAINED, color="grey", linestyle=":")
        axes.text(TRAINED, axes.get_ylim()[1], " trained length", va="top", color="grey")
        axes.set(xlabel="position", ylabel="loss (nats per token)")
        axes.legend(frameon=False, title="scaling")

    tiny.plot(options.output, __file__, draw)


if __name__ == "__main__":
    run_script(main)
