"""Measure what reinforcement learning adds to SFT: every algorithm, with and without thinking and tools.

    python bench/rlvr.py --init_from out/quickstart/rl_192.pth                        # all algorithms, three seeds
    python bench/rlvr.py --init_from out/quickstart/rl_192.pth --algorithms grpo --seeds 1 --steps 20

The model first learns the exercises of dataset/sample/rlvr_sft.jsonl by SFT; then each algorithm trains it on
dataset/sample/rlvr_data.jsonl. Both are measured on the held-out exercises, whose wordings and numbers occur in neither
file, with the most probable tokens: word problems of two steps, with the model free to think or not, answered at once,
with thinking, and with a calculator; and all exercises with tools. Results are in --out_dir and are not made again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PreTrainedTokenizerFast

from bench.stages import run_stage
from common.cli import Parser  # noqa: E402
from common.errors import run_script
from common.files import ROOT
from data_pipeline.readers import iter_records
from evaluation.rollouts import Rollout, RolloutPrompt, greedy_rollouts, read_prompts
from inference.model_loader import open_model
from model.model import Transformer
from model.tokenizer import load_tokenizer
from trainer.metrics import read_metrics
from trainer.options import ALGORITHMS

SAMPLE = ROOT / "dataset" / "sample"
MAX_SEQ_LEN, MAX_NEW_TOKENS = 384, 64
SFT = "--optimizer muon --learning_rate 3e-3 --batch_size 4 --epochs 2"
RLVR = "--learning_rate 5e-5 --batch_size 8 --group_size 16 --warmup_iters 2"


MEASURED = (
    "two steps, free to think", "two steps at once", "two steps, thinking", "two steps, tools", "all with tools",
    "calls without error",
)  # fmt: skip


def read_held_out(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, RolloutPrompt]]:
    """Return the held-out exercises with their names: those of two steps as in MEASURED, "other" for the rest."""
    path = SAMPLE / "rlvr_heldout.jsonl"
    names = []
    for row in (record.data for record in iter_records(path, None)):
        switch = {None: ", free to think", False: " at once", True: ", thinking"}[row.get("enable_thinking")]
        mode = ", tools" if row.get("tools") else switch
        names.append(f"two steps{mode}" if row["kind"] == "two_steps" else "other")
    return [*zip(names, read_prompts([path], tokenizer, MAX_SEQ_LEN - MAX_NEW_TOKENS), strict=True)]


def accuracy(rollouts: Sequence[Rollout]) -> float:
    return sum(rollout.reward.correct for rollout in rollouts) / len(rollouts)


def well_formed(rollouts: Sequence[Rollout]) -> float:
    """Return the share of the calls that could be read and run without an error."""
    calls = sum(rollout.calls for rollout in rollouts)
    return 1 - sum(rollout.failed_calls for rollout in rollouts) / calls if calls else 0.0


def measure(
    model: Transformer, tokenizer: PreTrainedTokenizerFast, exercises: Sequence[tuple[str, RolloutPrompt]]
) -> dict[str, float]:
    """Return the figures of MEASURED, each from 0 to 1."""
    rollouts = greedy_rollouts(model, tokenizer, [prompt for _, prompt in exercises], MAX_NEW_TOKENS)
    with_tools = [rollout for rollout in rollouts if rollout.prompt.tools]
    by_name = {name: [r for (of, _), r in zip(exercises, rollouts, strict=True) if of == name] for name in MEASURED[:4]}
    figures = [*map(accuracy, by_name.values()), accuracy(with_tools), well_formed(with_tools)]
    return dict(zip(MEASURED, figures, strict=True))


def train(script: str, output: Path, flags: str, *paths: object) -> float:
    """Run a stage, unless its result is there; return its seconds."""
    ended = output.with_suffix(".ended")  # a run that was stopped has weights, too
    if ended.exists():
        return 0.0
    common = ["--out_dir", output.parent, "--max_seq_len", MAX_SEQ_LEN, "--device", "cpu", "--overwrite"]
    started = time.perf_counter()
    run_stage(script, *common, *shlex.split(flags), *paths)
    ended.touch()
    return time.perf_counter() - started


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--init_from", type=Path, required=True, help="a model that answers, as that of the quickstart")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "bench_rlvr")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=[*ALGORITHMS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sft", default=SFT, help="flags of 3-full_sft.py")
    parser.add_argument("--rlvr", default=RLVR, help="flags of 6-rlvr_train.py")
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    exercises = read_held_out(tokenizer)

    def cells(paths: list[Path]) -> str:
        models = [open_model(path, dtype=torch.float32)[0].model for path in paths]
        rows = [measure(model, tokenizer, exercises) for model in models]
        return " | ".join(", ".join(f"{row[name]:.1%}" for row in rows) for name in MEASURED)

    name = args.init_from.stem.rpartition("rl_")[2].rpartition("full_sft_")[2]
    flags = json.dumps([str(args.init_from), args.sft, args.rlvr, args.steps])
    out_dir = args.out_dir / hashlib.sha256(flags.encode()).hexdigest()[:8]  # one for each setting
    sft = out_dir / f"full_sft_{name}.pth"
    data = ["--data_path", SAMPLE / "rlvr_sft.jsonl", "--init_from", args.init_from]
    seconds = train("3-full_sft.py", sft, args.sft, *data)
    print(f"| after | {' | '.join(MEASURED)} | minutes | rollout tokens/s |\n|{'---|' * (len(MEASURED) + 3)}")
    print(f"| SFT | {cells([sft])} | {seconds / 60:.1f} | – |", flush=True)
    for algorithm in args.algorithms:
        outputs, minutes, rates = [], [], []
        for seed in range(args.seeds):
            outputs.append(out_dir / f"{algorithm}_{seed}" / f"rlvr_{name}.pth")
            flags = f"{args.rlvr} --algorithm {algorithm} --seed {seed} --max_steps {args.steps} --val_fraction 0"
            data = ["--data_path", SAMPLE / "rlvr_data.jsonl", "--init_from", sft, "--max_new_tokens", MAX_NEW_TOKENS]
            minutes.append(train("6-rlvr_train.py", outputs[-1], flags, *data) / 60)
            lines = read_metrics(outputs[-1].with_name(f"rlvr_{name}.metrics.jsonl"))
            found = [line["rollout_tokens_per_second"] for line in lines if "rollout_tokens_per_second" in line]
            rates.append(statistics.median(found))
        minutes_each, rate = statistics.mean(minutes), statistics.mean(rates)
        print(f"| {algorithm} | {cells(outputs)} | {minutes_each:.1f} | {rate:,.0f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
