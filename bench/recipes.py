"""Try what others report to train faster: the same texts and steps with one thing changed, over several seeds.

    python bench/recipes.py --data_path dataset/pretrain_data.csv                     # everything; hours on a CPU
    python bench/recipes.py --data_path dataset/pretrain_data.csv --only base "head not tied" --seeds 1

"base" is Muon as published, at 4e-3 for everything; the others change what their line in `RECIPES` says. "1-pretrain.py"
is what it does by default, and "quickstart" what it does there. The loss is that of held-out texts after the last step;
the steps are the same for all, so a recipe that costs more time per step needs a larger gain: the column "time" has the
time of a step, relative to the base's. A line of a finished run is kept in --out_file, and not repeated; --plot draws
those of this setting: gains over the base, and the training loss of the base and the best.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from common.cli import Parser  # noqa: E402
from common.errors import run_script
from common.files import ROOT
from data_pipeline.datasets import PackedRows
from data_pipeline.packing import sample_order
from data_pipeline.tokenize import tokenize_pretrain_data
from docs.experiments.tiny import plot
from evaluation.runs import read_metrics
from model.device import resolve_device, resolve_dtype
from model.LMConfig import preset
from model.model import Transformer
from model.tokenizer import load_tokenizer
from trainer.losses import next_token_loss
from trainer.optim import BETAS, parameter_groups

QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5  # Muon's own
# Polar Express (https://arxiv.org/abs/2505.16932), for singular values from 1e-3: each round has its own polynomial.
POLAR = [
    (8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518), (3.3184, -2.4885, 0.5100),
    (2.3007, -1.6689, 0.4188),
]  # fmt: skip


@dataclass
class Recipe:
    """How a model is trained."""

    fields: dict = field(default_factory=dict)  # of LMConfig
    heads: float = 1.0  # their number, relative to the preset's
    prepare: Callable[[Transformer], None] = lambda model: None  # changes the initial weights
    peak: float = 4e-3
    embedding_rate: float = 1.0  # learning rates relative to that of the matrices
    vector_rate: float = 1.0
    warmup: float = 0.1  # share of the steps; from 1 on: steps
    constant: float | None = None  # share of the steps before a linear fall; None: a cosine from the start
    floor: float = 0.1
    momentum: tuple[float, float] = (0.95, 0.95)  # at the first step, and from a tenth of the steps on
    rounds: list = field(default_factory=lambda: QUINTIC)
    per_neuron: bool = False  # NorMuon
    weight_decay: float = 0.1
    cautious: bool = False  # decay only what the update makes smaller, too
    decay_falls: bool = False  # to zero, with the steps
    z_loss: float = 0.0
    average: float = 0.0  # decay of the moving average of the weights that is evaluated


def scale(parts: str, factor: float) -> Callable[[Transformer], None]:
    """Return a function that multiplies the initial weights whose names have one of `parts` in them."""

    @torch.no_grad()
    def prepare(model: Transformer) -> None:
        for name, parameter in model.named_parameters():
            if any(piece in name for piece in parts.split()):
                parameter.mul_(factor)

    return prepare


RESIDUAL = "wo.weight w2.weight"
OURS = Recipe(momentum=(0.9, 0.9), warmup=10)  # what 1-pretrain.py does
QUICK = dataclasses.replace(OURS, embedding_rate=3, warmup=0.02)
RECIPES = {
    "base": Recipe(),
    "rate 2e-3": Recipe(peak=2e-3),
    "rate 8e-3": Recipe(peak=8e-3),
    "init 0.05": Recipe(fields={"initializer_range": 0.05}),
    "init 0.1": Recipe(fields={"initializer_range": 0.1}),
    "embedding init 0.05": Recipe(prepare=scale("tok_embeddings", 2.5)),
    "embedding init 0.1": Recipe(prepare=scale("tok_embeddings", 5)),
    "matrices init 0.05": Recipe(fields={"initializer_range": 0.05}, prepare=scale("tok_embeddings", 0.4)),
    "residual projections 0": Recipe(prepare=scale(RESIDUAL, 0)),
    "embedding rate x 0.3": Recipe(embedding_rate=0.3),
    "embedding rate x 3": Recipe(embedding_rate=3),
    "embedding rate x 10": Recipe(embedding_rate=10),
    "embedding rate x 30": Recipe(embedding_rate=30),
    "norm rate x 3": Recipe(vector_rate=3),
    "warm-up 2%": Recipe(warmup=0.02),
    "cosine to 0": Recipe(floor=0.0),
    "linear to 0": Recipe(floor=0.0, constant=0.0),
    "constant 40%, then linear to 0": Recipe(floor=0.0, constant=0.4),
    "momentum 0.9": Recipe(momentum=(0.9, 0.9)),
    "momentum 0.85 to 0.95": Recipe(momentum=(0.85, 0.95)),
    "Polar Express": Recipe(rounds=POLAR),
    "Polar Express, 3 rounds": Recipe(rounds=POLAR[:3]),
    "3 rounds": Recipe(rounds=QUINTIC[:3]),
    "NorMuon": Recipe(per_neuron=True),
    "no weight decay": Recipe(weight_decay=0.0),
    "cautious weight decay to 0": Recipe(cautious=True, decay_falls=True),
    "z-loss 1e-4": Recipe(z_loss=1e-4),
    "average of the weights, 0.9": Recipe(average=0.9),
    "head not tied": Recipe(fields={"tie_word_embeddings": False}),
    "QK-norm": Recipe(fields={"qk_norm": True}),
    "half as many heads": Recipe(heads=0.5),
    "1-pretrain.py": OURS,
    "quickstart": dataclasses.replace(OURS, embedding_rate=3),
    "quickstart, warm-up 2%": QUICK,
    "the latter, residual projections 0": dataclasses.replace(QUICK, prepare=scale(RESIDUAL, 0)),
    "the latter, 3 rounds": dataclasses.replace(QUICK, rounds=QUINTIC[:3]),
    "the latter, fewer heads, head not tied": dataclasses.replace(
        QUICK, heads=0.5, fields={"tie_word_embeddings": False}
    ),
}


def orthogonalize(matrix: Tensor, rounds: list[tuple[float, float, float]]) -> Tensor:
    """Return about the nearest orthogonal matrix (rows, columns): Newton-Schulz rounds with odd polynomials."""
    x = matrix.to(torch.bfloat16)
    if transposed := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() * 1.02 + 1e-7)
    for a, b, c in rounds:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, with what a `Recipe` changes."""

    def __init__(self, parameters: list, recipe: Recipe) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": 0.95, "weight_decay": recipe.weight_decay})
        self.recipe = recipe

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        recipe = self.recipe
        for group in self.param_groups:
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["mean"] = torch.zeros_like(gradient)
                    state["square"] = torch.zeros(len(gradient), 1)
                    state["steps"] = 0
                state["steps"] += 1
                state["mean"].lerp_(gradient, 1 - group["momentum"])
                update = orthogonalize(gradient.lerp(state["mean"], group["momentum"]), recipe.rounds).float()
                if recipe.per_neuron:  # https://arxiv.org/abs/2510.05491
                    norm = update.norm()
                    state["square"].lerp_(update.square().mean(1, keepdim=True), 0.05)
                    update = update / (state["square"] / (1 - 0.95 ** state["steps"])).sqrt().clamp_min(1e-8)
                    update *= norm / update.norm()
                decay = group["lr"] * group["weight_decay"]
                if recipe.cautious:
                    parameter.addcmul_(parameter, (update * parameter > 0).float(), value=-decay)
                else:
                    parameter.mul_(1 - decay)
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate relative to its peak."""
    warm = max(int(recipe.warmup * steps if recipe.warmup < 1 else min(recipe.warmup, steps // 10)), 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(steps - warm - 1, 1)
    if recipe.constant is None:
        left = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        left = min(1.0, (1 - progress) / (1 - recipe.constant))
    return recipe.floor + (1 - recipe.floor) * left


@torch.no_grad()
def validation_loss(model: Transformer, rows: PackedRows, dtype: torch.dtype, batch_size: int) -> float:
    """Return the mean loss of a target of all rows."""
    device, total, n_targets = next(model.parameters()).device, 0.0, 0
    model.eval()
    for begin in range(0, len(rows), batch_size):
        batch = rows.batch(range(begin, min(begin + batch_size, len(rows)))).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, n, _ = next_token_loss(model, batch)
        total, n_targets = total + float(loss), n_targets + n
    model.train()
    return total / n_targets


def train(recipe: Recipe, rows: PackedRows, val: PackedRows, seed: int, args) -> dict:
    """Return the validation loss after the last step, the median seconds of a step, and the training losses."""
    device = resolve_device(args.device)
    dtype = resolve_dtype("auto", device)
    torch.manual_seed(seed)
    sizes = {name: value for name in ("dim", "n_layers", "n_heads", "n_kv_heads") if (value := getattr(args, name))}
    config = preset(args.preset, **sizes)
    heads = {name: int(getattr(config, name) * recipe.heads) or 1 for name in ("n_heads", "n_kv_heads")}
    model = Transformer(preset(args.preset, **(sizes | heads | recipe.fields)))
    recipe.prepare(model)
    model.to(device).train()
    groups = {name: [parameter for _, parameter in pairs] for name, pairs in parameter_groups(model).items()}
    rest = [
        {"params": groups["embeddings"], "weight_decay": 0.0, "relative": recipe.embedding_rate},
        {"params": groups["vectors"], "weight_decay": 0.0, "relative": recipe.vector_rate},
    ]
    optimizers = [torch.optim.AdamW(rest, betas=BETAS, eps=1e-8), Muon(groups["matrices"], recipe)]
    order = sample_order(len(rows), seed, 0).tolist()
    average = copy.deepcopy(model) if recipe.average else model
    seconds, losses = [], []
    for step in range(args.steps):
        start = time.process_time()
        batch = rows.batch(order[step * args.batch_size : (step + 1) * args.batch_size]).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, n_targets, _ = next_token_loss(model, batch)
            if recipe.z_loss:
                logits = model(**{k: v for k, v in batch.inputs.items() if k != "labels"}, use_cache=False).logits
                loss = loss + recipe.z_loss * logits.float().logsumexp(-1).square().sum()
        (loss / n_targets).backward()
        losses.append(round(float(loss.detach()) / n_targets, 3))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = recipe.peak * rate(recipe, step, args.steps)
        first, last = recipe.momentum
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("relative", 1.0)
                if "momentum" in group:
                    group["momentum"] = first + (last - first) * min(10 * step / args.steps, 1)
                    if recipe.decay_falls:
                        group["weight_decay"] = recipe.weight_decay * (1 - step / args.steps)
            optimizer.step()
            optimizer.zero_grad()
        if recipe.average:
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.data.lerp_(parameter.data, 1 - min(recipe.average, (step + 1) / (step + 10)))
        seconds.append(time.process_time() - start)
    loss = validation_loss(average, val, dtype, args.batch_size)
    return {"loss": loss, "seconds": statistics.median(seconds), "losses": losses}


def draw(found: dict[str, list[dict]], axes) -> None:
    """Draw the gains of recipes over the base, a dot for each seed, and the curves of the base and the best."""
    means = {name: statistics.mean(line["loss"] for line in lines) for name, lines in found.items()}
    base = {line["seed"]: line["loss"] for line in found["base"]}
    names = sorted(means, key=means.__getitem__, reverse=True)
    for y, name in enumerate(names):
        gains = [line["loss"] - base[line["seed"]] for line in found[name] if line["seed"] in base]
        axes[0].plot(gains, [y] * len(gains), "o", color="tab:blue" if name != "base" else "black")
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0].set_xlabel("validation loss, minus the base's")
    for name, colour in (("base", "black"), (names[-1], "tab:blue")):
        for i, line in enumerate(found[name]):
            curve = [statistics.mean(line["losses"][max(n - 9, 0) : n + 1]) for n in range(len(line["losses"]))]
            axes[1].plot(curve, color=colour, linewidth=0.8, label=name if i == 0 else None)
    axes[1].set_xlabel("step")
    axes[1].set_ylabel("training loss, mean of 10 steps")
    axes[1].legend(frameon=False)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data_path", type=Path, nargs="+", default=[ROOT / "dataset" / "pretrain_data.csv"])
    parser.add_argument("--out_file", type=Path, default=ROOT / "out" / "recipes.jsonl")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), help="only these recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows in a step (default: 8)")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens in a row (default: 512)")
    parser.add_argument("--preset", default="minimind-v1-small")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results, .svg or .png")
    args = parser.parse_args()
    dataset = tokenize_pretrain_data(args.data_path, load_tokenizer(), args.out_file.parent / "cache")
    train_ids, val_ids = dataset.split(min(0.01, 60_000 / int(dataset.offsets[-1])))
    rows, val = (PackedRows(dataset, ids, args.seq_len, 0) for ids in (train_ids, val_ids))
    if len(rows) < args.steps * args.batch_size:
        parser.error(f"the texts fill {len(rows):,} rows; --steps x --batch_size is more")
    kept = ("steps", "batch_size", "seq_len", "preset", "dim", "n_layers", "n_heads", "n_kv_heads", "device")
    setting = {name: getattr(args, name) for name in kept} | {"data_path": [str(path) for path in args.data_path]}
    args.out_file.parent.mkdir(parents=True, exist_ok=True)
    done = [
        line for line in (read_metrics(args.out_file) if args.out_file.is_file() else []) if line["setting"] == setting
    ]
    for seed in args.seeds:
        for name in args.only or RECIPES:
            if any(line["name"] == name and line["seed"] == seed for line in done):
                continue
            result = train(RECIPES[name], rows, val, seed, args)
            done.append({"name": name, "seed": seed, "setting": setting} | result)
            print(f"{name}, seed {seed}: {result['loss']:.4f}, {result['seconds']:.2f} CPU s per step", flush=True)
            with args.out_file.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    print("\n| recipe | loss, each seed | mean | to the base | time |\n|---|---|---|---|---|")
    found = {name: [line for line in done if line["name"] == name] for name in RECIPES}
    found = {name: lines for name, lines in found.items() if lines}
    base = {line["seed"]: line for line in found.get("base", [])}
    for name, lines in sorted(found.items(), key=lambda pair: statistics.mean(line["loss"] for line in pair[1])):
        pairs = [(line, base[line["seed"]]) for line in lines if line["seed"] in base]
        gain = f"{statistics.mean(a['loss'] - b['loss'] for a, b in pairs):+.4f}" if pairs else "–"
        cost = f"{statistics.median(a['seconds'] / b['seconds'] for a, b in pairs):.2f}" if pairs else "–"
        losses = ", ".join(f"{line['loss']:.3f}" for line in lines)
        print(f"| {name} | {losses} | {statistics.mean(line['loss'] for line in lines):.4f} | {gain} | {cost} |")
    if args.plot:
        plot(args.plot, __file__, lambda *axes: draw(found, axes), n_plots=2)


if __name__ == "__main__":
    run_script(main)
