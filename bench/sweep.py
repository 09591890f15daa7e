"""Try flags of a training stage: every combination of the values given, one run each, and how it ends on held-out data.

    python bench/sweep.py 3-full_sft.py --flags "--data_path dataset/sft_data.csv --init_from out/pretrain_512.pth" \\
        --grid "optimizer=adamw learning_rate=2e-4,5e-4,1e-3" "optimizer=muon learning_rate=1e-3,3e-3"

All runs see the same samples in the same order and hold out the same ones: their losses can be compared. Those of DPO with
several values of beta cannot, but the shares of pairs in the right order can. A run that has ended is not repeated, unless
--flags are others.
"""

from __future__ import annotations

import hashlib
import itertools
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.stages import run_stage
from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script
from common.files import ROOT
from evaluation.runs import read_metrics


def combinations(grid: str) -> list[dict[str, str]]:
    """Return the flags of every run: "a=1,2 b=3" is {a: 1, b: 3} and {a: 2, b: 3}."""
    parts = [part.split("=", 1) for part in grid.split()]
    if wrong := ["".join(part) for part in parts if len(part) != 2]:
        raise UserError(f"--grid {wrong[0]}: write name=value or name=value,value")
    names, values = zip(*parts, strict=True)
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*(v.split(",") for v in values))]


def last_validation(folder: Path) -> dict[str, float]:
    """Return the figures of the last validation of the run in a folder; none if it has not ended."""
    if not (folder / "ended").exists():  # a run that was stopped has all other files, too
        return {}
    (metrics,) = folder.glob("*.metrics.jsonl")
    found = [line for line in read_metrics(metrics) if "val_loss" in line]
    if not found:
        raise UserError(f"{metrics} has no validation loss, so that runs cannot be compared: hold out some data")
    return found[-1]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("script", help="the stage, such as 3-full_sft.py")
    parser.add_argument("--flags", default="", help="flags that all runs have")
    parser.add_argument(
        "--grid", nargs="+", required=True, help="name=value,value name=value: all combinations are tried"
    )
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "sweep")
    args = parser.parse_args()
    print("| flags | validation loss | pairs in the right order |\n|---|---|---|")
    for flags in itertools.chain.from_iterable(map(combinations, args.grid)):
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        stage = f"{Path(args.script).stem}_{hashlib.sha256(args.flags.encode()).hexdigest()[:8]}"
        folder = args.out_dir / stage / "_".join(words).replace("--", "")
        if not last_validation(folder):
            run_stage(args.script, *shlex.split(args.flags), *words, "--out_dir", folder, "--overwrite")
            (folder / "ended").touch()
        found = last_validation(folder)
        share = f"{found['val_accuracy']:.1%}" if "val_accuracy" in found else "–"
        print(f"| `{' '.join(words)}` | {found['val_loss']:.4f} | {share} |", flush=True)


if __name__ == "__main__":
    run_script(main)
