"""Compare ways to balance the experts of a mixture: validation loss and load, over several seeds.

    python bench/moe_balance.py --data_path dataset/sample/mobvoi_seq_monkey_general_open_corpus.jsonl

Each run is 1-pretrain.py with a small mixture of 8 experts, of which a token passes 2 and a shared one; data, seeds and
everything else are the same. nothing: the router is left alone. loss: the balance loss (--aux_loss_alpha 0.01, the
default). biases: --router_bias_rate, at two rates, without the loss. The loss is that of the held-out texts after the last
step, without the balance loss. The load of the busiest expert of any layer, relative to the mean (1: all equal, 4: two
experts get everything), and the shares of the least and the most popular expert are means over the last quarter of the
steps.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu_checks import run_here  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import run_script  # noqa: E402

SHAPE = "--dim 96 --n_layers 3 --n_heads 6 --n_kv_heads 3 --hidden_dim 96 --max_seq_len 128"
MODEL = f"{SHAPE} --use_moe --n_routed_experts 8 --n_shared_experts 1".split()
WAYS = {
    "nothing": ["--aux_loss_alpha", "0"],
    "loss, 0.01": [],
    "biases, 0.001": ["--aux_loss_alpha", "0", "--router_bias_rate", "0.001"],
    "biases, 0.003": ["--aux_loss_alpha", "0", "--router_bias_rate", "0.003"],
}


def train(flags: list[str], data_path: Path, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Train one model; return its validation loss, and its load in the last quarter of the steps."""
    out = folder / "run"
    command = [
        "1-pretrain.py",
        "--data_path",
        data_path,
        "--cache_dir",
        folder / "cache",
        "--out_dir",
        out,
    ]
    command += [*MODEL, *flags, "--seed", seed, "--max_steps", steps, "--batch_size", 4, "--learning_rate", "2e-3"]
    command += ["--log_interval", 5, "--overwrite"]
    with contextlib.redirect_stdout(io.StringIO()):
        run_here(list(map(str, command)))
    lines = [json.loads(line) for line in next(out.glob("*.metrics.jsonl")).read_text().splitlines()]
    late = [line for line in lines if line["step"] > 0.75 * steps]
    shares = [[line[f"expert_{i}_share"] for i in range(8)] for line in late]
    return {
        "loss": lines[-1]["val_loss"],
        "busiest": statistics.mean(line["expert_max_load"] for line in late),
        "least": statistics.mean(map(min, shares)),
        "most": statistics.mean(map(max, shares)),
    }


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, default=ROOT / "dataset" / "pretrain_data.csv")
    add("--steps", type=int, default=200, help="optimizer steps of each run (default: 200)")
    add("--seeds", type=int, default=3, help="runs of each way (default: 3)")
    args = parser.parse_args()
    print("| balanced by | validation loss, each seed | mean | busiest expert | shares, least to most |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for way, flags in WAYS.items():
            runs = [train(flags, args.data_path, seed, args.steps, Path(folder)) for seed in range(args.seeds)]
            mean = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
            losses = ", ".join(f"{run['loss']:.3f}" for run in runs)
            shares = f"{mean['least']:.0%} to {mean['most']:.0%}"
            print(f"| {way} | {losses} | {mean['loss']:.3f} | {mean['busiest']:.2f} | {shares} |", flush=True)


if __name__ == "__main__":
    run_script(main)
