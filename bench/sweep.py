"""Try flags of a training stage: every combination of the values given, one run each, and how it ends on held-out data.

    python bench/sweep.py 3-full_sft.py --flags "--data_path dataset/sft_data.csv --init_from out/pretrain_512.pth" \\
        --grid "optimizer=adamw learning_rate=2e-4,5e-4,1e-3" "optimizer=muon learning_rate=1e-3,3e-3"

All runs see the same samples in the same order and hold out the same ones: their losses can be compared. Those of DPO with
several values of beta cannot, but the shares of pairs in the right order can. Runs that have ended are not repeated.
"""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script
from common.files import ROOT
from evaluation.runs import read_metrics


def combinations(grid: str) -> list[dict[str, str]]:
    """Return the flags of every run: "a=1,2 b=3" is {a: 1, b: 3} and {a: 2, b: 3}."""
    names, values = zip(*(part.split("=", 1) for part in grid.split()), strict=True)
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*(v.split(",") for v in values))]


def last_validation(folder: Path) -> dict[str, float]:
    """Return the figures of the last validation of the run in a folder; none if it has not ended."""
    if not [*folder.glob("*.report.html")]:
        return {}
    (metrics,) = folder.glob("*.metrics.jsonl")
    return next(line for line in reversed(read_metrics(metrics)) if "val_loss" in line)


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
        folder = args.out_dir / Path(args.script).stem / "_".join(words).replace("--", "")
        if not last_validation(folder):
            command = [sys.executable, str(ROOT / args.script), *shlex.split(args.flags), *words]
            result = subprocess.run([*command, "--out_dir", str(folder), "--overwrite"], capture_output=True, text=True)
            if result.returncode != 0:
                raise UserError(f"{shlex.join(command)} failed: {result.stderr[-1000:]}")
        found = last_validation(folder)
        share = f"{found['val_accuracy']:.1%}" if "val_accuracy" in found else "–"
        print(f"| `{' '.join(words)}` | {found['val_loss']:.4f} | {share} |", flush=True)


if __name__ == "__main__":
    run_script(main)
