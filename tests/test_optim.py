"""Schedule and parameter groups."""

from __future__ import annotations

import pytest
import torch
from tolerances import rounding

from model.LMConfig import LMConfig
from model.model import Transformer
from trainer.distributed import DistEnv
from trainer.optim import clip_gradients, get_lr, gradient_norm, make_optimizers, parameter_groups
from trainer.options import TrainOptions
from trainer.parallel.ddp import DDPStrategy

TINY = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64)


def tiny(**fields) -> Transformer:
    torch.manual_seed(0)
    return Transformer(LMConfig(**TINY | fields))


def test_schedule_warms_up_peaks_and_ends_at_a_tenth():
    rates = [get_lr(step, 100, 1.0, warmup_steps=10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_schedule_of_a_single_step_is_the_peak():
    assert get_lr(0, 1, 0.5) == 0.5


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_moe": True, "router_bias_rate": 0.001}, {"tie_word_embeddings": False}],
    ids=["dense", "moe", "untied"],
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(fields, name):
    model = tiny(**fields)
    decay = {}
    for optimizer in make_optimizers(model, name, weight_decay=0.1):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in decay
                decay[id(parameter)] = (type(optimizer).__name__, group.get("weight_decay", 0.0))
    named = dict(model.named_parameters())
    assert set(decay) == {id(p) for p in named.values()}
    for parameter_name, parameter in named.items():
        kind, value = decay[id(parameter)]
        decays = parameter.dim() == 2 and not {"tok_embeddings", "output"} & set(parameter_name.split("."))
        assert value == (0.1 if decays else 0.0), parameter_name
        expected = "Muon" if name == "muon" and decays and "gate" not in parameter_name else "AdamW"
        assert kind == ("SignDescent" if parameter_name.endswith("gate.bias") else expected)


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error():
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "wq" in name
    groups = parameter_groups(model)
    assert [name for group in groups.values() for name, _ in group] == [
        f"layers.{i}.attention.wq.weight" for i in (0, 1)
    ]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_embedding_has_a_learning_rate_of_its_own(name):
    """One step of AdamW moves every weight with a gradient by its learning rate."""
    model = tiny(tie_word_embeddings=False)
    options = TrainOptions(optimizer=name, embedding_lr_scale=5.0, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    strategy = DDPStrategy(model, options, DistEnv(), torch.device("cpu"), torch.float32)
    strategy.set_learning_rate(1e-3)
    ids = torch.arange(64)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in strategy.optimizers:
        optimizer.step()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    for parameter in ("tok_embeddings.weight", "output.weight"):
        assert moved[parameter] == pytest.approx(5e-3, rel=0.01)
    assert moved["norm.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moved["layers.0.attention.wq.weight"] < 2e-3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_learn(name):
    model = tiny().train()
    optimizers = make_optimizers(model, name, weight_decay=0.1)
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_the_norm_of_large_tensors_is_exact_and_clipping_with_it():
    torch.manual_seed(0)
    gradients = [torch.randn(3_000_000) * 1e-3, torch.randn(30, 40)]
    exact = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    assert float(gradient_norm(gradients)) == pytest.approx(exact, rel=rounding(torch.float64, terms=3_000_000))
    before = [g.clone() for g in gradients]
    clip_gradients(gradients, exact, exact * 2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    clip_gradients(gradients, exact, 0.5)
    assert float(gradient_norm(gradients)) == pytest.approx(0.5, rel=rounding(depth=2))


def test_a_norm_that_is_not_finite_is_told():
    for value in (float("nan"), float("inf")):
        gradients = [torch.ones(3), torch.tensor([1.0, value])]
        assert not gradient_norm(gradients).isfinite()
        clip_gradients(gradients, float(gradient_norm(gradients)), 1.0)
