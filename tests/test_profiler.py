"""--profile: a Chrome trace of so many steps, a table of where their time went, and a run that is otherwise the same."""

from __future__ import annotations

import json
import re

import pytest

from tests.test_trainer import options, same, train, weights


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
    assert set(shares) == {"matrix products", "attention", "loss", "optimizer", "the rest"}
    assert min(shares.values()) > 0 and sum(shares.values()) == pytest.approx(100, abs=0.3)
    assert same(weights(plain), weights(model))


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_ends_in_the_warm_up_says_so(tmp_path, capsys, steps):
    train(options(tmp_path, profile=5, max_steps=steps))
    assert ("no trace" in capsys.readouterr().out) == (steps == 3)
    assert not list(tmp_path.glob("*.trace.json"))
