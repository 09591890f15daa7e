"""--profile: a Chrome trace of so many steps, a table of where their time went, and a run that is otherwise the same."""

from __future__ import annotations

import json
import re
from unittest.mock import ANY

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from tests.test_trainer import options, same, train, weights
from trainer.metrics import time_table


def traced_steps(path) -> int:
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" or event.get("name") == "aten::addmm" for event in events)
    return len({event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")})


@pytest.mark.parametrize(("n", "recorded"), [(2, 2), (100, 9)], ids=["some", "more than there are"])
def test_a_trace_of_the_steps_asked_for(tmp_path, capsys, n, recorded):
    plain, _ = train(options(tmp_path / "plain"))
    model, _ = train(options(tmp_path / "traced", profile=n))
    path = tmp_path / "traced" / "tiny.rank0.trace.json"
    # A run that ends while recording has begun a step more, in which nothing happens.
    assert traced_steps(path) == recorded + (n > recorded)
    out = capsys.readouterr().out
    assert f"a trace of {recorded} steps is in {path}" in out
    shares = {part: float(share) for part, share in re.findall(r"^  (\w[\w ]*?) +([\d.]+)%$", out, re.MULTILINE)}
    assert set(shares) == {"matrix products", "attention", "softmax and loss", "optimizer", "the rest"}
    assert min(shares.values()) > 0 and sum(shares.values()) == pytest.approx(100, abs=0.3)
    assert same(weights(plain), weights(model))


@pytest.mark.parametrize("part", ["matrix products", "attention", "softmax and loss", "optimizer", "the rest"])
def test_time_counts_for_the_part_it_belongs_to(part):
    x = torch.randn(1, 4, 256, 64, requires_grad=True)
    muon = torch.optim.Muon([torch.nn.Parameter(torch.randn(256, 256))])
    muon.param_groups[0]["params"][0].grad = torch.randn(256, 256)
    work = {
        "matrix products": lambda: x[0, 0] @ x[0, 0].T,
        "attention": lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward(),
        "softmax and loss": lambda: F.cross_entropy(x[0, 0], torch.zeros(256, dtype=torch.long)),
        "optimizer": muon.step,
        "the rest": lambda: x.sin().cos(),
    }[part]
    with profile() as recorded:
        for _ in range(20):
            work()
    assert time_table(recorded, torch.device("cpu")).split("%")[0].split() == [*part.split(), ANY]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_ends_in_the_warm_up_says_so(tmp_path, capsys, steps):
    train(options(tmp_path, profile=5, max_steps=steps))
    assert ("no trace" in capsys.readouterr().out) == (steps == 3)
    assert not list(tmp_path.glob("*.trace.json"))
