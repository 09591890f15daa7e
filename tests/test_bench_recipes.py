"""bench/recipes.py: it updates weights as 1-pretrain.py does, each recipe trains, and finished runs are not repeated."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest
import torch
from launching import ROOT

from bench.recipes import OURS, RECIPES, Muon, Recipe, orthogonalize, rate
from model.LMConfig import preset
from model.model import Transformer
from trainer.optim import get_lr, make_optimizers

PRETRAIN = importlib.import_module("1-pretrain")
SAMPLE = ROOT / "dataset" / "sample" / "mobvoi_seq_monkey_general_open_corpus.jsonl"
SIZE = "--steps 20 --batch_size 2 --seq_len 64 --dim 32 --n_layers 1 --n_heads 2 --n_kv_heads 1 --device cpu".split()


@pytest.mark.parametrize(
    ("name", "momentum", "rounds"),
    [("base", 0.95, 5), ("the latter, 3 rounds", 0.9, 3)],
)
def test_updates_and_rates_are_those_of_pytorch(name, momentum, rounds):
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (24, 8), (16, 16))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    settings = {"momentum": momentum, "ns_steps": rounds, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, **settings)
    optimizer = Muon(ours, RECIPES[name])
    optimizer.param_groups[0]["momentum"] = momentum  # `train` sets it at every step
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(3):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        reference.step()
        optimizer.step()
    for a, b in zip(theirs, ours, strict=True):  # both round to bfloat16 on the way, in another order
        torch.testing.assert_close(a, b, atol=3 * 0.01 * 0.2 * 24**0.5 * 2**-5, rtol=0)
    assert [rate(Recipe(), step, 50) for step in range(50)] == pytest.approx([get_lr(s, 50, 1.0, 5) for s in range(50)])


def test_one_recipe_is_that_of_pretraining():
    model = Transformer(preset("toy"))
    options = PRETRAIN.PretrainOptions(device="cpu")
    rest, muon = make_optimizers(model, options.optimizer, options.weight_decay, options.embedding_lr_scale)
    assert (muon.defaults["momentum"], muon.defaults["ns_steps"]) == (OURS.momentum[0], len(OURS.rounds))
    assert [group["lr_scale"] for group in rest.param_groups if "lr_scale" in group] == [OURS.embedding_rate]
    assert (options.learning_rate, options.weight_decay) == (OURS.peak, OURS.weight_decay)
    for n in (60, 480):
        schedule = [get_lr(step, n, 1.0, min(options.warmup_iters, n // 10)) for step in range(n)]
        assert [rate(OURS, step, n) for step in range(n)] == pytest.approx(schedule)


@pytest.mark.parametrize("rounds", ["Polar Express", "base"])
def test_updates_are_nearly_orthogonal(rounds):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(48, 32), RECIPES[rounds].rounds).float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_every_recipe_differs_from_the_base_and_trains(run_here, tmp_path):
    base = dataclasses.asdict(Recipe())
    for name, recipe in RECIPES.items():
        assert (dataclasses.asdict(recipe) == base) == (name == "base"), name
    flags = ["--data_path", SAMPLE, "--out_file", tmp_path / "r.jsonl", *SIZE, "--seeds", 1]
    first = run_here("bench/recipes.py", *flags)
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [*RECIPES]
    losses = {line["name"]: line["loss"] for line in lines}
    assert losses.pop("1-pretrain.py") == losses["momentum 0.9"]  # of 20 steps 10% are for the warm-up of both
    assert len({*losses.values()}) == len(losses)
    assert f"| base | {lines[0]['loss']:.3f} | {lines[0]['loss']:.4f} | +0.0000 | 1.00 |" in first.stdout
    again = run_here("bench/recipes.py", *flags)
    assert "CPU s per step" not in again.stdout and again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
