"""Show what padding costs and what packing saves, and that packed documents do not see each other.

    python docs/experiments/packing.py

docs/packing.md explains what it shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

SEQ_LEN = 128


def main() -> None:
    options = parse_options(tiny.ExperimentOptions, __doc__)
    import numpy as np
    import torch

    rows, _ = tiny.chat_rows(seq_len=SEQ_LEN)
    dataset, packing = rows.dataset, rows.packing
    lengths = np.minimum(dataset.lengths[np.unique(packing.document)], SEQ_LEN)
    results = [
        ("one document in a row, padded", len(lengths), float(lengths.mean() / SEQ_LEN)),
        ("packed", len(rows), packing.fill),
    ]
    tiny.table("scheme, rows, share of the tokens that are not padding", results)

    model = tiny.new_model(seed=1).eval()
    several = int(np.flatnonzero(np.diff(packing.bounds) > 2)[0])  # a row of three documents or more
    batch = rows.batch([several])
    start, end = batch.inputs["cu_seqlens"][1:3].tolist()  # of the second document
    ids = batch.inputs["input_ids"]
    with torch.no_grad():
        packed = model(**batch.inputs).logits[0, start:end]
        alone = model(input_ids=ids[:, start:end]).logits[0]
        mixed = model(input_ids=ids).logits[0, start:end]  # without boundaries: the row is one text
    tiny.table(
        "the second document of a row, largest difference of a logit to that alone",
        [
            ("packed, with its boundaries", f"{float((packed - alone).abs().max()):.1e}"),
            ("joined, without boundaries", f"{float((mixed - alone).abs().max()):.1e}"),
        ],
    )

    def draw(padded, packed) -> None:
        n_rows = 16
        pieces = [[int(length)] for length in lengths[:n_rows]]
        draw_rows(padded, pieces, f"padded: {results[0][2]:.0%} full")
        bounds, shown = packing.bounds, range(0, len(packing), len(packing) // n_rows)[:n_rows]
        pieces = [packing.length[bounds[r] : bounds[r + 1]].tolist() for r in shown]
        draw_rows(packed, pieces, f"packed: {packing.fill:.0%} full")

    def draw_rows(axes, pieces, title: str) -> None:
        number = 0
        for row, row_lengths in enumerate(pieces):
            left = 0
            for length in row_lengths:
                axes.barh(row, length, left=left, color=f"C{number % 10}", edgecolor="white", linewidth=0.6)
                left, number = left + length, number + 1
        axes.set(title=title, xlabel="token of the row", ylabel="row", xlim=(0, SEQ_LEN))
        axes.invert_yaxis()

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
